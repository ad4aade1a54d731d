"""Texts per second of one corpus, side by side with sentence-transformers on the same weights.

    python tests/benchmarks/throughput.py                      # the stand-in, mixed lengths
    python tests/benchmarks/throughput.py --checkpoint DIR --corpus uniform --texts 64

The part of suite.py to try step and batch sizes with. `of peak` is the work of the real tokens over
the fastest matrix product; `waste` is tokens computed over real tokens; `ratio` is to the fastest
batch size of sentence-transformers.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared_engine import Embedder, Options
from tests.benchmarks import measuring


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="folder; default: the stand-in")
    parser.add_argument(
        "--corpus", choices=("skewed", "short", "uniform", "long"), default="skewed"
    )
    parser.add_argument("--texts", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--max-batch-tokens", type=int, nargs="*", default=[None])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=(4, 8, 16, 32, 64, 128))
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.checkpoint is None:
        from cookbook.standin import build

        args.checkpoint = build()
    return args


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Return the race of the engine at each step size with the peers."""
    options = Options(model=args.checkpoint, device=args.device, dtype=args.dtype)
    contenders = []
    for size in args.max_batch_tokens:
        embedder = Embedder(options.model_copy(update={"max_batch_tokens": size}))
        step = f"{measuring.OURS}, {size or 'default'} tokens per step"
        contenders.append(measuring.ours(embedder, step))
    print(embedder.description)
    dtype = embedder.load()._dtype  # type: ignore[attr-defined]
    folder = measuring.peer_folder(args.checkpoint, scratch / "peer")
    theirs = measuring.sentence_transformer(folder, args.device, dtype)
    config = json.loads((args.checkpoint / "config.json").read_text())
    source = measuring.Source(args.checkpoint)
    tokens = measuring.lengths(args.corpus, args.texts)
    return measuring.race(
        contenders + measuring.peers(theirs, source.prompts["document"], args.batch_sizes, 32),
        source.texts(tokens),
        tokens,
        args.rounds,
        measuring.Setting(config, torch.device(args.device), dtype),
    )


def main() -> None:
    """Measure and print the table."""
    args = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(args, Path(scratch))
    print(measuring.table(result))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
