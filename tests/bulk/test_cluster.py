"""Ray on this machine, by our command line: whatever is killed, the files are a local run's."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest

from shared_engine import Embedder, Options
from shared_engine.cli import main
from tests.conftest import ROOT

pytestmark = pytest.mark.slow

ROWS, ROWS_PER_FILE = 6_000, 300
HERE = ["--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = (json.dumps({"id": n, "text": f"passage {n} about {n % 13}"}) for n in range(ROWS))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Run our command line in another process, with a cluster of its own, until the test ends."""
    begun = []

    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}

    def run(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "shared_engine.cli", *arguments]
        with (tmp_path / f"log-{len(begun)}").open("wb") as log:
            begun.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        return begun[-1]

    yield run
    for process in begun:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def embed(source: Path, out: Path, checkpoint: Path) -> list[str]:
    return [
        *("embed", str(source), "--out", str(out), "--model", str(checkpoint), *HERE),
        *("--id-column", "id", "--rows-per-file", str(ROWS_PER_FILE), "--tokens-per-step", "512"),
    ]


def find_processes(title: bytes) -> list[int]:
    """Return the ids of processes whose command line begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(is_so: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until
        time.sleep(0.01)


def assert_same(one: Path, other: Path) -> None:
    names = sorted(path.name for path in (one / "vectors").iterdir())
    assert names == sorted(path.name for path in (other / "vectors").iterdir())
    assert len(names) == ROWS // ROWS_PER_FILE
    for name in names:
        ours, theirs = (pq.read_table(folder / "vectors" / name) for folder in (one, other))
        assert ours.schema.equals(theirs.schema, check_metadata=True)
        assert ours.drop_columns("vector").equals(theirs.drop_columns("vector"))
        rows = [np.stack(t["vector"].to_numpy(zero_copy_only=False)) for t in (ours, theirs)]
        np.testing.assert_allclose(*rows, atol=1e-6)


@pytest.mark.parametrize("killed", ["nothing", "actor", "driver"])
def test_a_cluster_writes_what_one_machine_does(
    killed: str,
    source: Path,
    checkpoint: Path,
    tmp_path: Path,
    begin: Callable[..., subprocess.Popen[bytes]],
) -> None:
    out = tmp_path / "cluster"
    vectors = out / "vectors"
    command = [*embed(source, out, checkpoint), "--ray", "--workers", "1"]
    process = begin(*command)
    if killed != "nothing":
        wait_for(lambda: vectors.is_dir() and len(list(vectors.glob("*.parquet"))) >= 2, process)
    if killed == "actor":
        actors = find_processes(b"ray::MapWorker")
        assert actors
        for actor in actors:
            os.kill(actor, signal.SIGKILL)
    if killed == "driver":
        process.kill()
        process.wait()
        assert len(list(vectors.glob("*.parquet"))) < ROWS // ROWS_PER_FILE, "killed too late"
        time.sleep(5)  # Ray ends what belonged to it
        process = begin(*command)
    assert process.wait(240) == 0, (tmp_path / "log-0").read_text()
    assert main(embed(source, tmp_path / "here", checkpoint)) == 0
    assert_same(out, tmp_path / "here")


def test_a_replica_that_dies_costs_our_client_nothing(
    checkpoint: Path,
    begin: Callable[..., subprocess.Popen[bytes]],
    record_property: Callable[[str, object], None],
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/v1"
    shares = ("--replicas", "2", "--cpus-per-replica", "0.5")
    process = begin("serve", "--model", str(checkpoint), *HERE, "--port", str(port), *shares)

    def is_ready() -> bool:
        try:
            return httpx.get(f"{url}/health/ready").is_success
        except httpx.HTTPError:
            return False

    wait_for(is_ready, process)
    replicas = find_processes(b"ray::ServeReplica")
    assert len(replicas) == 2
    texts = [f"passage {n}" for n in range(200)]
    expected = Embedder(Options(model=str(checkpoint), dtype="float32", device="cpu")).embed(texts)
    asked = lost = 0
    done = threading.Event()

    def ask() -> None:
        nonlocal asked, lost
        body = {"model": checkpoint.name, "input": ["a"], "input_type": "query"}
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                asked += 1
                try:
                    lost += not client.post(f"{url}/embeddings", json=body).is_success
                except httpx.HTTPError:
                    lost += 1

    foreign = threading.Thread(target=ask)
    foreign.start()
    try:
        with Embedder(Options(base_url=url)) as embedder:
            until = time.monotonic() + 15
            for call in range(1_000_000):
                np.testing.assert_allclose(embedder.embed(texts), expected, atol=1e-6)
                if call == 5:
                    os.kill(replicas[0], signal.SIGKILL)
                if call > 20 and time.monotonic() > until:
                    break
    finally:
        done.set()
        foreign.join()
    record_property("lost_by_a_client_without_retries", f"{lost} of {asked}")
    print(f"a client that does not try again lost {lost} of {asked} requests")
    wait_for(lambda: len(find_processes(b"ray::ServeReplica")) == 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
