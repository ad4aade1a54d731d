"""This checkout against another one, in turn: tokens per second, and what a search waits.

    git worktree add ../before <commit>
    python tests/benchmarks/versus.py ../before

Both load the same random weights of the 300M model's widths, each in a process that sleeps
while the other computes. What counts is the ratio of the medians, this checkout over the other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

WORKER = """
import json, sys, time
from shared_engine import Embedder, Options
import torch
torch.set_num_threads({threads})
embedder = Embedder(Options(model={folder!r}, device="cpu", dtype={dtype!r}))
texts, queries = json.load(open({corpus!r}))
embedder.embed(texts[:4])
for line in sys.stdin:
    begun = time.perf_counter()
    if line == "bulk\\n":
        embedder.embed(texts)
        seconds = [time.perf_counter() - begun]
    else:
        seconds = []
        for query in queries:
            begun = time.perf_counter()
            embedder.embed([query], "query")
            seconds.append(time.perf_counter() - begun)
    print(json.dumps(seconds), flush=True)
"""


def main() -> None:
    """Race the two checkouts and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("other", type=Path, help="the root of the other checkout")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--texts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    asked = parser.parse_args()
    from tests.benchmarks import measuring

    with tempfile.TemporaryDirectory() as name:
        folder = measuring.text_checkpoint(Path(name) / "model", asked.layers)
        source = measuring.Source(folder)
        lengths = measuring.lengths("skewed", asked.texts)
        corpus = Path(name) / "corpus.json"
        corpus.write_text(json.dumps([source.texts(lengths), source.texts([32] * 15, "query")]))
        code = WORKER.format(
            threads=asked.threads, folder=str(folder), dtype=asked.dtype, corpus=str(corpus)
        )
        sides = {"this": start(ROOT, code), "other": start(asked.other.resolve(), code)}
        found: dict[str, dict[str, list[float]]] = {
            kind: {side: [] for side in sides} for kind in ("bulk", "query")
        }
        for round_ in range(asked.rounds + 1):
            for kind, by_side in found.items():
                order = list(sides) if round_ % 2 else list(sides)[::-1]
                for side in order:
                    seconds = ask(sides[side], kind)
                    if round_:  # the first warms up
                        by_side[side].append(statistics.median(seconds))
        for process in sides.values():
            process.communicate()
    for kind, by_side in found.items():
        this, other = (statistics.median(by_side[side]) for side in ("this", "other"))
        ratios = sorted(b / a for a, b in zip(by_side["this"], by_side["other"], strict=True))
        speed = {"bulk": f"{lengths.sum() / this:,.0f} tokens/s", "query": f"{1e3 * this:.1f} ms"}
        print(
            f"{kind}: {speed[kind]}, {other / this:.2f} times as fast as the other "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f} over {len(ratios)} rounds)"
        )


def start(root: Path, code: str) -> subprocess.Popen[str]:
    """Start a worker in a checkout."""
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        env={"PYTHONPATH": str(root), "PATH": "", "HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def ask(process: subprocess.Popen[str], kind: str) -> Any:
    """Let a worker run once; return its seconds."""
    assert process.stdin
    assert process.stdout
    time.sleep(0.2)  # threads of the other one have gone to sleep
    process.stdin.write(f"{kind}\n")
    process.stdin.flush()
    return json.loads(process.stdout.readline())


if __name__ == "__main__":
    main()
