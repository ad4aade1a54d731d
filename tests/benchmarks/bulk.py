"""Peak memory of bulk runs of different sizes, each in a process of its own, at a NIM inside it.

python tests/benchmarks/bulk.py                      # 20,000 and 2,000,000 rows
python tests/benchmarks/bulk.py --rows 20000 200000
"""

from __future__ import annotations

import argparse
import json
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

_AT_ONCE = 20_000


def reply(request: httpx.Request) -> httpx.Response:
    """Do as a NIM does, and keep nothing."""
    if request.method == "GET":
        return httpx.Response(200, content=write_models([MODEL]))
    return httpx.Response(200, content=answer(json.loads(request.content)))


def run(rows: int) -> dict[str, float]:
    """Embed so many rows with ids of their own; return seconds and peak RSS in MB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "in.parquet")
        schema = pa.schema([("key", pa.int64()), ("text", pa.string())])
        with pq.ParquetWriter(path, schema) as writer:
            for first in range(0, rows, _AT_ONCE):
                keys = range(first, min(first + _AT_ONCE, rows))
                texts = [f"passage {key}: " + "some more words " * (key % 20) for key in keys]
                writer.write_table(pa.table({"key": keys, "text": texts}, schema=schema))
        options = Options(
            base_url="http://nim:8000",
            dimensions=16,
            http_client_factory=lambda: httpx.AsyncClient(transport=httpx.MockTransport(reply)),
        )
        job = Job((str(path),), f"{folder}/out", options, id_column="key")
        start = time.monotonic()
        with Embedder(options) as embedder:
            summary = run_local(job, embedder, show_progress=False)
        assert summary.rows == rows
    seconds = time.monotonic() - start
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert peak is not None
    return {"rows": rows, "seconds": seconds, "peak_mb": int(peak[1]) / 1024}


def measure(rows: int) -> dict[str, float]:
    """Do as `run` does in a process of its own."""
    command = [sys.executable, __file__, "--one", str(rows)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print a line for each size, and how the largest stands to the smallest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[20_000, 2_000_000])
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(run(asked.one)))
        return
    found = [measure(rows) for rows in asked.rows]
    for each in found:
        print(f"{each['rows']:>12,.0f} rows {each['seconds']:>8.1f} s {each['peak_mb']:>8.0f} MB")
    print(f"peak of the last to the first: {found[-1]['peak_mb'] / found[0]['peak_mb']:.2f}")


if __name__ == "__main__":
    main()
