"""Read a folder of Markdown and PDF as sections that an answer can name as its source."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from langchain_core.documents import Document

from shared_engine import PageError
from shared_engine.images.pages import open_pages, walk


def read(folder: Path) -> tuple[list[Document], list[str]]:
    """Return the sections of every Markdown, text and PDF file, and what had to be left out.

    Its metadata: `source`, the file below the folder; `place`, its heading or page; `title`,
    the headings above it; `section`, which is both and tells it from all others.

    Raises:
        FileNotFoundError: there is no such folder, or nothing to read in it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder of documents")
    readers = {".md": _read_markdown, ".txt": _read_markdown, ".pdf": _read_pdf}
    sections: list[Document] = []
    left_out = []
    for path in map(Path, walk(folder)):
        read = readers.get(path.suffix.lower())
        if read is None or not path.is_file():
            continue
        source = path.relative_to(folder).as_posix()
        try:
            found = list(read(path, source))
        except (OSError, ValueError) as exc:
            left_out.append(str(exc) if isinstance(exc, PageError) else f"{source}: {exc}")
            continue
        for number, section in enumerate(found):
            if isinstance(section, str):
                left_out.append(section)
            elif section.page_content.strip():
                section.metadata |= {"source": source, "section": f"{source}#{number}"}
                sections.append(section)
            else:
                left_out.append(f"{source}: {section.metadata['place']} has no text")
    if not sections:
        reasons = "".join(f"\n  {reason}" for reason in left_out)
        raise FileNotFoundError(f"{folder} has no .md, .txt or .pdf with text in it{reasons}")
    return sections, left_out


def _read_markdown(path: Path, _: str) -> Iterator[Document]:
    """Yield the sections between headings; a file without any is one section."""
    from langchain_text_splitters import MarkdownHeaderTextSplitter

    levels = ["#", "##", "###"]
    splitter = MarkdownHeaderTextSplitter([(level, level) for level in levels])
    for section in splitter.split_text(path.read_text(encoding="utf-8")):
        titles = [section.metadata[level] for level in levels if level in section.metadata]
        place = f'"{titles[-1]}"' if titles else "the whole"
        yield Document(
            section.page_content, metadata={"title": ": ".join(titles) or path.stem, "place": place}
        )


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
