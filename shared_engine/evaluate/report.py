"""A report as a table, a chart and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import orjson

from shared_engine.errors import ConfigurationError, MissingExtraError

if TYPE_CHECKING:
    from shared_engine.evaluate.measure import Report, Row

SHOWN = "nDCG@10"
"""The figure with its interval in the table, and the height in the chart."""


def write_table(report: Report) -> str:
    """Return a report as lines of text: a table in Markdown between what was measured."""
    data = report.data
    names = report.rows[0].figures
    lines = [
        f"{data['folder']} ({data['split']}): {data['documents']:,} documents, "
        f"{data['queries']:,} queries",
    ]
    if data["queries_without_relevant_documents"]:
        lines.append(
            f"{data['queries_without_relevant_documents']:,} other queries have no relevant "
            "document and are left out"
        )
    head = ["model", "dimensions", "type", "bytes", *names, f"{SHOWN}, 95 %", "against the first"]
    cells = [head, ["---", *["---:"] * (len(head) - 1)], *map(_cells, report.rows)]
    cells[2][-1] = ""  # of the first row itself
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines.append("")
    for row in cells:
        padded = [row[0].ljust(widths[0])]
        padded += [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        lines.append(f"| {' | '.join(padded)} |")
    lines += ["", *(f"Left out: {reason}" for reason in report.left_out)]
    return "\n".join(lines).rstrip()


def _cells(row: Row) -> list[str]:
    shown, difference = row.figures[SHOWN], row.differences[SHOWN]
    return [
        row.model,
        "" if row.dimensions is None else f"{row.dimensions}",
        row.embedding_type or "",
        "" if row.bytes_per_vector is None else f"{row.bytes_per_vector:,}",
        *(f"{figure.value:.3f}" for figure in row.figures.values()),
        f"{shown.low:.3f} to {shown.high:.3f}",
        f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})",
    ]


def write_json(report: Report, path: Path) -> None:
    """Write all of a report to a file."""
    path.write_bytes(orjson.dumps(report.to_dict(), option=orjson.OPT_INDENT_2) + b"\n")


def check_plot(path: Path) -> None:
    """Check that a chart can be drawn into a file of this name, before anything is computed.

    Raises:
        ConfigurationError: neither .svg nor .png.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise ConfigurationError(f"--plot {path}: expected a name that ends in .svg or .png")
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"--plot needs {exc.name!r}: pip install 'nemoretriever-embeddings[evaluate]'"
        ) from exc


def draw_plot(report: Report, path: Path) -> None:
    """Draw quality against bytes per vector: a line per model and number type, BM25 across."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter

    lines: dict[str, list[Row]] = {}
    for row in report.rows:
        lines.setdefault(" ".join(filter(None, (row.model, row.embedding_type))), []).append(row)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "nemoretriever"}):
        canvas = Canvas(figsize=(7, 4.2), layout="constrained")
        axes = canvas.subplots()
        for label, rows in lines.items():
            sizes = [row.bytes_per_vector or 0 for row in rows]
            figures = [row.figures[SHOWN] for row in rows]
            if not all(sizes):  # BM25
                axes.axhline(figures[0].value, color="gray", linestyle="--", label=label)
                continue
            heights = [figure.value for figure in figures]
            below = [max(0.0, figure.value - figure.low) for figure in figures]
            above = [max(0.0, figure.high - figure.value) for figure in figures]
            axes.errorbar(
                sizes,
                heights,
                yerr=(below, above),
                marker="o",
                markersize=4,
                capsize=2,
                label=label,
            )
            for row, size, height in zip(rows, sizes, heights, strict=True):
                axes.annotate(
                    f"{row.dimensions}",
                    (size, height),
                    xytext=(5, 4),
                    textcoords="offset points",
                    fontsize=7,
                )
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("bytes per vector (the points: dimensions)")
        axes.set_ylabel(f"{SHOWN}, with its 95 % interval")
        axes.set_title(
            f"{report.data['folder']}: {report.data['documents']:,} documents, "
            f"{report.data['queries']:,} queries",
            fontsize=10,
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        canvas.savefig(path, dpi=150, metadata={"Date": None} if _is_svg(path) else None)


def _is_svg(path: Path) -> bool:
    return path.suffix.lower() == ".svg"
