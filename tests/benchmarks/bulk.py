"""Peak memory and bytes read of bulk runs, each in a process of its own, with a NIM inside it.

    python tests/benchmarks/bulk.py                      # 20,000 and 2,000,000 rows
    python tests/benchmarks/bulk.py --rows 20000 200000

The largest run is done again with a single Parquet row group.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from shared_engine import Embedder, Options  # noqa: E402
from shared_engine.bulk.job import Job  # noqa: E402
from shared_engine.bulk.run import run_local  # noqa: E402
from tests.support.nim import MODEL, answer, write_models  # noqa: E402

_GROUP = 20_000


def reply(request: httpx.Request) -> httpx.Response:
    """Do as a NIM does, and keep nothing."""
    if request.method == "GET":
        return httpx.Response(200, content=write_models([MODEL]))
    return httpx.Response(200, content=answer(json.loads(request.content)))


def run(rows: int, group: int) -> dict[str, float]:
    """Embed so many rows with ids; return seconds, peak RSS in MB, and bytes read per byte."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.parquet")
        writer = multiprocessing.get_context("spawn").Process(
            target=write, args=(path, rows, group)
        )  # its memory does not count
        writer.start()
        writer.join()
        options = Options(
            base_url="http://nim:8000",
            dimensions=16,
            http_client_factory=lambda: httpx.AsyncClient(transport=httpx.MockTransport(reply)),
        )
        job = Job((str(path),), f"{folder}/out", options, id_column="key")
        with Embedder(options) as embedder:
            embedder.embed(["warm up"])
            start, before = time.monotonic(), read_proc("io", "rchar")
            summary = run_local(job, embedder, show_progress=False)
        assert summary.rows == rows
        read = (read_proc("io", "rchar") - before) / path.stat().st_size
    return {
        "rows": rows,
        "group": group,
        "seconds": time.monotonic() - start,
        "peak_mb": read_proc("status", "VmHWM") / 1024,
        "times_read": read,
    }


def write(path: Path, rows: int, group: int) -> None:
    """Write a table with ids and texts that cannot be compressed."""
    dice = random.Random(rows)
    schema = pa.schema([("key", pa.int64()), ("text", pa.string())])
    with pq.ParquetWriter(path, schema) as writer:
        for first in range(0, rows, group):
            keys = range(first, min(first + group, rows))
            texts = pa.array(f"passage {key}: {dice.randbytes(200).hex()}" for key in keys)
            writer.write_table(pa.table({"key": keys, "text": texts}, schema=schema))


def read_proc(file: str, name: str) -> int:
    """Return a number that Linux keeps of this process."""
    found = re.search(rf"{name}:\s+(\d+)", Path(f"/proc/self/{file}").read_text())
    assert found is not None
    return int(found[1])


def measure(rows: int, group: int) -> dict[str, float]:
    """Return the result of `run` in a process of its own."""
    command = [sys.executable, __file__, "--one", str(rows), "--group", str(group)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a line for each size, and the ratio of the largest to the smallest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 2_000_000])
    parser.add_argument("--group", type=int, default=_GROUP, help="rows of a Parquet row group")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(run(args.one, args.group)))
        return
    found = [measure(rows, args.group) for rows in args.rows]
    found.append(measure(args.rows[-1], args.rows[-1]))
    for each in found:
        print(
            f"{each['rows']:>12,.0f} rows in groups of {each['group']:>9,.0f} "
            f"{each['seconds']:>8.1f} s {each['peak_mb']:>8.0f} MB, "
            f"read {each['times_read']:.2f} times"
        )
    print(f"peak of the most rows to the fewest: {found[-2]['peak_mb'] / found[0]['peak_mb']:.2f}")
    more = found[-1]["peak_mb"] - found[-2]["peak_mb"]
    print(f"peak of one row group over that of small ones: {more:+.0f} MB")


if __name__ == "__main__":
    main()
