"""Runs that are interrupted: they end in seconds, without a traceback, and resume."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import orjson
import psutil
import pyarrow.parquet as pq
import pytest

from shared_engine import Embedder, Options
from shared_engine.bulk.fragment import embed_fragment
from shared_engine.bulk.run import begin, find_work
from shared_engine.errors import EngineClosedError
from tests.bulk.conftest import passages
from tests.conftest import ROOT
from tests.support import pdfs
from tests.support.nim import MODEL, answer, write_metadata, write_models
from tests.support.servers import wait_for


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hanging

    def do_GET(self) -> None:
        self._send(write_metadata() if "metadata" in self.path else write_models([MODEL]))

    def do_POST(self) -> None:
        if self.server.is_uploading:
            self.server.is_hanging.set()
            self.server.released.wait()
        body = orjson.loads(self.rfile.read(int(self.headers["content-length"])))
        if any(text.startswith("passage 9") for text in body["input"]):
            self.server.is_hanging.set()
            self.server.released.wait()
        self._send(answer(body))

    def _send(self, content: bytes) -> None:
        self.send_response(200)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Hanging(ThreadingHTTPServer):
    """A NIM that does not answer passages with a 9 in front, or reads no body, until released."""

    is_uploading = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.is_hanging, self.released = threading.Event(), threading.Event()

    def handle_error(self, *_: object) -> None:
        """Print nothing: the client is gone."""


@pytest.fixture
def hanging() -> Iterator[Hanging]:
    server = Hanging()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    thread.join()
    server.server_close()


def start(
    server: Hanging, tmp_path: Path, name: str = "in.parquet", *more: str
) -> subprocess.Popen[str]:
    command = [
        "embed", str(tmp_path / name), "--out", str(tmp_path / "out"),
        "--rows-per-file", "5", "--base-url", f"http://127.0.0.1:{server.server_port}",
        "--max-batch-size", "5", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-m", "shared_engine.cli", *command],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.parametrize("is_uploading", [False, True])
def test_an_interrupt_ends_a_run_whose_server_hangs(hanging, tmp_path, is_uploading):
    pq.write_table(passages(100), tmp_path / "in.parquet")
    hanging.is_uploading = is_uploading
    process = start(hanging, tmp_path)
    assert hanging.is_hanging.wait(60)
    done = 0 if is_uploading else 1  # the first file, before the passages that hang
    wait_for(lambda: len(list(tmp_path.glob("out/vectors/in-*"))) >= done)
    before = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - before < 20
    assert "Traceback" not in errors
    kept = {path.name for path in tmp_path.glob("out/vectors/*")}
    hanging.is_uploading = False
    hanging.released.set()
    process = start(hanging, tmp_path)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    assert kept < {path.name for path in tmp_path.glob("out/vectors/*")}
    assert f"{100 - 5 * len(kept)} rows done" in output
    assert pq.read_table(tmp_path / "out" / "vectors").num_rows == 100


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_the_end_of_a_run_ends_the_reading_of_a_page_that_never_ends(hanging, tmp_path, how):
    (tmp_path / "in.pdf").write_bytes(pdfs.write(pdfs.ENDLESS))
    process = start(hanging, tmp_path, "in.pdf", "--pdf", "text")
    try:
        reader = pdfs.find_reader(process.pid)
        before = time.monotonic()
        process.send_signal(how)
        assert process.wait(60) == {signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[how]
        memory = 0
        with suppress(psutil.NoSuchProcess):
            while reader.status() != psutil.STATUS_ZOMBIE:
                memory = max(memory, reader.memory_info().rss)
                assert time.monotonic() - before < 10
        assert time.monotonic() - before < 10
        assert memory < 800_000_000, "its own limit, 2 GB, ended it"
        _, errors = process.communicate()
    finally:
        process.kill()
    assert "Traceback" not in errors


def test_a_second_interrupt_ends_the_process_immediately():
    code = (
        "import sys, time\n"
        "from shared_engine.cli import main\n"
        "def hang(args):\n"
        "    try:\n"
        "        print('first', flush=True); time.sleep(60)\n"
        "    finally:\n"
        "        print('second', flush=True); time.sleep(60)\n"
        "main.check.run = hang\n"
        "sys.argv = ['nemoretriever', 'check']\n"
        "sys.exit(main.main())\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    for line in ("first\n", "second\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")


def test_a_stream_that_another_thread_closes_writes_no_file(make_job):
    job = make_job()
    with begin(job) as work, Embedder(job.options) as embedder:
        with pytest.raises(EngineClosedError, match="the run was stopped"):
            embed_fragment(job, embedder, work.missing[0], on_stream=lambda stream: stream.close())
        assert find_work(job).done == {}


def test_leaving_a_block_by_an_error_cancels_its_work(hanging):
    hanging.is_uploading = True
    options = Options(base_url=f"http://127.0.0.1:{hanging.server_port}")

    def fail() -> None:
        with Embedder(options) as embedder:
            embedder._pipeline.submit(["a"])
            assert hanging.is_hanging.wait(30)
            raise KeyError

    before = time.monotonic()
    with pytest.raises(KeyError):
        fail()
    assert time.monotonic() - before < 20
