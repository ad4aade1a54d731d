"""Write a report as a table, a chart or JSON."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from shared_engine._lazy import needs_extra
from shared_engine.errors import ConfigurationError

if TYPE_CHECKING:
    from shared_engine.evaluate.measure import Report, Row

SHOWN = "nDCG@10"
"""The measure with its interval in the table and on the chart's vertical axis."""


def write_table(report: Report) -> str:
    """Return a report as text: the data, a Markdown table, and omissions."""
    data = report.data
    size = f"{data['documents']:,} documents, {data['queries']:,} queries"
    lines = [f"{data['folder']} ({data['split']}): {size}"]
    if counts := data["irregularities"]:
        lines.append("; ".join(f"{name}: {count:,}" for name, count in counts.items()))
    measures = report.rows[0].figures
    head = [
        "model",
        "dimensions",
        "type",
        "bytes",
        *measures,
        f"{SHOWN}, 95 %",
        "against the first",
        "s/query",
    ]
    cells = [head, ["---", *["---:"] * (len(head) - 1)], *map(_cells, report.rows)]
    cells[2][-2] = ""  # the first row against itself
    columns = [column for column in zip(*cells, strict=True) if any(column[2:])]
    widths = [max(map(len, column)) for column in columns]
    lines.append("")
    for row in zip(*columns, strict=True):
        padded = [row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]
        lines.append(f"| {' | '.join(padded)} |")
    lines += ["", *(f"Left out: {reason}" for reason in report.left_out)]
    return "\n".join(lines).rstrip()


def _cells(row: Row) -> list[str]:
    shown, difference = row.figures[SHOWN], row.differences[SHOWN]
    return [
        row.label,
        "" if row.dimensions is None else f"{row.dimensions}",
        row.embedding_type or "",
        "" if row.bytes_per_vector is None else f"{row.bytes_per_vector:,}",
        *(f"{figure.value:.3f}" for figure in row.figures.values()),
        f"{shown.low:.3f} to {shown.high:.3f}",
        f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})",
        "" if row.seconds_per_query is None else f"{row.seconds_per_query:.3f}",
    ]


def write_json(report: Report, path: Path) -> None:
    """Write a report to a file."""
    path.write_bytes(orjson.dumps(report.to_dict(), option=orjson.OPT_INDENT_2) + b"\n")


def check_plot(path: Path) -> None:
    """Check that a chart can be drawn to a file, before anything is computed.

    Raises:
        ConfigurationError: its suffix is neither .svg nor .png.
        MissingExtraError: matplotlib is not installed.
    """
    if path.suffix.lower() not in (".svg", ".png"):
        raise ConfigurationError(f"--plot {path}: expected a name with suffix .svg or .png")
    with needs_extra("evaluate"):
        import matplotlib  # noqa: F401


def draw_plot(report: Report, path: Path) -> None:
    """Draw quality by bytes per vector: a line for each model, stage and type, and for BM25."""
    import matplotlib as mpl
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter

    lines: dict[str, list[Row]] = {}
    for row in report.rows:
        lines.setdefault(" ".join(filter(None, (row.label, row.embedding_type))), []).append(row)
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
            style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 2}
            axes.errorbar(sizes, heights, yerr=(below, above), label=label, **style)
            style = {"xytext": (5, 4), "textcoords": "offset points", "fontsize": 7}
            for row, size, height in zip(rows, sizes, heights, strict=True):
                axes.annotate(f"{row.dimensions}", (size, height), **style)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.set_xlabel("bytes per vector (labels: dimensions)")
        axes.set_ylabel(f"{SHOWN} and its 95 % interval")
        axes.set_title(
            f"{report.data['folder']}: {report.data['documents']:,} documents, "
            f"{report.data['queries']:,} queries",
            fontsize=10,
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
        undated = {"Date": None} if path.suffix.lower() == ".svg" else None
        canvas.savefig(path, dpi=150, metadata=undated)
