"""Write a report as a table or a chart."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shared_engine._lazy import needs_extra

if TYPE_CHECKING:
    from shared_engine.evaluate.measure import Report, Row

SHOWN = "nDCG@10"
"""The measure with its interval in the table and on the chart's vertical axis."""
_DIFFERENCE = "against the first"


def write_table(report: Report) -> str:
    """Return a report as text: the data, a Markdown table, and omissions."""
    data = report.data
    size = f"{data['documents']:,} documents, {data['queries']:,} queries"
    lines = [f"{data['folder']} ({data['split']}): {size}"]
    if counts := data["irregularities"]:
        lines.append("; ".join(f"{name}: {count:,}" for name, count in counts.items()))
    rows = list(map(_cells, report.rows))
    rows[0][_DIFFERENCE] = ""  # the first row against itself
    lines += ["", format_table(rows), "", *(f"Left out: {reason}" for reason in report.left_out)]
    return "\n".join(lines).rstrip()


def format_table(rows: Sequence[dict[str, str]]) -> str:
    """Return rows of equal keys as a Markdown table, without empty columns."""
    shown = [name for name in rows[0] if any(row[name] for row in rows)]
    columns = [[name, "---:", *(row[name] for row in rows)] for name in shown]
    columns[0][1] = "---"
    widths = [max(map(len, column)) for column in columns]
    padded = (
        [cells[0].ljust(widths[0]), *map(str.rjust, cells[1:], widths[1:])]
        for cells in zip(*columns, strict=True)
    )
    return "\n".join(f"| {' | '.join(cells)} |" for cells in padded)


def _cells(row: Row) -> dict[str, str]:
    shown, difference = row.figures[SHOWN], row.differences[SHOWN]
    return {
        "model": row.label,
        "dimensions": "" if row.dimensions is None else f"{row.dimensions}",
        "type": row.embedding_type or "",
        "bytes": "" if row.bytes_per_vector is None else f"{row.bytes_per_vector:,}",
        **{name: f"{figure.value:.3f}" for name, figure in row.figures.items()},
        f"{SHOWN}, 95 %": f"{shown.low:.3f} to {shown.high:.3f}",
        _DIFFERENCE: f"{difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})",
        "s/query": "" if row.seconds_per_query is None else f"{row.seconds_per_query:.3f}",
    }


def draw_plot(report: Report, path: Path) -> None:
    """Draw quality by bytes per vector: a line for each model, stage and type, and for BM25."""
    with needs_extra("evaluate"):
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
