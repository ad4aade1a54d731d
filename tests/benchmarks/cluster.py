"""Bulk jobs on a Ray cluster of this machine, compared with the same jobs without one.

    python tests/benchmarks/cluster.py                  # the stand-in of the demos; 3 rounds
    python tests/benchmarks/cluster.py --checkpoint DIR --rounds 5

First one actor with all cores against a run in this process, on the same weights and rows, in turn;
then two actors against one, at a server that takes 50 ms per request, with two requests in flight
per actor. Start-up does not count: rows are counted from the end of the first quarter of the
fragments to the end of the last one.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import orjson

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)  # of the actors

from shared_engine import Options  # noqa: E402
from shared_engine.bulk import Job, run_local  # noqa: E402
from shared_engine.distributed import run_ray  # noqa: E402
from shared_engine.distributed.nodes import connect  # noqa: E402
from tests.benchmarks.measuring import words  # noqa: E402
from tests.benchmarks.remote import MODEL, serve  # noqa: E402

WORDS = 40
"""Words of a row."""
FRAGMENTS = 24
LATENCY, AT_ONCE = 0.05, 2


def write_rows(path: Path, rows: int) -> Path:
    """Write JSON Lines of real text."""
    some = words()
    with path.open("wb") as file:
        for row in range(rows):
            start = row * WORDS % (len(some) - WORDS)
            file.write(orjson.dumps({"text": " ".join(some[start : start + WORDS])}) + b"\n")
    return path


def measure_rate(job: Job) -> float:
    """Return the rows per second of a job that is done, by the times of its files."""
    assert job.rows_per_file is not None
    files = Path(job.out, "vectors").glob("*.parquet")
    ends = sorted(path.stat().st_mtime_ns / 1e9 for path in files)
    assert len(ends) == FRAGMENTS
    first = FRAGMENTS // 4
    return job.rows_per_file * (FRAGMENTS - first) / (ends[-1] - ends[first - 1])


def race(
    title: str,
    ways: dict[str, Callable[[Job], object]],
    *,
    source: Path,
    options: Options,
    rows: int,
    rounds: int,
) -> None:
    """Run the same job in each way, in turn; print rows per second and the ratio to the first."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        for name in list(ways) if number % 2 == 0 else reversed(ways):
            with tempfile.TemporaryDirectory() as folder:
                job = Job((str(source),), folder, options, rows_per_file=rows // FRAGMENTS)
                ways[name](job)
                rates[name].append(measure_rate(job))
    first = next(iter(ways))
    print(f"\n{title}: {rows:,} rows, {FRAGMENTS} fragments, median of {rounds} rounds")
    for name, found in rates.items():
        ratios = [rate / base for rate, base in zip(found, rates[first], strict=True)]
        print(
            f"{name:28}{median(found):10,.1f} rows/s   {median(ratios):.2f} times the first "
            f"({min(ratios):.2f} to {max(ratios):.2f})"
        )


def main() -> None:
    """Print both races."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", type=Path, help="folder; default: the stand-in")
    parser.add_argument("--rows", type=int, default=1_200, help="of the first race")
    parser.add_argument("--remote-rows", type=int, default=48_000, help="of the second")
    parser.add_argument("--rounds", type=int, default=3)
    asked = parser.parse_args()
    if asked.checkpoint is None:
        from cookbook.standin import build

        asked.checkpoint = build()
    cores = os.cpu_count() or 1
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(
        target=serve, args=(there, LATENCY), daemon=True
    )
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    with tempfile.TemporaryDirectory() as folder, connect("local"):
        race(
            "A model here",
            {
                "this process": lambda job: run_local(job, show_progress=False),
                "one actor": lambda job: run_ray(job, workers=1, cpus_per_worker=cores),
            },
            source=write_rows(Path(folder, "here.jsonl"), asked.rows),
            options=Options(model=str(asked.checkpoint), device="cpu", truncate="END"),
            rows=asked.rows,
            rounds=asked.rounds,
        )
        race(
            "A server of 50 ms",
            {
                "one actor": lambda job: run_ray(job, workers=1),
                "two actors": lambda job: run_ray(job, workers=2),
            },
            source=write_rows(Path(folder, "there.jsonl"), asked.remote_rows),
            options=Options(model=MODEL, base_url=url, concurrency=AT_ONCE),
            rows=asked.remote_rows,
            rounds=asked.rounds,
        )
    server.terminate()


if __name__ == "__main__":
    main()
