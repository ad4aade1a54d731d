"""Read a folder of documents as sections that an answer can name as its source."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import pairwise, zip_longest
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
        source = path.relative_to(folder).as_posix()
        try:
            source.encode()
        except UnicodeEncodeError:
            left_out.append(f"{source}: its name is not UTF-8; rename it")
            continue
        read = _READERS.get(path.suffix.lower())
        if read is None:
            others[path.suffix.lower()].append(source)
            continue
        if not path.is_file():
            left_out.append(f"{source}: no regular file, or a link to none")
            continue
        blank = []
        for number, section in enumerate(_try(read, path, source)):
            if isinstance(section, str):
                left_out.append(section)
            elif section.page_content.strip():
                section.metadata |= {"source": source, "section": f"{source}#{number}"}
                sections.append(section)
            else:
                blank.append(section.metadata["place"])
        if blank:
            has = f"and {len(blank) - 1} more have" if blank[1:] else "has"
            left_out.append(
                f"{source}: {blank[0]} {has} no text; a scan needs text recognition (ocrmypdf)"
            )
    if others:
        named = (
            f"{len(names)} of {suffix or 'no suffix'}, such as {names[0]}"
            for suffix, names in others.items()
        )
        left_out.append(f"not one of {', '.join(_READERS)}: {'; '.join(named)}")
    if not sections:
        reasons = "".join(f"\n  {reason}" for reason in left_out)
        raise FileNotFoundError(f"{folder} has no {', '.join(_READERS)} with text in it{reasons}")
    return sections, left_out


def _try(read: _Reader, path: Path, source: str) -> list[Document | str]:
    """Return the sections of a file, or why it has none."""
    try:
        return list(read(path, source)) or [f"{source} has no text"]
    except ImportError as exc:
        return [f"{source}: needs {exc.name}: pip install '.[demo]'"]
    except RecursionError:
        return [f"{source}: its elements are nested too deeply"]
    except PageError as exc:
        return [str(exc)]
    except (OSError, ValueError) as exc:
        return [f"{source}: {exc}"]


def _read_markdown(path: Path, _: str) -> Iterator[Document]:
    return _split_markdown(_decode(path), path.stem)


def _read_text(path: Path, _: str) -> Iterator[Document]:
    return _split_markdown(_mark_chapters(_decode(path)), path.stem)


def _decode(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as exc:
        raise ValueError(f"not UTF-8 at byte {exc.start}; save it as UTF-8") from exc


def _split_markdown(text: str, name: str) -> Iterator[Document]:
    """Yield the sections between headings; a text without any is one section.

    A heading without text is text itself, unless it is the title of sections below it.
    """
    from markdown_it import MarkdownIt

    lines = _FRONT_MATTER.sub(r"\1\n", text).splitlines()
    found = [(0, "", 0, 0)]  # depth, heading, its first line and the one after it
    for token, inline in pairwise(MarkdownIt().parse("\n".join(lines))):
        is_heading = token.tag in _HEADINGS and token.nesting == 1 and not token.level
        if is_heading and token.map and (heading := " ".join(inline.content.split())):
            found.append((int(token.tag[1]), heading, *token.map))
    found.append((0, "", len(lines), len(lines)))
    above: dict[int, str] = {}
    for (depth, heading, _, start), (next_depth, _, end, _) in pairwise(found):
        title = heading[:_TITLE]
        above = {level: other for level, other in above.items() if level < depth}
        if title:
            above[depth] = title
        body = "\n".join(lines[start:end]).strip("\n")
        if heading != title or (next_depth <= depth and not body.strip()):
            body = f"{heading}\n{body}".strip()
        if body.strip():
            place = f'"{title}"' if title else "the beginning" if found[2:] else "the whole"
            yield Document(
                body, metadata={"title": ": ".join(above.values()) or name, "place": place}
            )


_HEADINGS = ("h1", "h2", "h3", "h4")
_TITLE = 120
"""Characters of a heading that stand above its text; an HTML page may lack the end of one."""
_FRONT_MATTER = re.compile(r"\A---\n(.*?\n)---(?:\n|\Z)", re.DOTALL)
"""What Markdown for websites begins with: text, but not a heading."""
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


def _read_word(path: Path, source: str) -> Iterator[Document | str]:
    import mammoth

    try:
        with path.open("rb") as file:
            read = mammoth.convert_to_html(file, style_map=_WORD_STYLES)
    except OSError:
        raise
    except Exception as exc:  # of zipfile, of XML
        reason = first_line(exc)
        raise ValueError(f"broken, locked, or no Word document ({reason})") from exc
    yield from _split_html(read.value.encode(), path.stem)
    yield from (f"{source}: {told.message}" for told in read.messages if "ignored" in told.message)


_WORD_STYLES = """
p[style-name='Title'] => h1:fresh
p[style-name='Heading 1'] => h2:fresh
p[style-name='Heading 2'] => h3:fresh
p[style-name='Heading 3'] => h4:fresh
"""
"""The title of a document is above its headings; mammoth would make a section of it."""


def _split_html(html: bytes, name: str) -> Iterator[Document]:
    """Yield the sections between headings, tables and lists as Markdown."""
    from bs4 import BeautifulSoup
    from bs4.element import PreformattedString
    from markdownify import MarkdownConverter

    soup = BeautifulSoup(html, "html.parser")  # which finds the encoding, too
    title = soup.title.get_text(" ", strip=True) if soup.title else ""
    for tag in soup.find_all(["head", "script", "style", "template", "nav"]):
        tag.decompose()
    for declaration in soup.find_all(string=lambda text: isinstance(text, PreformattedString)):
        declaration.extract()
    for tag in soup.find_all(_BLOCKS):
        tag.name = "div"
    converter = MarkdownConverter(
        heading_style="ATX",
        strip=["a", "img"],
        escape_asterisks=False,
        escape_underscores=False,
        table_infer_header=True,
    )
    text = converter.convert_soup(soup).replace("\xad", "")  # a soft hyphen divides no word
    yield from _split_markdown(text, title or name)


_BLOCKS = ("aside", "button", "details", "footer", "form", "header", "main", "option", "summary")
"""What a browser sets apart and markdownify joins to the words before it."""


def _read_table(path: Path, source: str) -> Iterator[Document | str]:
    """Yield each row that has a value as lines of "column: value"."""
    header, _, _ = (text := _decode(path)).partition("\n")
    delimiter = max(",;\t|", key=header.count)
    rows = csv.reader(io.StringIO(text), delimiter=delimiter, skipinitialspace=True)
    number = 0
    try:
        names = next(rows, [])
        for number, row in enumerate(filter(any, rows), 1):
            cells = [
                (name, value) for name, value in zip_longest(names, row, fillvalue="") if value
            ]
            text = "\n".join(f"{name}: {value}" if name else value for name, value in cells)
            title = f"{path.stem}: {textwrap.shorten(cells[0][1], 60)}"
            yield Document(text, metadata={"title": title, "place": f"row {number}"})
    except csv.Error as exc:
        yield f"{source}: row {number + 1} and all after it: {exc}"


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
