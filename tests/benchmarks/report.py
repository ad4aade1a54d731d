"""What a run of the suite says: bars met or missed, the tables of README.md here, a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.benchmarks.measuring import OURS, PEER

BEGIN = "<!-- measured: written by `python tests/benchmarks/suite.py --readme` -->"
END = "<!-- end of measured -->"
CORPORA = {
    "skewed": "16 to 512, log-normal",
    "short": "8 to 32, like queries",
    "uniform": "512",
    "long": "8,192",
}


def bars(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return what the project holds itself to, with what was measured."""
    out = []

    def bar(what: str, measured: float, least: float, most: float) -> None:
        wanted = f"at least {least}" if least else f"at most {most}"
        text = f"{what}: {measured:.2f}, wanted {wanted}"
        out.append({"text": text, "met": least <= measured <= most})

    if text := result.get("text"):
        ours = {kind: race["rows"][OURS] for kind, race in text.items()}
        bar("skewed text, times sentence-transformers", ours["skewed"]["ratio"], 1.4, 1e9)
        bar("skewed text, share of the GEMM peak", ours["skewed"]["of_peak"], 0.5, 1e9)
        bar("skewed text, tokens computed / real", ours["skewed"]["waste"], 0, 1.0)
        for kind in ("uniform", "long"):
            bar(f"{kind} text, times sentence-transformers", ours[kind]["ratio"], 1.0, 1e9)
    if latency := result.get("latency"):
        bar("query p99 during an ingest, in steps", latency[OURS]["p99_steps"], 0, 3.0)
    for figures in result.get("images", {}).values():
        what = f"{figures['tiles']} tiles: 16 cores' decoded pages to an H100's need, projected"
        bar(what, figures["cores_to_h100"], 1.0, 1e9)
    return out


def tables(result: dict[str, Any]) -> str:
    """Return the tables of one run, in Markdown."""
    versions = result["versions"]
    model = f"weights of {result['weights']}"
    if result["weights"] == "random":
        model = "random weights of the true widths"
        if layers := result.get("layers"):
            model += f" ({layers} of the 300M model's 9 layers)" if layers < 9 else ""
    out = [
        f"{result['date']}, {result['device']}, {result.get('engine', '').partition(' (')[0]}; "
        f"{model}; torch {versions['torch']}, sentence-transformers "
        f"{versions['sentence-transformers']}, transformers {versions['transformers']}. "
        f"`{result['command']}`"
    ]
    if text := result.get("text"):
        out += ["", *_text(text)]
    if tuning := result.get("tuning"):
        out += ["", _tuning(tuning)]
    if latency := result.get("latency"):
        out += ["", *_latency(latency)]
    if start := result.get("start"):
        out += ["", *_start(start)]
    if images := result.get("images"):
        out += ["", *_images(images)]
    return "\n".join(out)


