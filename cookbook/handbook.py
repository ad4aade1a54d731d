"""Write a handbook as PDFs: real pages that any machine can make.

Of Python's standard library, a PDF for each chapter, a page for each module: its docstring, and a
bar chart of its longest classes and functions, which is in no text. Of this package, a table, a
chart, a form, and a scan without any text. The same versions write the same bytes.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from PIL import Image

from shared_engine.catalogue import CATALOGUE
from shared_engine.images.pages import open_pages

CHAPTERS = {
    "files": ("tempfile", "fileinput", "shelve", "plistlib", "mimetypes", "zipfile"),
    "network": ("urllib.request", "http.client", "http.server", "socketserver", "smtplib", "ssl"),
    "text": ("argparse", "configparser", "json", "difflib", "tokenize", "xml.etree.ElementTree"),
    "numbers": ("statistics", "heapq", "colorsys", "wave", "timeit", "uuid"),
}
_FONTS = {"C": "Courier", "H": "Helvetica", "B": "Helvetica-Bold"}  # every reader has them
_WIDTH, _HEIGHT, _MARGIN = 595, 842, 50  # A4, in points
_COLUMNS, _LINES, _LEADING = 91, 44, 11.5
_BARS, _BAR = 8, 19
_THROUGHPUT = {"this engine": 1273, "sentence-transformers": 831, "padded transformers": 370}
_THROUGHPUT_NOTE = (
    "Texts of 16 to 512 tokens, log-normal, random weights of the 300M's widths, float32, on an "
    "Intel Xeon at 2.80 GHz. Higher is better. sentence-transformers is shown at its best batch "
    "size. From tests/benchmarks/README.md."
)
Field = tuple[str, str, tuple[int, int, int, int]]
"""A form's field: name, value, and rectangle in points."""


def write(folder: Path) -> list[Path]:
    """Write the PDFs into a folder and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chapter, modules in CHAPTERS.items():
        path = folder / f"{chapter}.pdf"
        path.write_bytes(_pdf([_page(module) for module in modules]))
        paths.append(path)
    return paths


def write_reports(folder: Path) -> list[Path]:
    """Write what there is about this package beside its guide: a table, a chart, a form, a scan."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = _form_fields()
    contents = {
        "models": [_table()],
        "throughput": [_bars("Tokens per second on two CPU cores", _THROUGHPUT, _THROUGHPUT_NOTE)],
        "model-request": [_form(fields)],
    }
    paths = []
    for name, pages in contents.items():
        paths.append(folder / f"{name}.pdf")
        paths[-1].write_bytes(_pdf(pages, fields if name == "model-request" else ()))
    return [*paths, _scan(paths[-1], folder / "scanned-request.pdf")]


def _table() -> bytes:
    """Return a page with the catalogue's models as a table."""
    top = _HEIGHT - _MARGIN
    drawn = [_text("B", 20, _MARGIN, top - 15, "The models at a glance")]
    intro = (
        "Length of a full vector, the shorter lengths that a model was trained for, the most "
        "tokens of a text, layers of the language model, and what can be embedded."
    )
    drawn += _paragraph(intro, top - 45)
    columns = (_MARGIN, 250, 300, 410, 460, 500)
    heads = ("Model", "Values", "Shorter", "Tokens", "Layers", "Takes")
    rows = [
        (
            *(model.name.removeprefix("nvidia/"), f"{model.hidden_size}"),
            ", ".join(map(str, model.dimensions)) or "none",
            *(f"{model.max_tokens}", f"{model.num_hidden_layers}"),
            "text and images" if model.is_multimodal else "text",
        )
        for model in CATALOGUE
        if model.task == "embed"
    ]
    for row, cells in enumerate([heads, *rows]):
        y = top - 95 - 22 * row
        drawn += [
            _text("H" if row else "B", 8, x, y, cell)
            for x, cell in zip(columns, cells, strict=True)
        ]
        drawn.append(f"{_MARGIN} {y - 7} m {_WIDTH - _MARGIN} {y - 7} l 0.5 w S")
    return "\n".join(drawn).encode()


def _paragraph(text: str, top: float, font: str = "H") -> list[str]:
    lines = textwrap.wrap(text, _COLUMNS)
    return [_text(font, 10, _MARGIN, top - 14 * row, line) for row, line in enumerate(lines)]


def _form_fields() -> list[Field]:
    """Return name, value and rectangle of each field."""
    rows = {
        "Your name": "A. Example",
        "Model": "llama-nemotron-embed-1b-v2",
        "Number of documents": "1,200,000",
        "Vector length": "1024",
        "Graphics cards": "2",
        "Needed from": "1 March",
    }
    return [
        (name, value, (230, 640 - 40 * row, _WIDTH - _MARGIN, 662 - 40 * row))
        for row, (name, value) in enumerate(rows.items())
    ]


def _form(fields: list[Field]) -> bytes:
    """Return a page with the labels of a form; a reader draws what is filled in."""
    top = _HEIGHT - _MARGIN
    drawn = [_text("B", 20, _MARGIN, top - 15, "Request for an embedding model")]
    drawn += _paragraph(
        "Fill in this form to have a model installed for your team. Give it to the people who "
        "operate the servers; they answer within five working days.",
        top - 45,
    )
    for name, _, (left, bottom, right, upper) in fields:
        drawn += [
            _text("H", 11, _MARGIN, bottom + 6, name),
            f"0.6 G {left} {bottom} {right - left} {upper - bottom} re S 0 G",
        ]
    drawn.append(_text("H", 9, _MARGIN, 370, "Signature of the head of the department:"))
    return "\n".join(drawn).encode()


