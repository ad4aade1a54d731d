"""A run that is killed, again and again: every row once, and little of the work twice."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from shared_engine import Embedder, Options
from shared_engine.bulk.fragment import WINDOW
from shared_engine.stream import WINDOWS_AHEAD
from tests.bulk.conftest import passages
from tests.conftest import ROOT
from tests.support.nim import vectors

pytestmark = pytest.mark.slow

ROWS, ROWS_PER_FILE, KILLS = 20_000, 4_000, 3

AT_A_NIM = """
import asyncio, json, sys, httpx
from shared_engine import Embedder, Options
from shared_engine.bulk.job import Job
from shared_engine.bulk.run import run_local
from tests.support.nim import Nim
source, out, log, rows_per_file = sys.argv[1:]
nim = Nim()

async def answer(request):
    await asyncio.sleep(0.1)
    if request.method == "POST":
        with open(log, "a") as file:
            file.write(f"{len(json.loads(request.content)['input'])}\\n")
    return nim(request)

make = lambda: httpx.AsyncClient(transport=httpx.MockTransport(answer))
options = Options(
    base_url="http://nim:8000", http_client_factory=make, concurrency=5, dimensions=16
)
job = Job((source,), out, options, id_column="key", rows_per_file=int(rows_per_file))
with Embedder(options) as embedder:
    print(run_local(job, embedder, show_progress=False))
"""


def start(*command: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def kill_at(process: subprocess.Popen, is_time) -> None:
    while not is_time():
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def check(out: Path, expected: np.ndarray) -> None:
    table = pq.read_table(out / "vectors")
    table = table.set_column(0, "id", table["id"].cast(pa.int64())).sort_by("id")
    assert table["id"].to_pylist() == list(range(ROWS))
    found = np.stack(table["vector"].to_numpy(zero_copy_only=False))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert not list(out.glob("**/.*"))


def test_at_a_nim_at_most_a_fragment_and_what_is_ahead_is_done_twice_per_kill(tmp_path):
    table = passages(ROWS)
    pq.write_table(table, tmp_path / "in.parquet")
    log = tmp_path / "log"
    log.touch()
    command = ("-c", AT_A_NIM, str(tmp_path / "in.parquet"), str(tmp_path / "out"), str(log))
    dice = random.Random(7)

    def sent() -> int:
        return sum(map(int, log.read_text().split()))

    for _ in range(KILLS):
        limit = sent() + dice.randint(1000, 5000)
        kill_at(start(*command, str(ROWS_PER_FILE)), lambda limit=limit: sent() >= limit)
    assert start(*command, str(ROWS_PER_FILE)).wait() == 0
    check(tmp_path / "out", vectors(table["text"].to_pylist()))
    twice = sent() - ROWS
    print(f"done twice: {twice} rows in {KILLS} kills")
    assert twice <= KILLS * (ROWS_PER_FILE + WINDOWS_AHEAD * WINDOW)


def test_here_every_vector_is_what_embed_gives(tmp_path, checkpoint):
    """Of a table that is converted first: its ids are texts."""
    table = passages(ROWS)
    pyarrow.csv.write_csv(table, tmp_path / "in.csv")
    out = tmp_path / "out"
    command = (
        "-m", "shared_engine.cli", "embed", str(tmp_path / "in.csv"), "--out", str(out),
        "--id-column", "key", "--rows-per-file", "500", "--model", str(checkpoint),
        "--dtype", "float32",
    )  # fmt: skip
    dice = random.Random(8)
    for _ in range(KILLS):
        # It goes on, each time. By files and not by seconds: of 40 there are some left everywhere.
        wanted = len(list(out.glob("vectors/in-*"))) + dice.randint(1, 4)
        kill_at(
            start(*command),
            lambda wanted=wanted: len(list(out.glob("vectors/in-*"))) >= wanted,
        )
    assert start(*command).wait() == 0
    with Embedder(Options(model=str(checkpoint), dtype="float32")) as embedder:
        check(out, embedder.embed(table["text"].to_pylist()))
