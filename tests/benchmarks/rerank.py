"""Rerankers: this engine against padded scoring, at a server, and during an ingest.

    python tests/benchmarks/rerank.py                # all three, five minutes on two cores
    python tests/benchmarks/rerank.py scoring        # 100 candidates of mixed lengths
    python tests/benchmarks/rerank.py server         # 200 candidates, 50 ms a request of 32
    python tests/benchmarks/rerank.py ingest         # a search beside an ingest on one device

Contenders take turns, round by round. Scoring is against the way of sentence-transformers'
`CrossEncoder`: stock transformers on the same weights, pairs sorted by length, padded in batches,
at its best batch size; scores are compared. The server is in a process of its own. A search embeds
a query and scores 40 candidates of 256 tokens; the ingest embeds documents with another model on
the same device.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared_engine import Embedder, Options, Reranker, RerankOptions
from tests.benchmarks import measuring
from tests.benchmarks.remote import answer
from tests.support.rerankers import TEMPERATURE, TEXT, add_head

MODEL = "nvidia/llama-nemotron-rerank-1b-v2"
QUERY = "how is a value of a dictionary replaced while another thread iterates over it?"
BATCH_SIZES = (2, 4, 8, 32)
Score = Callable[[str, list[str]], NDArray[np.float32]]


def scoring(folder: Path, rounds: int) -> None:
    """Score 100 candidates of 16 to 512 tokens."""
    source = measuring.Source(folder.with_name("embedder"))
    texts = source.texts(measuring.lengths("skewed", 100))
    reranker = Reranker(RerankOptions(model=str(folder), device="cpu"))
    backend: Any = reranker.load()
    print(reranker.description)
    contenders: dict[str, Score] = {"this engine": reranker.score}
    contenders |= padded(folder, backend._dtype)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    scores: dict[str, NDArray[np.float32]] = {}
    for number in range(rounds + 1):
        for name in list(contenders)[:: 1 if number % 2 else -1]:
            begun = time.perf_counter()
            scores[name] = contenders[name](QUERY, texts)
            if number:  # the first warms up
                seconds[name].append(time.perf_counter() - begun)
    best = min(list(seconds)[1:], key=lambda name: median(seconds[name]))
    for name, spans in seconds.items():
        ratios = sorted(b / s for b, s in zip(seconds[best], spans, strict=True))
        difference = np.abs(scores[name] - scores["this engine"]).max()
        print(
            f"{name:32}{median(spans):8.2f} s{median(ratios):8.2f} times the best padded "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f}), differs by {difference:.1e}"
        )
    reranker.close()


def padded(folder: Path, dtype: torch.dtype) -> dict[str, Score]:
    """Return transformers' Llama with the head, pairs sorted by length and padded in batches."""
    from safetensors.torch import load_file
    from transformers import AutoModel, AutoTokenizer

    peer = measuring.peer_folder(folder, folder.with_name("peer"))
    model: Any = AutoModel.from_pretrained(peer, dtype=dtype, attn_implementation="sdpa")
    tokenizer: Any = AutoTokenizer.from_pretrained(peer)
    head = load_file(folder / "model.safetensors")["score.weight"].float()

    @torch.inference_mode()
    def score(query: str, texts: list[str], size: int) -> NDArray[np.float32]:
        pairs = [f"question:{query} \n \n passage:{text}" for text in texts]
        order = np.argsort([-len(pair) for pair in pairs], kind="stable")
        out = np.empty(len(pairs), np.float32)
        for start in range(0, len(pairs), size):
            rows = order[start : start + size]
            inputs = tokenizer([pairs[i] for i in rows], padding=True, return_tensors="pt")
            states = model(**inputs, use_cache=False).last_hidden_state.float()
            mask = inputs["attention_mask"][..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            out[rows] = (means @ head.T)[:, 0].numpy() / TEMPERATURE
        return out

    def of_size(size: int) -> Score:
        return lambda query, texts: score(query, texts, size)

    return {f"padded transformers, batch {size}": of_size(size) for size in BATCH_SIZES}


def server(_: Path, rounds: int) -> None:
    """Score 200 passages at a server, with the clients' default settings."""
    from langchain_core.documents import Document
    from langchain_nvidia_ai_endpoints import NVIDIARerank

    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=serve, args=(there, 0.05), daemon=True
    )
    process.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    texts = [f"passage {number} " * 20 for number in range(200)]
    ours = Reranker(RerankOptions(model=MODEL, base_url=url))
    peer: Any = NVIDIARerank(model=MODEL, base_url=url, top_n=len(texts))
    documents = [Document(text) for text in texts]
    contenders: dict[str, Callable[[], object]] = {
        "this engine": lambda: ours.rank(QUERY, texts),
        "langchain-nvidia-ai-endpoints": lambda: peer.compress_documents(documents, QUERY),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            begun = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - begun)
    process.kill()
    slow = seconds["langchain-nvidia-ai-endpoints"]
    for name, spans in seconds.items():
        ratios = sorted(b / s for b, s in zip(slow, spans, strict=True))
        print(
            f"{name:32}{1000 * median(spans):8.0f} ms{median(ratios):8.2f} times as fast "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )
    ours.close()


