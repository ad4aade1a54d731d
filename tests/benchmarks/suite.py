"""All figures of speed, measured in one run beside what a user would take instead.

    python tests/benchmarks/suite.py                 # half an hour on two cores
    python tests/benchmarks/suite.py --quick         # a small one, into .benchmarks/
    python tests/benchmarks/suite.py --only latency --checkpoint DIR
    python tests/benchmarks/suite.py --readme        # the tables and plots of README.md here

- text: tokens per second on four corpora, in turn with sentence-transformers at several batch sizes
  and with padded transformers, on the same weights; vectors are compared.
- latency: a query of 32 tokens alone and during an ingest, as `search_latency.py` measures it.
- tuning: the engine with other sizes of a step.
- start: a fresh process until its first vector, files cached; peak memory of the same work.
- images: pages per second at one tile and at six with a thumbnail.

A complete run goes to results/, any other to .benchmarks/, written part by part. Linux only.

Without `--checkpoint` the weights are random, of the true widths with few layers. For a CPU; a GPU
has `gpu/run.py`.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared_engine import Embedder, Options
from tests.benchmarks import images, measuring, report, search_latency

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "benchmarks" / "results"
PARTS = ("text", "tuning", "latency", "start", "images")


@dataclass(frozen=True)
class Scale:
    """How much is measured, and how large the models are where they are made up."""

    layers: int
    """Of the 300M model's nine."""
    vision_layers: int
    """Of the 1.7B model's 27 in its tower."""
    image_layers: int
    """Of the 16 after it."""
    texts: dict[str, int]
    """Of each corpus."""
    steps: tuple[int, ...]
    """Tokens a step, beside the default."""
    batch_sizes: tuple[int, ...]
    """Of sentence-transformers."""
    rounds: int
    queries: int
    """Searches in a round."""
    pages: int


NORMAL = Scale(
    layers=2,
    vision_layers=3,
    image_layers=2,
    texts={"skewed": 48, "short": 128, "uniform": 8, "long": 1},
    steps=(1_024, 4_096),
    batch_sizes=(2, 4, 8, 32),
    rounds=5,
    queries=30,
    pages=1,
)


