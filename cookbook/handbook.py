"""Write a handbook of Python's standard library as PDFs: real pages that any machine can make.

A PDF for each chapter, a page for each module: its docstring, and a bar chart of its longest
classes and functions, which is in no text. The same Python writes the same bytes.
"""

from __future__ import annotations

import ast
import sysconfig
import textwrap
from itertools import islice
from pathlib import Path

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


def write(folder: Path) -> list[Path]:
    """Write the PDFs into a folder and return them."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for chapter, modules in CHAPTERS.items():
        path = folder / f"{chapter}.pdf"
        path.write_bytes(_pdf([_page(module) for module in modules]))
        paths.append(path)
    return paths


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


def _pdf(contents: list[bytes]) -> bytes:
    """Return a PDF with a page for each content."""
    fonts = " ".join(
        f"/{key} << /Type /Font /Subtype /Type1 /BaseFont /{name} /Encoding /WinAnsiEncoding >>"
        for key, name in _FONTS.items()
    )
    kids = " ".join(f"{3 + 2 * page} 0 R" for page in range(len(contents)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{kids}] /Count {len(contents)} /MediaBox [0 0 {_WIDTH} {_HEIGHT}]"
        f" /Resources << /Font << {fonts} >> >> >>".encode(),
    ]
    for content in contents:
        objects += [
            b"<< /Type /Page /Parent 2 0 R /Contents %d 0 R >>" % (len(objects) + 2),
            b"<< /Length %d >>\nstream\n%b\nendstream" % (len(content), content),
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
