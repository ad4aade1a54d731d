"""Results in an object store: those of a local folder, whole or not there, resumed after a kill."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from pyarrow import fs

from shared_engine import Embedder, Options
from shared_engine.bulk.files import read_bytes, write_atomically
from shared_engine.bulk.fragment import embed_fragment
from shared_engine.bulk.job import Job
from shared_engine.bulk.run import begin
from shared_engine.bulk.urls import locate
from shared_engine.cli.main import main
from shared_engine.errors import ConfigurationError, OutputError
from tests.bulk.conftest import passages, run
from tests.conftest import ROOT

OUT = "memory://bucket/out"


@pytest.fixture
def remote() -> Iterator[Any]:
    """A file system in memory, which pyarrow reaches through fsspec."""
    files = fsspec.filesystem("memory")
    yield files
    files.rm("/", recursive=True)


def read(out: str, name: str = "vectors") -> list[dict[str, Any]]:
    """Return the rows of the results, by id."""
    system, path = locate(out)
    table = pq.read_table(f"{path}/{name}", filesystem=system)
    return sorted(table.to_pylist(), key=lambda row: (row["id"] is None, row["id"]))


def list_names(out: str) -> list[str]:
    """Return the names of all files of the results."""
    system, path = locate(out)
    found = system.get_file_info(fs.FileSelector(path, allow_not_found=True, recursive=True))
    return sorted(info.path.removeprefix(path) for info in found if info.is_file)


def write_csv(path: Path, rows: int, bad: int = 0) -> None:
    """Write a table with texts, of which the first `bad` are empty."""
    lines = (f"{n:06},{'' if n < bad else f'text {n % 97}'},0{n}\n" for n in range(rows))
    path.write_text("key,text,zip\n" + "".join(lines))


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_results_are_those_of_a_folder_and_are_resumed(
    suffix: str, remote: Any, tmp_path: Path, make_job: Callable[..., Job]
) -> None:
    source = tmp_path / f"in{suffix}"
    write_csv(source, 100, bad=3)
    if suffix == ".parquet":
        values = pa.array([None, *(f"text {n}" for n in range(99))])
        pq.write_table(pa.table({"key": range(100), "text": values, "zip": range(100)}), source)
    here = make_job(source, columns=("zip",))
    run(here)
    there = replace(here, out=OUT)
    summary = run(there)
    names = list_names(OUT)
    assert names == [name for name in list_names(here.out) if name != "/run.lock"]
    assert read(OUT) == read(here.out)
    assert read(OUT, "errors.parquet") == read(here.out, "errors.parquet")
    remote.rm(f"/bucket/out{names[-1]}")
    assert run(there).rows == 10, "of the last of four fragments"
    assert run(there).skipped == summary.rows
    assert list_names(OUT) == names
    with pytest.raises(ConfigurationError, match="was begun with role 'document'"):
        run(replace(there, role="query"))


def test_results_inside_of_the_inputs_are_no_inputs(
    remote: Any, make_job: Callable[..., Job]
) -> None:
    remote.makedirs("/bucket/in")
    with remote.open("/bucket/in/a.parquet", "wb") as file:
        pq.write_table(passages(9), file)
    job = replace(make_job(), inputs=("memory://bucket/in",), out="memory://bucket/in/out/")
    assert (run(job).rows, run(job).skipped) == (9, 9)


@pytest.mark.parametrize("content", [b"", b"{"])
def test_a_damaged_record_is_named(
    content: bytes, remote: Any, make_job: Callable[..., Job]
) -> None:
    job = replace(make_job(), out=OUT)
    run(job)
    remote.pipe("/bucket/out/job.json", content)
    with pytest.raises(ConfigurationError, match=re.escape(f"{OUT}/job.json is damaged")):
        run(job)


@pytest.mark.parametrize("is_remote", [False, True])
def test_no_file_appears_after_another_engine_has_replaced_the_record(
    is_remote: bool, remote: Any, make_job: Callable[..., Job]
) -> None:
    """The last of several processes that write the record together wins."""
    remote.makedirs("/bucket")
    job = replace(make_job(), out=OUT) if is_remote else make_job()
    path = f"{job.out}/engine.json"

    def replace_record(*_: int) -> None:
        record = json.loads(read_bytes(path) or b"") | {"cache_key": "another"}
        with write_atomically(path) as name:
            Path(name).write_text(json.dumps(record))

    said = pytest.raises(ConfigurationError, match="was begun with cache_key 'another'")
    with begin(job) as work, Embedder(job.options) as embedder, said:
        embed_fragment(job, embedder, work.missing[0], on_rows=replace_record)
    assert not any(name.startswith("/vectors") for name in list_names(job.out))


def test_a_file_that_is_not_finished_is_not_there(remote: Any) -> None:
    def write(content: bytes, error: Exception | None) -> None:
        with write_atomically("memory://bucket/a") as name:
            Path(name).write_bytes(content)
            if error is not None:
                raise error

    with pytest.raises(KeyError):
        write(b"half", KeyError())
    assert not remote.exists("/bucket/a")
    write(b"old", None)
    with pytest.raises(KeyError):
        write(b"half", KeyError())
    assert remote.cat("/bucket/a") == b"old"


class Frozen(MemoryFileSystem):
    """Has no writes, as the one of http://."""

    protocol = "frozen"

    def _open(self, path: str, mode: str = "rb", **more: Any) -> Any:
        if mode == "wb":
            raise NotImplementedError("no writes")
        return super()._open(path, mode, **more)


