"""Read a folder of Markdown and PDF as sections that an answer can name as its source."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path

from langchain_core.documents import Document


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
    for path in sorted(folder.rglob("*")):
        read = readers.get(path.suffix.lower())
        if read is None or not path.is_file():
            continue
        source = path.relative_to(folder).as_posix()
        try:
            found = list(read(path))
        except (OSError, ValueError) as exc:
            left_out.append(f"{source}: {exc}")
            continue
        for number, section in enumerate(found):
            section.metadata |= {"source": source, "section": f"{source}#{number}"}
        left_out += [f"{source}: {s.metadata['place']} has no text" for s in found if _is_blank(s)]
        sections += [section for section in found if not _is_blank(section)]
    if not sections:
        reasons = "".join(f"\n  {reason}" for reason in left_out)
        raise FileNotFoundError(f"{folder} has no .md, .txt or .pdf with text in it{reasons}")
    return sections, left_out


def _is_blank(section: Document) -> bool:
    return not section.page_content.strip()


def _read_markdown(path: Path) -> Iterator[Document]:
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


def _read_pdf(path: Path) -> Iterator[Document]:
    """Yield the text layer of each page; a scanned page has an empty one."""
    import pypdfium2

    try:
        pdf = pypdfium2.PdfDocument(path)
    except pypdfium2.PdfiumError as exc:
        raise ValueError(f"not a PDF that can be read ({exc})") from exc
    with pdf:
        for number, page in enumerate(pdf, 1):
            text = page.get_textpage().get_text_bounded().replace("\r\n", "\n")
            first = next((line.strip() for line in text.splitlines() if line.strip()), "")
            title = f"{path.stem}: {textwrap.shorten(first, 60)}"
            yield Document(text, metadata={"title": title, "place": f"page {number}"})
