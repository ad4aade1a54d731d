"""Two runs into one folder: one writes, the other says who does since when."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shared_engine.cli.main import main
from shared_engine.distributed import run_ray
from shared_engine.errors import ConfigurationError
from tests.bulk.conftest import passages, run
from tests.conftest import ROOT

TAKE = """
import sys
from shared_engine.bulk.files import lock
from shared_engine.errors import ConfigurationError
print("ready", flush=True)
sys.stdin.readline()
try:
    with lock(sys.argv[1]):
        print("has it", flush=True)
        sys.stdin.readline()
except ConfigurationError as exc:
    print(exc, flush=True)
"""


class Process:
    """Takes the lock of a folder when it is told to, and holds it until it is told again."""

    def __init__(self, folder: Path | str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", TAKE, str(folder)],
            cwd=ROOT, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.id = self._process.pid
        assert self.read() == "ready\n"

    def read(self) -> str:
        return self._process.stdout.readline()

    def go_on(self) -> None:
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self, is_killed: bool = False) -> None:
        if is_killed:
            self._process.kill()
        self._process.communicate()


@pytest.fixture
def start() -> Iterator:
    started = []

    def begin(folder: Path | str) -> Process:
        started.append(Process(folder))
        return started[-1]

    yield begin
    for process in started:
        process.end(is_killed=True)


@pytest.mark.parametrize("is_killed", [False, True])
def test_the_second_run_says_who_writes_and_goes_on_after_it(
    is_killed, start, checkpoint, tmp_path, capsys
):
    pq.write_table(passages(9), tmp_path / "in.parquet")
    out = tmp_path / "out"
    (out / "vectors").mkdir(parents=True)
    half = out / "vectors" / ".in.parquet.1.tmp"
    half.touch()
    first = start(out)
    first.go_on()
    assert first.read() == "has it\n"
    command = ["embed", str(tmp_path / "in.parquet"), "--out", str(out), "--model", str(checkpoint)]
    assert main(command) == 2
    who = rf"process {first.id} on {socket.gethostname()} since 20..-..-.. ..:..:.. UTC; wait"
    assert re.search(rf"{out} is in use by {who}", capsys.readouterr().err)
    assert half.exists(), "the file that the first run is writing"
    first.end(is_killed)
    assert main(command) == 0
    assert not half.exists()
    assert main(command) == 0, "the lock is free again"


def test_of_several_that_start_together_one_gets_the_folder(start, tmp_path):
    processes = [start(tmp_path / "out") for _ in range(5)]
    for process in processes:
        process.go_on()
    said = [process.read() for process in processes]
    assert said.count("has it\n") == 1
    assert sum("is in use by" in line for line in said) == 4


def test_a_run_on_a_cluster_and_one_here_keep_each_other_out(start, make_job):
    pytest.importorskip("ray")
    job = make_job()
    process = start(Path(job.out))
    process.go_on()
    process.read()
    with pytest.raises(ConfigurationError, match="is in use by process"):
        run_ray(job)
    with pytest.raises(ConfigurationError, match="is in use by process"):
        run(job)


def test_runs_on_one_machine_keep_each_other_out_of_an_object_store(start, make_job):
    job = replace(make_job(), out="memory://locked/out")
    process = start(job.out)
    process.go_on()
    assert process.read() == "has it\n"
    with pytest.raises(ConfigurationError, match=f"{job.out} is in use by process {process.id} on"):
        run(job)
    process.end(is_killed=True)
    assert run(job).rows == 100


def test_a_file_system_without_locks_gets_a_warning(make_job, monkeypatch, caplog):
    def refuse(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert run(make_job()).rows == 100
    assert "cannot be locked ([Errno 38] Function not implemented)" in caplog.text