fsspec.register_implementation("frozen", Frozen)


@pytest.mark.parametrize(
    ("out", "error", "said"),
    [
        ("memory://bucket/out?region=x", ConfigurationError, "options after . are not read"),
        ("no-such://bucket/out", ConfigurationError, "no-such://bucket cannot be opened"),
        (
            "frozen://bucket/out",
            OutputError,
            r"frozen:.* cannot be written: .*no writes",
        ),
        ("out", ConfigurationError, "out: expected an absolute path or a URL"),
    ],
)
def test_a_url_that_holds_no_results_is_refused(
    out: str, error: type[Exception], said: str, make_job: Callable[..., Job]
) -> None:
    with pytest.raises(error, match=said):
        run(replace(make_job(), out=out))


# On a server with the API of S3


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pytest.importorskip("moto")  # see the Makefile
    log = tmp_path_factory.mktemp("moto") / "log"
    command = (sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0")
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:
        while not (urls := re.findall(r"on (http://[\w.:]+)", log.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
        yield urls[0]
        process.kill()


@pytest.fixture
def bucket(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a new bucket."""
    settings = {
        "AWS_ENDPOINT_URL": server,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    name = re.sub(r"\W|_", "-", tmp_path.name.lower())
    with urlopen(Request(f"{server}/{name}", method="PUT")):
        return f"s3://{name}"


def upload(path: Path, url: str) -> None:
    system, inner = locate(url)
    fs.copy_files(str(path), inner, fs.LocalFileSystem(), system)


@pytest.mark.slow
@pytest.mark.parametrize("is_on_ray", [False, True])
def test_the_command_reads_and_writes_s3(
    is_on_ray: bool, bucket: str, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write_csv(tmp_path / "a.csv", 100, bad=3)
    upload(tmp_path / "a.csv", f"{bucket}/in/a.csv")
    more = ("--ray", "--workers", "1") if is_on_ray else ()
    if is_on_ray:
        pytest.importorskip("ray")
    out = f"{bucket}/in/out"
    command = [
        "embed", f"{bucket}/in", "--out", f"{out}/", "--model", str(checkpoint),
        "--id-column", "key", "--columns", "zip", "--rows-per-file", "30", *more,
    ]  # fmt: skip
    assert main(command) == 1
    assert f"see {out}/errors.parquet" in capsys.readouterr().err
    assert [row["zip"] for row in read(out)] == [f"0{n}" for n in range(3, 100)]
    assert [row["index"] for row in read(out, "errors.parquet")] == [0, 1, 2]
    assert not any(name.startswith("/.") for name in list_names(out))
    assert main(command) == 0
    assert "97 skipped (done before)" in capsys.readouterr().out


@pytest.mark.slow
def test_a_bucket_that_is_not_there_is_an_output_error(
    bucket: str, make_job: Callable[..., Job]
) -> None:
    with pytest.raises(OutputError, match=f"{bucket}-no/out cannot be written: .*not found"):
        run(replace(make_job(), out=f"{bucket}-no/out"))


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_resumed(
    bucket: str, checkpoint: Path, tmp_path: Path
) -> None:
    write_csv(tmp_path / "in.csv", 4_000)
    out = f"{bucket}/out"
    command = (
        sys.executable, "-m", "shared_engine.cli", "embed", str(tmp_path / "in.csv"), "--out", out,
        "--model", str(checkpoint), "--dtype", "float32", "--id-column", "key",
        "--rows-per-file", "100",
    )  # fmt: skip
    kills = 0
    for count in (3, 15, 27):
        process = subprocess.Popen(command, cwd=ROOT)
        while process.poll() is None:
            if sum(name.startswith("/vectors/") for name in list_names(out)) >= count:
                process.send_signal(signal.SIGKILL)
                process.wait()
                kills += 1
    assert kills == 3
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 0
    rows = read(out)
    assert [row["id"] for row in rows] == [f"{n:06}" for n in range(4_000)]
    with Embedder(Options(model=str(checkpoint), dtype="float32")) as embedder:
        expected = embedder.embed([f"text {n}" for n in range(97)])
    found = np.array([row["vector"] for row in rows])
    np.testing.assert_allclose(found, expected[np.arange(4_000) % 97], atol=1e-6)