def _scan(source: Path, target: Path) -> Path:
    """Write the first page of a PDF as a scanner would: a grey picture, a little askew."""
    with open_pages(source) as pages:
        page = pages.read(0, "picture").picture
    assert page is not None
    askew = page.convert("L").rotate(1.2, fillcolor=255, resample=Image.Resampling.BICUBIC)
    then = time.gmtime(0)  # else the file has the time of writing
    askew.save(target, "PDF", resolution=150, quality=60, creationDate=then, modDate=then)
    return target


def _bars(title: str, values: dict[str, int], note: str) -> bytes:
    """Return a page with a bar chart."""
    top = _HEIGHT - _MARGIN
    drawn = [_text("B", 20, _MARGIN, top - 15, title), *_paragraph(note, top - 45)]
    for row, (name, value) in enumerate(values.items()):
        y, length = top - 180 - 40 * row, 280 * value / max(values.values())
        drawn += [
            _text("H", 10, _MARGIN, y + 8, name),
            f"0.46 0.73 0 rg 220 {y} {length:.1f} 26 re f 0 g",
            _text("H", 10, 226 + length, y + 8, f"{value:,}"),
        ]
    return "\n".join(drawn).encode()


def _page(module: str) -> bytes:
    """Return the content of a page: what to draw, in PDF's operators."""
    source = Path(sysconfig.get_path("stdlib"), *module.split("."))
    path = source / "__init__.py" if source.is_dir() else source.with_suffix(".py")
    tree = ast.parse(path.read_bytes())
    kinds = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    sizes = {
        node.name: (node.end_lineno or node.lineno) - node.lineno + 1
        for node in tree.body
        if isinstance(node, kinds)
    }
    longest = sorted(sizes.items(), key=lambda item: -item[1])[:_BARS]
    lines = (
        part for line in (ast.get_docstring(tree) or "").splitlines() for part in _wrapped(line)
    )
    top = _HEIGHT - _MARGIN
    drawn = [_text("B", 20, _MARGIN, top - 15, module)]
    drawn += [
        _text("C", 9, _MARGIN, top - 45 - _LEADING * row, line)
        for row, line in enumerate(islice(lines, _LINES))
    ]
    drawn.append(_text("H", 10, _MARGIN, 205, "Lines of code of its longest classes and functions"))
    for row, (name, size) in enumerate(longest):
        y, length = 180 - _BAR * row, 300 * size / longest[0][1]
        drawn += [
            _text("H", 9, _MARGIN, y + 4, name),
            f"0.46 0.73 0 rg 200 {y} {length:.1f} {_BAR - 5} re f 0 g",
            _text("H", 9, 205 + length, y + 4, f"{size:,}"),
        ]
    return "\n".join(drawn).encode()


def _wrapped(line: str) -> list[str]:
    return textwrap.wrap(line, _COLUMNS, drop_whitespace=False) or [""]


def _text(font: str, size: int, x: float, y: float, text: str) -> str:
    code = text.encode("cp1252", "replace").hex()
    return f"BT /{font} {size} Tf {x:.1f} {y:.1f} Td <{code}> Tj ET"


def _pdf(contents: list[bytes], fields: Sequence[Field] = ()) -> bytes:
    """Return a PDF with a page for each content; a form's fields are on the first."""
    fonts = " ".join(
        f"/{key} << /Type /Font /Subtype /Type1 /BaseFont /{name} /Encoding /WinAnsiEncoding >>"
        for key, name in _FONTS.items()
    )
    kids = " ".join(f"{3 + 2 * page} 0 R" for page in range(len(contents)))
    first = 3 + 2 * len(contents)  # object of the first field
    known = f"[{' '.join(f'{first + i} 0 R' for i in range(len(fields)))}]"
    form = f" /AcroForm << /Fields {known} /DA (/H 11 Tf 0 g) >>" if fields else ""
    objects = [
        f"<< /Type /Catalog /Pages 2 0 R{form} >>".encode(),
        f"<< /Type /Pages /Kids [{kids}] /Count {len(contents)} /MediaBox [0 0 {_WIDTH} {_HEIGHT}]"
        f" /Resources << /Font << {fonts} >> >> >>".encode(),
    ]
    for page, content in enumerate(contents):
        annotations = f" /Annots {known}" if fields and not page else ""
        objects += [
            b"<< /Type /Page /Parent 2 0 R /Contents %d 0 R%b >>"
            % (len(objects) + 2, annotations.encode()),
            b"<< /Length %d >>\nstream\n%b\nendstream" % (len(content), content),
        ]
    objects += [
        f"<< /Type /Annot /Subtype /Widget /FT /Tx /T ({name}) /V ({value}) /DA (/H 11 Tf 0 g)"
        f" /Rect [{' '.join(map(str, rectangle))}] >>".encode()
        for name, value, rectangle in fields
    ]
    out, entries = b"%PDF-1.4\n", b""
    for number, body in enumerate(objects, 1):
        entries += b"%010d 00000 n \n" % len(out)
        out += b"%d 0 obj\n%b\nendobj\n" % (number, body)
    size = len(objects) + 1
    return out + (
        b"xref\n0 %d\n0000000000 65535 f \n%btrailer\n<< /Size %d /Root 1 0 R >>\n"
        b"startxref\n%d\n%%%%EOF\n" % (size, entries, size, len(out))
    )