def _text(text: dict[str, Any]) -> list[str]:
    rounds = next(iter(text.values()))["rounds"]
    out = [
        f"Tokens per second, contenders in turn, medians of {rounds} rounds (waste: tokens computed"
        " / real; range over the rounds):",
        "",
        "| tokens per text | this engine | of GEMM peak | waste | sentence-transformers at its best"
        " | padded transformers | times sentence-transformers |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, race in text.items():
        rows, best = race["rows"], race["best_peer"]
        ours, theirs = rows[OURS], rows[best]
        padded = [row for name, row in rows.items() if name.startswith("transformers")]
        cells = [
            CORPORA[kind],
            f"{ours['tokens_per_second']:,.0f}",
            f"{ours['of_peak']:.2f}",
            f"{ours['waste']:.2f}",
            f"{theirs['tokens_per_second']:,.0f} ({best.partition(', ')[2]}, waste "
            f"{theirs['waste']:.2f})",
            f"{padded[0]['tokens_per_second']:,.0f} (waste {padded[0]['waste']:.2f})"
            if padded
            else "out of memory",
            f"**{ours['ratio']:.2f}** ({ours['ratios'][0]:.2f} to {ours['ratios'][1]:.2f})",
        ]
        out.append(f"| {' | '.join(cells)} |")
    others = [row for race in text.values() for row in race["rows"].values()]
    largest = max(row["difference"] for row in others)
    out += [
        "",
        f"The vectors of all contenders agree to {largest:.0e} in every value of unit vectors.",
    ]
    return out


def _tuning(tuning: dict[str, Any]) -> str:
    ratios = [f"{name} {row['ratio']:.2f}" for name, row in tuning["rows"].items() if name != OURS]
    return f"On mixed lengths, times the engine as it is by default: {', '.join(ratios)}."


def _latency(latency: dict[str, Any]) -> list[str]:
    step = latency["step_seconds"]
    out = [
        f"A query of {latency['query_tokens']} tokens, in ms, {latency['queries']} of them; a full "
        f"step of {latency['max_batch_tokens']:,} tokens takes {_shorten(1000 * step)} ms:",
        "",
        "| | alone p50, p95, p99 | during an ingest p50, p95, p99 | p99 in steps "
        "| the ingest keeps |",
        "|---|---|---|---|---|",
    ]
    for name, row in latency.items():
        if isinstance(row, dict):
            kept = row["bulk_tokens_per_second"] / row["bulk_tokens_per_second_alone"]
            spans = [
                ", ".join(_shorten(1000 * value) for value in row[when].values())
                for when in ("alone", "during")
            ]
            out.append(f"| {name} | {' | '.join(spans)} | {row['p99_steps']:.1f} | {kept:.0%} |")
    return out


def _shorten(number: float) -> str:
    """Return a number with two digits at least, and none behind the point that nobody needs."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def _start(start: dict[str, Any]) -> list[str]:
    out = [
        f"A fresh process, files cached; peak memory with {start['texts']} texts, log-normal:",
        "",
        "| | seconds to the first vector | peak memory, GB |",
        "|---|---|---|",
    ]
    for name in (OURS, PEER):
        row = start[name]
        gpu = f", {row['gpu_peak_mb'] / 1000:.2f} on the GPU" if row["gpu_peak_mb"] else ""
        out.append(f"| {name} | {row['ready']:.1f} | {row['peak_mb'] / 1000:.2f}{gpu} |")
    return out


def _images(images: dict[str, Any]) -> list[str]:
    tower, llama = images["1"]["layers"]
    out = [
        f"Pages of 1275 x 1650 pixels as PNG; {tower} of the 1.7B model's 27 layers in the tower, "
        f"{llama} of the 16 after it. The last column is projected: the pages that 16 such cores "
        "decode a second, over those that an H100 computes at 0.55 of its peak, all layers:",
        "",
        "| tiles with the thumbnail | pages/s | of GEMM peak | cutting, tower, language model | "
        "one core cuts | one core decodes, for a GPU that cuts | 16 cores to an H100's need |",
        "|---|---|---|---|---|---|---|",
    ]
    for figures in images.values():
        seconds = figures["seconds"]
        parts = [seconds[name] for name in ("prepare png", "tower", "language model")]
        shares = ", ".join(f"{part / sum(parts):.0%}" for part in parts)
        out.append(
            f"| {figures['tiles']} | {1 / seconds['whole png']:.2f} | {figures['of_peak']:.2f} "
            f"| {shares} | {1000 * seconds['prepare png']:.0f} ms "
            f"| {1000 * seconds['decode png']:.0f} ms | {figures['cores_to_h100']:.1f} |"
        )
    return out


def write_readme(path: Path, results: list[Path]) -> None:
    """Replace what is between the two marks with the tables of these files, and their plots."""
    head, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, tail = rest.partition(END)
    block = []
    for file in results:
        result = json.loads(file.read_text(encoding="utf-8"))
        block.append(tables(result))
        if "text" in result:
            svg = file.with_suffix(".svg")
            svg.write_text(plot(result), encoding="utf-8")
            block.append(f"![Tokens per second]({svg.relative_to(path.parent).as_posix()})")
    content = "\n\n".join(block)
    path.write_text(f"{head}{BEGIN}\n{content}\n{END}{tail}", encoding="utf-8")


def plot(result: dict[str, Any]) -> str:
    """Return an SVG: tokens a second of each contender, as multiples of sentence-transformers."""
    contenders = {
        OURS: "#76b900",
        PEER: "#9a9a9a",
        "transformers": "#cfcfcf",
    }
    bars, y = [], 66
    for kind, race in result["text"].items():
        bars.append(f'<text x="150" y="{y + 26}" text-anchor="end">{CORPORA[kind]}</text>')
        for name, colour in contenders.items():
            rows = [row for key, row in race["rows"].items() if key.startswith(name)]
            ratio = max((row["ratio"] for row in rows), default=0.0)
            bars.append(
                f'<rect x="160" y="{y}" width="{160 * ratio:.0f}" height="12" fill="{colour}"/>'
                f'<text x="{166 + 160 * ratio:.0f}" y="{y + 10}">{ratio:.2f}</text>'
            )
            y += 13
        y += 16
    legend = "".join(
        f'<rect x="{x}" y="44" width="10" height="10" fill="{colour}"/>'
        f'<text x="{x + 14}" y="53">{name}</text>'
        for x, (name, colour) in zip((160, 250, 400), contenders.items(), strict=True)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="640" height="{y}" '
        'font-family="sans-serif" font-size="11">\n'
        f'<rect width="640" height="{y}" fill="white"/>\n'
        '<text x="10" y="16" font-weight="bold">Tokens per second, as multiples of '
        "sentence-transformers at its best batch size</text>\n"
        f'<text x="10" y="32">{result["device"]}, by tokens a text</text>\n'
        f"{legend}\n" + "\n".join(bars) + "\n</svg>\n"
    )
