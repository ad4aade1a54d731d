"""Read a folder of documents as sections that an answer can name as its source."""

from __future__ import annotations

import csv
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from langchain_core.documents import Document

from shared_engine import PageError
from shared_engine.errors import first_line
from shared_engine.images.pages import open_pages, walk

_Reader = Callable[[Path, str], Iterator[Document | str]]
"""Yields the sections of a file, and of parts that cannot be read the reasons."""


def read(folder: Path) -> tuple[list[Document], list[str]]:
    """Return the sections of every file that has a reader, and what had to be left out.

    Its metadata: `source`, the file below the folder; `place`, its heading, page or row; `title`,
    the headings above it; `section`, which is both and tells it from all others.

    Raises:
        FileNotFoundError: there is no such folder, or nothing to read in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of documents")
    sections: list[Document] = []
    left_out = []
    others: dict[str, list[str]] = defaultdict(list)
    for path in map(Path, walk(folder)):
        if not path.is_file():
            continue
        source = path.relative_to(folder).as_posix()
        read = _READERS.get(path.suffix.lower())
        if read is None:
            others[path.suffix.lower()].append(source)
            continue
        found = _try(read, path, source)
        for number, section in enumerate(found):
            if isinstance(section, str):
                left_out.append(section)
            elif section.page_content.strip():
                section.metadata |= {"source": source, "section": f"{source}#{number}"}
                sections.append(section)
            else:
                left_out.append(f"{source}: {section.metadata['place']} has no text")
    for suffix, names in others.items():
        more = f" and {len(names) - 1} more of {suffix or 'no suffix'}" if names[1:] else ""
        left_out.append(f"{names[0]}{more}: not one of {', '.join(_READERS)}")
    if not sections:
        reasons = "".join(f"\n  {reason}" for reason in left_out)
        raise FileNotFoundError(f"{folder} has no {', '.join(_READERS)} with text in it{reasons}")
    return sections, left_out


def _try(read: _Reader, path: Path, source: str) -> list[Document | str]:
    """Return the sections of a file, or why it has none."""
    try:
        return list(read(path, source)) or [f"{source} has no text"]
    except ImportError as exc:
        return [f"{source}: needs {exc.name}: pip install {exc.name}"]
    except PageError as exc:
        return [str(exc)]
    except (OSError, ValueError) as exc:
        return [f"{source}: {exc}"]


def _read_markdown(path: Path, _: str) -> Iterator[Document]:
    return _split_markdown(path.read_text(encoding="utf-8-sig"), path.stem)


def _read_text(path: Path, _: str) -> Iterator[Document]:
    return _split_markdown(_mark_chapters(path.read_text(encoding="utf-8-sig")), path.stem)


def _split_markdown(text: str, name: str) -> Iterator[Document]:
    """Yield the sections between headings; a text without any is one section."""
    from langchain_text_splitters import MarkdownHeaderTextSplitter

    levels = ["#", "##", "###"]
    splitter = MarkdownHeaderTextSplitter([(level, level) for level in levels])
    for section in splitter.split_text(_unify_headings(text)):
        titles = [section.metadata[level] for level in levels if level in section.metadata]
        place = f'"{titles[-1]}"' if titles else "the whole"
        yield Document(
            section.page_content, metadata={"title": ": ".join(titles) or name, "place": place}
        )


def _unify_headings(text: str) -> str:
    r"""Return Markdown whose headings all begin with #, none is underlined.

    >>> _unify_headings("Fruit\n=====\nAll.\n\nRed\nApples\n---\n\n    Code\n    ----\n")
    '# Fruit\nAll.\n\n## Red Apples\n\n    Code\n    ----'
    """
    from markdown_it import MarkdownIt

    matter = _FRONT_MATTER.match(text)
    text = text[matter.end() :] if matter else text
    lines = text.splitlines()
    for token in reversed(MarkdownIt().parse(text)):
        if token.type == "heading_open" and token.markup in ("=", "-") and token.map:
            start, end = token.map
            heading = " ".join(line.strip() for line in lines[start : end - 1])
            lines[start:end] = [f"{'#' if token.markup == '=' else '##'} {heading}"]
    return "\n".join(lines)


_FRONT_MATTER = re.compile(r"---\n.*?\n---\n", re.DOTALL)
"""What Markdown for websites begins with, not a heading."""
_CHAPTER = re.compile(
    r"(?i:chapter|part|section|appendix) (?:\d+|[IVXLC]+|[A-Z])\b.{0,70}"
    r"|(\d+(?:\.\d+)*) +([^\W\d_]).{0,70}(?<![.;,:])"
)
"""A numbered heading; "1. one" is an entry of a list."""


def _mark_chapters(text: str) -> str:
    r"""Return a text whose numbered headings, alone between empty lines, are headings of Markdown.

    >>> _mark_chapters("1 Fruit\n\nAll.\n\n1.2 Apples\n\n2 are red\n\n1. one\n\n2. two\n")
    '# 1 Fruit\n\nAll.\n\n## 1.2 Apples\n\n2 are red\n\n1. one\n\n2. two\n'
    """
    lines = ["", *text.split("\n"), ""]
    for at in range(1, len(lines) - 1):
        found = _CHAPTER.fullmatch(lines[at].strip())
        is_alone = not (lines[at - 1].strip() or lines[at + 1].strip())
        if found and is_alone and not (found[2] or "").islower():
            depth = found[1].count(".") + 1 if found[1] else 1
            lines[at] = f"{'#' * min(depth, 3)} {lines[at].strip()}"
    return "\n".join(lines[1:-1])


def _read_html(path: Path, _: str) -> Iterator[Document]:
    return _split_html(path.read_bytes(), path.stem)


def _read_word(path: Path, _: str) -> Iterator[Document]:
    import mammoth

    try:
        with path.open("rb") as file:
            html = mammoth.convert_to_html(file).value
    except OSError:
        raise
    except Exception as exc:  # of zipfile, of XML
        reason = first_line(exc)
        raise ValueError(f"broken, locked, or no Word document ({reason})") from exc
    return _split_html(html.encode(), path.stem)


def _split_html(html: bytes, name: str) -> Iterator[Document]:
    """Yield the sections between headings, tables and lists as Markdown."""
    from bs4 import BeautifulSoup
    from markdownify import MarkdownConverter

    soup = BeautifulSoup(html, "html.parser")  # which finds the encoding, too
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    for tag in soup.find_all(["head", "script", "style", "template", "nav"]):
        tag.decompose()
    converter = MarkdownConverter(
        heading_style="ATX", strip=["a", "img"], escape_asterisks=False, escape_underscores=False
    )
    yield from _split_markdown(converter.convert_soup(soup), title or name)


def _read_table(path: Path, source: str) -> Iterator[Document | str]:
    """Yield each row as lines of "column: value"."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        try:
            dialect: type[csv.Dialect] = csv.Sniffer().sniff(file.read(4096), ",;\t|")
        except csv.Error:  # one column
            dialect = csv.excel
        file.seek(0)
        try:
            for number, row in enumerate(csv.DictReader(file, dialect=dialect, restkey="more"), 1):
                cells = {name: value for name, value in row.items() if value}
                text = "\n".join(f"{name}: {value}" for name, value in cells.items())
                first = textwrap.shorten(str(next(iter(cells.values()), "")), 60)
                title = f"{path.stem}: {first}" if first else path.stem
                yield Document(text, metadata={"title": title, "place": f"row {number}"})
        except csv.Error as exc:
            yield f"{source}: {exc}"


def _read_pdf(path: Path, source: str) -> Iterator[Document | str]:
    """Yield the text layer of each page, empty for a scan; of a broken page the reason."""
    with open_pages(path, source) as pages:
        for index, place in enumerate(pages.places):
            try:
                text = pages.read(index, "text").text
            except PageError as exc:
                yield str(exc)
                continue
            first, _, _ = text.partition("\n")
            title = f"{path.stem}: {textwrap.shorten(first, 60)}"
            yield Document(text, metadata={"title": title, "place": str(place)})


_READERS: dict[str, _Reader] = {
    ".md": _read_markdown,
    ".txt": _read_text,
    ".pdf": _read_pdf,
    ".docx": _read_word,
    ".html": _read_html,
    ".htm": _read_html,
    ".csv": _read_table,
}
