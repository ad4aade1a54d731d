"""How long a search waits during an ingest, and how much of its throughput the ingest keeps.

    python tests/benchmarks/search_latency.py                  # six minutes on two cores
    python tests/benchmarks/search_latency.py --layers 9       # the true depth of the 300M model
    python tests/benchmarks/search_latency.py --checkpoint DIR --rounds 9

Two contenders take turns, round by round, on the same weights and texts: this engine, and
sentence-transformers under a lock that is held for one batch, which is the most considerate way to
share it. Its batch size is the one that ingests fastest. In a round a contender searches alone,
ingests alone, and then does both, with up to the time of a full step of this engine between two
searches. A search must give the same vector during the ingest as alone.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import math
import statistics
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared_engine import Embedder, Options
from tests.benchmarks import measuring

QUERY_TOKENS = 32
DOCUMENTS = 48
BATCH_SIZES = (2, 4, 8, 32)
"""Of sentence-transformers: the fastest of them is its best."""
SAME = 1e-5
"""The tolerance on a CPU. A GPU sums in other orders for other numbers of rows."""

Vectors = NDArray[np.float32]


@dataclass
class Contender:
    """A model that is searched with and ingests, and what was measured of it."""

    name: str
    search: Callable[[str], Vectors]
    """Returns the vector of a query."""
    ingest: Callable[[], int]
    """Embeds some documents and returns their tokens."""
    tolerance: float = SAME
    """The largest difference between two vectors of one query, value by value."""
    alone: list[float] = field(default_factory=list)
    """Seconds of each search without an ingest."""
    during: list[float] = field(default_factory=list)
    """Seconds of each search during an ingest."""
    rates: list[tuple[float, float]] = field(default_factory=list)
    """Tokens per second of the ingest in each round: alone, and with searches."""

    def run_round(self, queries: Sequence[str], gaps: Sequence[float], tokens: int) -> None:
        """Search, ingest at least so many tokens, and do both with a gap before each search.

        Raises:
            ValueError: a search gives another vector during the ingest.
        """
        expected = [self._search(query, self.alone) for query in queries]
        with _Ingest(self.ingest) as quiet:
            quiet.wait(tokens)
        with _Ingest(self.ingest) as busy:
            for query, gap, vector in zip(queries, gaps, expected, strict=True):
                time.sleep(gap)
                difference = float(np.abs(self._search(query, self.during) - vector).max())
                if difference > self.tolerance:
                    raise ValueError(f"{self.name}: a vector is off by {difference:.1g}")
        self.rates.append((quiet.rate, busy.rate))

    def _search(self, query: str, seconds: list[float]) -> Vectors:
        start = time.perf_counter()
        vector = self.search(query)
        seconds.append(time.perf_counter() - start)
        return vector

    def summarize(self, step: float) -> dict[str, Any]:
        """Return the figures, of searches as percentiles; a full step takes so many seconds."""
        quiet, busy = zip(*self.rates, strict=True)
        return {
            "alone": _percentiles(self.alone),
            "during": _percentiles(self.during),
            "p99_steps": _percentiles(self.during)["p99"] / step,
            "bulk_tokens_per_second_alone": statistics.median(quiet),
            "bulk_tokens_per_second": statistics.median(busy),
            "kept": statistics.median(b / q for q, b in self.rates),
        }


class _Ingest:
    """A thread that ingests until the block ends; `rate` counts the calls that ended in it."""

    def __init__(self, ingest: Callable[[], int]) -> None:
        self._ingest = ingest
        self._done: list[tuple[float, int]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> _Ingest:
        self._start = time.perf_counter()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        end = time.perf_counter()
        self._stop.set()
        self._thread.join()
        complete = [each for each in self._done if each[0] <= end] or self._done
        self.rate = sum(tokens for _, tokens in complete) / (complete[-1][0] - self._start)

    def wait(self, tokens: int) -> None:
        """Return when so many tokens were ingested, or the thread failed."""
        while self._thread.is_alive() and sum(each for _, each in self._done) < tokens:
            time.sleep(0.01)

    def _run(self) -> None:
        while not self._stop.is_set():
            tokens = self._ingest()
            self._done.append((time.perf_counter(), tokens))


@dataclass(frozen=True)
class Corpus:
    """What is ingested and searched for."""

    documents: list[str]
    lengths: NDArray[np.int64]
    """Tokens of each document."""
    queries: list[str]
    prompts: dict[str, str]
    """By role; the engine has them from its checkpoint."""

    @property
    def tokens(self) -> int:
        """Tokens of all documents."""
        return int(self.lengths.sum())


def make_corpus(source: measuring.Source, documents: int, queries: int) -> Corpus:
    """Return documents of mixed lengths, and queries."""
    lengths = measuring.lengths("skewed", documents)
    texts = source.texts([QUERY_TOKENS] * queries, "query", seed=1)
    return Corpus(source.texts(lengths), lengths, texts, source.prompts)


def measure(
    embedder: Embedder, theirs: Any, corpus: Corpus, rounds: int, batch_size: int
) -> dict[str, Any]:
    """Run the rounds, nobody always first, and return the figures of both contenders."""
    step = _time_step(embedder, corpus.documents)
    contenders = [_ours(embedder, corpus), _peer(theirs, corpus, batch_size)]
    for contender in contenders:
        contender.search(corpus.queries[0])
    random = np.random.default_rng(0)
    for number in range(rounds):
        gaps = random.uniform(0, step, len(corpus.queries)).tolist()
        for contender in contenders if number % 2 else contenders[::-1]:
            contender.run_round(corpus.queries, gaps, corpus.tokens)
    return {
        "query_tokens": QUERY_TOKENS,
        "queries": rounds * len(corpus.queries),
        "step_seconds": step,
        "max_batch_tokens": _backend(embedder).step_stats.max_batch_tokens,
        **{contender.name: contender.summarize(step) for contender in contenders},
    }


def _backend(embedder: Embedder) -> Any:
    return embedder.load()


def _time_step(embedder: Embedder, documents: list[str]) -> float:
    """Return the seconds of a full step."""
    encoders = _backend(embedder)._encoders
    encoders[0] = timed = measuring.Timed(encoders[0], encoders[0].device)
    embedder.embed(documents)
    encoders[0] = timed.inner
    return statistics.median(timed.spans[:-1] or timed.spans)  # the last is not full


def _ours(embedder: Embedder, corpus: Corpus) -> Contender:
    """Return the engine as a user calls it."""

    def ingest() -> int:
        embedder.embed(corpus.documents)
        return corpus.tokens

    def search(query: str) -> Vectors:
        return embedder.embed([query], role="query")[0]

    return Contender(measuring.OURS, search, ingest)


def _peer(theirs: Any, corpus: Corpus, batch_size: int) -> Contender:
    """Return sentence-transformers under a lock that is held for a query, or for a batch."""
    lock = threading.Lock()
    starts = itertools.cycle(range(0, len(corpus.documents), batch_size))

    def encode(texts: list[str], role: str) -> Vectors:
        with lock:
            out: Vectors = theirs.encode(
                texts, prompt=corpus.prompts[role], batch_size=batch_size, normalize_embeddings=True
            )
        return out

    def ingest() -> int:
        batch = slice(start := next(starts), start + batch_size)
        encode(corpus.documents[batch], "document")
        return int(corpus.lengths[batch].sum())

    name = f"{measuring.PEER} under a lock, batch {batch_size}"
    return Contender(name, lambda query: encode([query], "query")[0], ingest)


def find_best_batch(theirs: Any, corpus: Corpus, sizes: Sequence[int] = BATCH_SIZES) -> int:
    """Return the batch size at which sentence-transformers embeds the documents fastest."""
    best = dict.fromkeys(sizes, math.inf)
    for size in [*sizes, *sizes]:  # each twice, in turn
        start = time.perf_counter()
        theirs.encode(corpus.documents, prompt=corpus.prompts["document"], batch_size=size)
        best[size] = min(best[size], time.perf_counter() - start)
    return min(sizes, key=best.__getitem__)


def _percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99])
    return {"p50": float(p50), "p95": float(p95), "p99": float(p99)}


def table(figures: dict[str, Any]) -> str:
    """Return what `measure` has returned as lines for a terminal."""
    names = ("alone p50", "p99", "during p50", "p95", "p99", "tokens/s", "kept")
    lines = [
        f"A query of {QUERY_TOKENS} tokens, {figures['queries']} of them; a full step takes "
        f"{1000 * figures['step_seconds']:.0f} ms",
        f"{'':46}" + "".join(f"{name:>11}" for name in names),
    ]
    rows = {name: row for name, row in figures.items() if isinstance(row, dict)}
    for name, row in rows.items():
        spans = [row["alone"]["p50"], row["alone"]["p99"], *row["during"].values()]
        figures = "".join(f"{1000 * span:8.0f} ms" for span in spans)
        rate, kept = row["bulk_tokens_per_second_alone"], row["kept"]
        lines.append(f"{name:46}{figures}{rate:11,.0f}{kept:11.0%}")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="folder of a text model; else random")
    parser.add_argument("--layers", type=int, default=2, help="of random weights")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--searches", type=int, default=40, help="in each round")
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = asked.checkpoint or measuring.text_checkpoint(scratch / "text", asked.layers)
        embedder = Embedder(Options(model=str(folder), device=asked.device))
        theirs = measuring.sentence_transformer(
            measuring.peer_folder(folder, scratch / "peer"),
            asked.device,
            _backend(embedder)._dtype,
        )
        corpus = make_corpus(measuring.Source(folder), DOCUMENTS, asked.searches)
        batch_size = find_best_batch(theirs, corpus)
        print(embedder.description)
        print(table(measure(embedder, theirs, corpus, asked.rounds, batch_size)))


if __name__ == "__main__":
    main()
