"""Texts per second, side by side with sentence-transformers on the same weights, in one process.

    python tests/benchmarks/throughput.py                      # the stand-in, mixed lengths
    python tests/benchmarks/throughput.py --checkpoint DIR --corpus uniform --texts 64

Every contender runs once a round, in turn, so that a machine whose speed drifts drifts for all;
the figures are medians over the rounds. `of peak` is the work of the real tokens over the fastest
matrix product of the model's own shapes; `waste` is tokens computed over real tokens.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import logging
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from shared_engine import Embedder, Options

ROOT = Path(__file__).parents[2]
BATCH_SIZES = (4, 8, 16, 32, 64, 128)


def words() -> list[str]:
    """Return the words of the standard library's docstrings, in order."""
    out: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                out += (ast.get_docstring(node) or "").split()
    return out


def corpus(kind: str, count: int, seed: int = 0) -> list[str]:
    """Return real text in pieces of log-normal ("skewed"), short or equal ("uniform") length."""
    rng = np.random.default_rng(seed)
    lengths = {
        "skewed": np.clip(np.exp(rng.normal(np.log(75), 0.8, count)), 11, 350),
        "short": rng.integers(4, 14, count),
        "uniform": np.full(count, 128),
    }[kind].astype(int)
    source = words()
    starts = rng.integers(0, len(source) - lengths)
    return [" ".join(source[s : s + n]) for s, n in zip(starts, lengths, strict=True)]


def peer(folder: Path, scratch: Path, device: str, dtype: torch.dtype) -> Any:
    """Return a SentenceTransformer of the same weights, without remote code."""
    from sentence_transformers import SentenceTransformer

    copy = scratch / "peer"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config.pop("auto_map", None)
    config |= {"model_type": "llama", "architectures": ["LlamaModel"], "is_causal": False}
    (copy / "config.json").write_text(json.dumps(config))
    return SentenceTransformer(str(copy), device=device, model_kwargs={"dtype": dtype})


def gemm_peak(config: dict[str, int], device: str, dtype: torch.dtype) -> float:
    """Return the most FLOP/s of a matrix product with the shapes of the model's MLP."""
    best = 0.0
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    for rows, (k, n) in itertools.product((1024, 2048), ((hidden, 2 * inner), (inner, hidden))):
        x = torch.randn(rows, k, device=device, dtype=dtype)
        weight = torch.randn(n, k, device=device, dtype=dtype)
        repeats = max(1, int(2e10 / (rows * k * n)))
        for timed in (False, True):
            start = time.perf_counter()
            for _ in range(repeats):
                F.linear(x, weight)
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            if timed:
                flops = 2 * rows * k * n * repeats
                best = max(best, flops / (time.perf_counter() - start))
    return best


def work(config: dict[str, int], tokens: np.ndarray) -> float:
    """Return the FLOPs of the linear layers and attention over texts of these token counts."""
    hidden, inner, heads = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    d = config.get("head_dim") or hidden // heads
    kv = config.get("num_key_value_heads") or heads
    layer = 2 * hidden * d * (heads + kv) + 3 * hidden * inner
    per_token = 2.0 * layer * tokens + 4.0 * heads * d * tokens.astype(float) ** 2
    return float(config["num_hidden_layers"] * per_token.sum())


def padded_waste(texts: list[str], tokens: np.ndarray, batch_size: int) -> float:
    """Return computed over real tokens of sentence-transformers: sorted by characters, padded."""
    order = np.argsort([-len(text) for text in texts], kind="stable")
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    return float(sum(tokens[b].max() * len(b) for b in batches) / tokens.sum())


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="folder; default: the stand-in")
    parser.add_argument("--corpus", choices=("skewed", "short", "uniform"), default="skewed")
    parser.add_argument("--texts", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens-per-step", type=int, nargs="*", default=[None])
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=BATCH_SIZES)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.checkpoint is None:
        sys.path.insert(0, str(ROOT))
        from cookbook.standin import build

        args.checkpoint = build()
    return args


def measure(args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Run the rounds; return the corpus, the peak and a row for each contender."""
    texts = corpus(args.corpus, args.texts)
    contenders: dict[str, Callable[[], np.ndarray]] = {}
    for size in args.tokens_per_step:
        options = Options(
            model=args.checkpoint, device=args.device, dtype=args.dtype, tokens_per_step=size
        )
        ours = Embedder(options)
        ours.embed(["warm up"])
        contenders[f"this engine, {size or 'default'} tokens a step"] = partial(ours.embed, texts)
    dtype = torch.bfloat16 if ", bfloat16, " in ours.description else torch.float32
    theirs = peer(args.checkpoint, scratch, args.device, dtype)
    prompt = theirs.prompts.get("document", "passage: ")
    for size in args.batch_sizes:
        contenders[f"sentence-transformers, batch {size}"] = partial(
            theirs.encode, texts, prompt=prompt, batch_size=size, normalize_embeddings=True
        )

    config = json.loads((args.checkpoint / "config.json").read_text())
    encodings = theirs.tokenizer([prompt + text for text in texts])["input_ids"]
    tokens = np.array([len(ids) for ids in encodings])
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    peaks, reference = [], None
    for _ in range(args.rounds):
        peaks.append(gemm_peak(config, args.device, dtype))
        for name, run in contenders.items():
            start = time.perf_counter()
            vectors = run()
            seconds[name].append(time.perf_counter() - start)
            reference = vectors if reference is None else reference
            cosine = float((vectors * reference).sum(1).min())
            assert cosine > 0.999, f"{name} gives other vectors (cosine {cosine})"

    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best = min(value for name, value in medians.items() if name.startswith("sentence"))
    flops, peak = work(config, tokens), statistics.median(peaks)
    rows = []
    for name, value in medians.items():
        size = int(name.rsplit(" ", 1)[1]) if name.startswith("sentence") else 0
        rows.append(
            {
                "name": name,
                "seconds": value,
                "texts_per_second": len(texts) / value,
                "tokens_per_second": float(tokens.sum() / value),
                "of_peak": flops / value / peak,
                "waste": padded_waste(texts, tokens, size) if size else 1.0,
                "vs_best_peer": best / value,
            }
        )
    return {
        "engine": ours.description,
        "corpus": f"{args.corpus}: {len(texts)} texts, {tokens.sum()} tokens (mean "
        f"{tokens.mean():.0f}, max {tokens.max()}), {flops / 1e12:.2f} TFLOP",
        "threads": torch.get_num_threads(),
        "gemm_peak_gflops": peak / 1e9,
        "rows": rows,
    }


def main() -> None:
    """Measure and print the table."""
    args = arguments()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        result = measure(args, Path(scratch))
    print(f"{result['engine']}\n{result['corpus']}")
    print(f"{result['threads']} threads, GEMM peak {result['gemm_peak_gflops']:.0f} GFLOP/s\n")
    columns = ("s", "texts/s", "tokens/s", "of peak", "waste", "vs best peer")
    print(f"{'':42}" + "".join(f"{column:>13}" for column in columns))
    for row in result["rows"]:
        name, *figures = row.values()
        print(f"{name:42}" + "".join(f"{figure:13.2f}" for figure in figures))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
