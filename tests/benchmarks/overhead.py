"""What the package costs beside the model: time outside the forward, imports, memory of a stream.

    python tests/benchmarks/overhead.py                    # the stand-in
    python tests/benchmarks/overhead.py --tiny             # a random model of 64 dimensions

- `outside` is the wall time of a call less the time inside the encoder, of which at most one runs
  at a time: tokenising that was not hidden behind it, queueing, conversion, the framework. With
  `--tiny` the forward is next to nothing: little is hidden, and the figure is an upper bound.
- Lists are what the frameworks return; their conversion is also timed alone, at 2048 values.
- An import is timed in fresh interpreters, in CPU seconds, the least of several.
- Memory is that of the process, at the first batch of a long stream through a tiny model, and at
  its most after it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import Embedder, Options
from tests.benchmarks.measuring import Timed
from tests.support.checkpoints import SHAPES, build_checkpoint

ROOT = Path(__file__).parents[2]
WIDTH = 2048
IMPORTS = {
    "packages alone": ("import langchain_core.embeddings", "import langchain_nemoretriever"),
    "langchain": (
        "from langchain_core.embeddings import Embeddings",
        "from langchain_nemoretriever import NeMoRetrieverEmbeddings",
    ),
    "llamaindex": (
        "from llama_index.core.embeddings import MultiModalEmbedding",
        "from llamaindex_nemoretriever import NeMoRetrieverEmbedding",
    ),
}


def texts(count: int) -> Iterator[str]:
    """Yield short texts, no two alike."""
    return (f"Short passage {i} about nothing in particular, as titles are." for i in range(count))


def outside(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a row for each way in: wall time, time in the forward, what is left of it."""
    documents = list(texts(args.texts))
    langchain = NeMoRetrieverEmbeddings(model=args.checkpoint)
    llamaindex = NeMoRetrieverEmbedding(model=args.checkpoint)
    ways: dict[str, Callable[[], Any]] = {
        "Embedder.embed": lambda: langchain.embedder.embed(documents),
        "Embedder.stream": lambda: list(langchain.embedder.stream(documents)),
        "LangChain": lambda: langchain.embed_documents(documents),
        "LlamaIndex": lambda: llamaindex.get_text_embedding_batch(documents),
    }
    encoders = langchain.embedder.load()._encoders
    encoders[0] = forward = Timed(encoders[0], encoders[0].device)
    rows: dict[str, dict[str, Any]] = {}
    langchain.embed_query("warm up")
    for _ in range(args.rounds):
        for name, run in ways.items():
            forward.spans.clear()
            start = time.perf_counter()
            run()
            wall = time.perf_counter() - start
            left = wall - sum(forward.spans)
            row = {
                "name": name,
                "wall": wall,
                "forward": sum(forward.spans),
                "outside": left / wall,
                "us_per_text": left / args.texts * 1e6,
            }
            rows[name] = min(rows.get(name, row), row, key=lambda each: each["us_per_text"])
    return list(rows.values())


def conversion(count: int) -> float:
    """Return the microseconds that one vector of 2048 values takes to become a list."""
    array = np.random.default_rng(0).random((count, WIDTH), np.float32)
    start = time.perf_counter()
    _ = [row.tolist() for row in array]
    return (time.perf_counter() - start) / count * 1e6


def imports(rounds: int) -> dict[str, dict[str, float]]:
    """Return the CPU seconds of each framework's import and of ours, and their ratio."""

    def seconds(code: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    best = {code: float("inf") for pair in IMPORTS.values() for code in pair}
    for _ in range(rounds):
        for code, least in best.items():
            best[code] = min(least, seconds(code))
    return {
        name: {"theirs": best[theirs], "ours": best[ours], "ratio": best[ours] / best[theirs]}
        for name, (theirs, ours) in IMPORTS.items()
    }


def memory(checkpoint: Path, count: int) -> tuple[float, float]:
    """Return the MB of the process at the first batch of a stream, and the most at a later one."""
    page = resource.getpagesize()
    embedder = Embedder(Options(model=checkpoint))
    resident = [
        int(Path("/proc/self/statm").read_text().split()[1]) * page / 1e6
        for _ in embedder.stream(texts(count))
    ]
    return resident[0], max(resident)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="folder; default: the stand-in")
    parser.add_argument("--tiny", action="store_true", help="a random model of 64 dimensions")
    parser.add_argument("--texts", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--imports", type=int, default=7, help="interpreters a line; 0 for none")
    parser.add_argument("--stream", type=int, default=20_000, help="texts; 0 for none")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_args()


def main() -> None:
    """Measure and print."""
    args = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        tiny = build_checkpoint(Path(scratch) / "tiny", SHAPES["gqa"], num_hidden_layers=1)
        if args.tiny:
            args.checkpoint = tiny
        elif args.checkpoint is None:
            from cookbook.standin import build

            args.checkpoint = build()
        print(f"{args.texts} short texts, {args.checkpoint.name}, {args.threads} threads\n")
        print(f"{'':20}{'wall s':>10}{'forward s':>11}{'outside':>10}{'us/text':>10}")
        result["outside"] = outside(args)
        for row in result["outside"]:
            print(
                "{name:20}{wall:10.2f}{forward:11.2f}{outside:10.1%}{us_per_text:10.0f}".format(
                    **row
                )
            )
        result["list_us"] = conversion(2000)
        print(f"\na vector of {WIDTH} values to a list: {result['list_us']:.0f} us")
        if args.stream:
            result["memory_mb"] = first, most = memory(tiny, args.stream)
            print(f"\na stream of {args.stream:,}: {first:.1f} MB at first, {most:.1f} at most")
    if args.imports:
        result["imports"] = imports(args.imports)
        print(f"\n{'CPU s of an import':20}{'theirs':>10}{'ours':>11}{'ratio':>10}")
        for name, row in result["imports"].items():
            print(f"{name:20}" + "{theirs:10.3f}{ours:11.3f}{ratio:10.2f}".format(**row))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