def scale(quick: bool, full: bool) -> Scale:
    """Return the size of a run."""
    if quick:
        fewer = {name: max(1, count // 4) for name, count in NORMAL.texts.items()}
        return replace(NORMAL, texts=fewer, rounds=1, queries=NORMAL.queries // 5)
    if full:
        more = {name: 2 * count for name, count in NORMAL.texts.items()}
        return replace(NORMAL, texts=more, rounds=7, queries=4 * NORMAL.queries)
    return NORMAL


class Bench:
    """The engine and sentence-transformers, loaded from one checkpoint, and texts for both."""

    def __init__(self, options: Options, scratch: Path, size: Scale) -> None:
        folder = Path(options.model)
        self.options, self.folder, self.scratch, self.size = options, folder, scratch, size
        self.embedder = Embedder(options)
        self.description = self.embedder.description
        backend: Any = self.embedder.load()
        self.device, self.dtype = backend._encoders[0].device, backend._dtype
        self.peer_folder = measuring.peer_folder(folder, scratch / "peer")
        self.theirs = measuring.sentence_transformer(self.peer_folder, str(self.device), self.dtype)
        self.source = measuring.Source(folder)
        self.prompts = self.source.prompts
        self.config = json.loads((folder / "config.json").read_text())

    @cached_property
    def best_batch(self) -> int:
        """At which sentence-transformers is fastest on mixed lengths; `text` measures it best."""
        corpus = search_latency.make_corpus(self.source, self.size.texts["skewed"], 1)
        return search_latency.find_best_batch(self.theirs, corpus, self.size.batch_sizes)

    def text(self) -> dict[str, Any]:
        """Return the race on each corpus."""
        engine = measuring.ours(self.embedder)
        batch_sizes = self.size.batch_sizes
        peers = measuring.peers(self.theirs, self.prompts["document"], batch_sizes, 32)
        out = {}
        for kind, count in self.size.texts.items():
            tokens = measuring.lengths(kind, count)
            # Of the batch sizes that hold all texts, one is enough.
            different = 1 + sum(size < count for size in batch_sizes[:-1])
            out[kind] = measuring.race(
                [engine, *peers[:different], peers[-1]],
                self.source.texts(tokens),
                tokens,
                self.size.rounds,
                measuring.Setting(self.config, self.device, self.dtype),
            )
            print(f"\n{kind}: {measuring.table(out[kind])}", flush=True)
        self.best_batch = int(out["skewed"]["best_peer"].rpartition(" ")[2])
        return out

    def tuning(self) -> dict[str, Any]:
        """Return the race of the engine's variants on mixed lengths."""
        tokens = measuring.lengths("skewed", self.size.texts["skewed"])
        setting = measuring.Setting(self.config, self.device, self.dtype)
        contenders = measuring.variants(self.options, self.embedder, self.size.steps)
        out = measuring.race(
            contenders, self.source.texts(tokens), tokens, self.size.rounds, setting
        )
        print(f"\ntuning: {measuring.table(out)}", flush=True)
        return out

    def latency(self) -> dict[str, Any]:
        """Return what a query takes alone and during an ingest, and what that costs the ingest."""
        corpus = search_latency.make_corpus(
            self.source, self.size.texts["skewed"], self.size.queries
        )
        out = search_latency.measure(
            self.embedder, self.theirs, corpus, self.size.rounds, self.best_batch
        )
        print(f"\nlatency: {search_latency.table(out)}", flush=True)
        return out

    def start(self) -> dict[str, Any]:
        """Return seconds to the first vector in fresh processes, and their peak memory."""
        count = max(8, self.size.texts["skewed"] // 4)
        path = self.scratch / "texts.json"
        path.write_text(json.dumps(self.source.texts(measuring.lengths("skewed", count))))
        common = [str(path), "--device", str(self.device)]
        common += ["--dtype", str(self.dtype).removeprefix("torch.")]
        theirs = ["--prompt", self.prompts["document"], "--batch-size", str(self.best_batch)]
        runs = {
            measuring.OURS: ["ours", str(self.folder), *common],
            measuring.PEER: [measuring.PEER, str(self.peer_folder), *common, *theirs],
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
        for _ in range(self.size.rounds):
            for name, arguments in runs.items():
                found[name].append(cold(arguments))
        out: dict[str, Any] = {"texts": count}
        for name, rounds in found.items():
            out[name] = {key: statistics.median(each[key] for each in rounds) for key in rounds[0]}
        print(f"\nfresh process:\n{json.dumps(out, indent=1)}")
        return out


def cold(arguments: list[str]) -> dict[str, float]:
    """Return what one fresh process says, with the seconds until its first vector as `ready`."""
    command = [sys.executable, str(Path(__file__).with_name("cold.py")), *arguments]
    started = time.time()
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    said: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return said | {"ready": said["ready"] - started}


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    effort = parser.add_mutually_exclusive_group()
    effort.add_argument("--quick", action="store_true", help="a quarter of it, one round")
    effort.add_argument("--full", action="store_true", help="twice of it, seven rounds")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--checkpoint", type=Path, help="folder of a text model")
    parser.add_argument("--image-checkpoint", type=Path, help="folder of a multimodal model")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas")
    parser.add_argument("--out", type=Path, help="folder of results")
    parser.add_argument(
        "--readme", action="store_true", help="write only the tables and plots of README.md"
    )
    asked = parser.parse_args()
    asked.only = asked.only.split(",")
    if unknown := set(asked.only) - set(PARTS):
        parser.error(f"--only takes {', '.join(PARTS)}; not {', '.join(unknown)}")
    complete = asked.readme or (set(asked.only) == set(PARTS) and not asked.quick)
    asked.out = asked.out or (RESULTS if complete else ROOT / ".benchmarks")
    return asked


def about(device: torch.device, asked: argparse.Namespace) -> dict[str, Any]:
    """Return what was measured with what."""
    packages = ("torch", "transformers", "sentence-transformers", "tokenizers", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": measuring.device_name(device),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "command": " ".join(["python tests/benchmarks/suite.py", *sys.argv[1:]]),
        "weights": str(asked.checkpoint.name) if asked.checkpoint else "random",
    }


def main() -> None:
    """Measure, print and write; or only write the table."""
    asked = arguments()
    if asked.readme:
        report.write_readme(
            Path(__file__).with_name("README.md"), sorted(asked.out.resolve().glob("*.json"))
        )
        return
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    size = scale(asked.quick, asked.full)
    result = about(torch.device("cpu"), asked)
    asked.out.mkdir(parents=True, exist_ok=True)
    path = asked.out / (re.sub(r"\W+", "-", result["device"].lower()).strip("-") + ".json")

    def add(part: str, figures: Any) -> None:
        result[part] = figures
        path.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        if set(asked.only) - {"images"}:
            folder = asked.checkpoint or measuring.text_checkpoint(scratch / "text", size.layers)
            options = Options(model=str(folder), device="cpu", dtype=asked.dtype)
            bench = Bench(options, scratch, size)
            result["layers"] = bench.config["num_hidden_layers"]
            result["engine"] = bench.description.partition(" on ")[2]
            print(f"{result['device']}: {result['engine']}")
            for part in PARTS[:-1]:
                if part in asked.only:
                    add(part, getattr(bench, part)())
            bench.embedder.close()
            del bench
            gc.collect()
        if "images" in asked.only:
            folder = asked.image_checkpoint or measuring.image_checkpoint(
                scratch / "images", size.vision_layers, size.image_layers
            )
            figures = images.measure(folder, "cpu", asked.dtype, size.pages, size.rounds)
            print("\n".join(["", *map(images.report, figures.values())]))
            add("images", figures)
    add("bars", report.bars(result))
    if "text" in result:
        path.with_suffix(".svg").write_text(report.plot(result))
    print(
        "\n"
        + "\n".join(f"{'met   ' if b['met'] else 'MISSED'} {b['text']}" for b in result["bars"])
    )
    print(f"\n{report.tables(result)}\n\n{path}")


if __name__ == "__main__":
    main()