def serve(address: Connection, latency: float) -> None:
    """Answer as a NIM's reranker that takes so many seconds for each 32 passages."""

    def reply(body: dict[str, Any]) -> tuple[bytes, float]:
        count = len(body["passages"])
        rankings = [{"index": i, "logit": 1.0 / (i + 1)} for i in range(count)]
        return json.dumps({"rankings": rankings}).encode(), latency * -(-count // 32)

    answer(address, MODEL, reply)


def ingest(folder: Path, rounds: int) -> None:
    """Search alone, then during an ingest, and compare the times and the results."""
    embedded = folder.with_name("embedder")
    source = measuring.Source(embedded)
    documents = source.texts(measuring.lengths("skewed", 48), seed=1)
    candidates = source.texts([256] * 40, seed=2)
    embedder = Embedder(Options(model=str(embedded), device="cpu"))
    reranker = Reranker(RerankOptions(model=str(folder), device="cpu"))
    backend: Any = reranker.load()
    encoders = backend._encoders
    encoders[0] = timed = measuring.Timed(encoders[0], encoders[0].device)

    def search() -> NDArray[np.float32]:
        embedder.embed([QUERY], "query")
        return reranker.score(QUERY, candidates)

    expected, step = search(), 0.0
    alone, during, kept = list[float](), list[float](), list[float]()
    stop, count = threading.Event(), 0

    def work() -> None:
        nonlocal count
        while not stop.is_set():
            embedder.embed(documents)
            count += 1

    for _ in range(rounds):
        timed.spans.clear()
        alone += [_time(search) for _ in range(6)]
        step = max(step, median(timed.spans))
        quiet = median(_time(lambda: embedder.embed(documents)) for _ in range(2))
        stop.clear()
        count, begun = 0, time.perf_counter()
        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(6):
            time.sleep(step)
            begun_search = time.perf_counter()
            difference = float(np.abs(search() - expected).max())
            during.append(time.perf_counter() - begun_search)
            if difference > 1e-4:
                raise ValueError(f"a score is off by {difference:.1g} during the ingest")
        stop.set()
        thread.join()
        kept.append(count * quiet / (time.perf_counter() - begun))
    p50, p99 = np.percentile(during, [50, 99])
    print(
        f"embed a query, score 40 x 256 tokens: alone {median(alone):.2f} s, during an ingest "
        f"{p50:.2f} s (p99 {p99:.2f} s); a step takes {step:.2f} s, so p99 is "
        f"{(p99 - median(alone)) / step:.1f} steps over the time alone; the ingest keeps "
        f"{median(kept):.0%}"
    )
    reranker.close()
    embedder.close()


def _time(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


PARTS: dict[str, Callable[[Path, int], None]] = {
    "scoring": scoring,
    "server": server,
    "ingest": ingest,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--layers", type=int, default=2, help="of random weights")
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "reranker"
        measuring.text_checkpoint(folder.with_name("embedder"), asked.layers)
        add_head(measuring.text_checkpoint(folder, asked.layers), {"architectures": [TEXT]})
        for part in asked.parts or PARTS:
            PARTS[part](folder, asked.rounds)


if __name__ == "__main__":
    main()
