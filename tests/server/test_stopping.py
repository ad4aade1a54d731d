"""The end of the server: real processes, sockets and signals."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from tests.conftest import ROOT
from tests.support.checkpoints import SHAPES, build_checkpoint
from tests.support.servers import NAME, wait_for

LONG = ["some words of a long document " * 200] * 1000
"""More work than any test waits for."""
HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n"
    b"Content-Type: application/json\r\nContent-Length: 1000\r\n"
)


class Process:
    """`nemoretriever serve` in a process."""

    def __init__(self, checkpoint: Path, *options: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "shared_engine.cli", "serve", str(checkpoint)]
        command += ["--served-name", NAME, "--port", str(self.port), "--access-log", *options]
        self._process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}/v1", timeout=60)
        self.signal = self._process.send_signal

    def _read(self) -> None:
        assert self._process.stderr
        self.lines.extend(self._process.stderr)

    def wait_for_line(self, words: str) -> None:
        """Return when the log has a line with these words."""
        wait_for(lambda: any(words in line for line in list(self.lines)), seconds=60)

    def read_metrics(self) -> str:
        """Return the metrics."""
        return self.client.get("/metrics").text

    def post(self, texts: list[str], role: str) -> httpx.Response:
        """Post texts."""
        body = {"model": NAME, "input": texts, "input_type": role, "truncate": "END"}
        return self.client.post("/embeddings", json=body)

    def connect(self) -> socket.socket:
        """Return a connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout=30)

    def wait(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and the log."""
        code = self._process.wait(60)
        self._reader.join()
        return code, "".join(self.lines)

    def close(self) -> None:
        """End the process if it runs."""
        self.client.close()
        self._process.kill()
        self.wait()
        assert self._process.stderr
        self._process.stderr.close()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp("tiny"), SHAPES["sentence-transformers"])


@pytest.fixture
def start(checkpoint: Path) -> Iterator[Callable[..., Process]]:
    with ExitStack() as stack:

        def start(*options: str) -> Process:
            process = Process(checkpoint, *options)
            stack.callback(process.close)
            return process

        yield start


def test_accepted_requests_have_the_grace_time_and_others_none(
    start: Callable[..., Process],
) -> None:
    server = start("--grace-seconds", "1")
    server.wait_for_line("INFO: serving")
    with ThreadPoolExecutor() as pool, ExitStack() as stack:
        unread = stack.enter_context(server.connect())
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        body = json.dumps({"model": NAME, "input": ["a"] * 8000, "input_type": "query"}).encode()
        unread.sendall(HEAD.replace(b"1000", b"%d" % len(body)) + b"\r\n" + body)
        assert unread.recv(100).startswith(b"HTTP/1.1 200")

        idle, *half_sent = (stack.enter_context(server.connect()) for _ in range(3))
        idle.sendall(b"GET /v1/health/live HTTP/1.1\r\nHost: localhost\r\n\r\n")
        reply = idle.recv(4096)
        while not reply.endswith(b'"live":true}'):
            reply += idle.recv(4096)
        for connection, part in zip(half_sent, (b"", HEAD), strict=True):
            connection.sendall(part)
        answers = [pool.submit(server.post, LONG, role) for role in ("passage", "query")]
        wait_for(lambda: f"queue_inputs {2 * len(LONG)}.0" in server.read_metrics())

        before = time.monotonic()
        server.signal(signal.SIGINT)
        for connection in (idle, *half_sent):
            assert connection.recv(4096) == b""
        assert not any(answer.done() for answer in answers)
        assert [answer.result().status_code for answer in answers] == [503, 503]
        assert answers[0].result().json()["message"] == "the server is stopping"
        assert all(answer.result().headers["x-request-id"] for answer in answers)
        code, log = server.wait()
    assert time.monotonic() - before < 20
    assert code == -signal.SIGINT
    assert "Traceback" not in log
    assert log.count("POST /v1/embeddings 503") == 2


def test_a_body_that_is_half_sent_has_the_grace_time(start: Callable[..., Process]) -> None:
    server = start()
    server.wait_for_line("INFO: serving")
    body = json.dumps({"model": NAME, "input": "a", "input_type": "query"}).encode()
    with server.connect() as connection:
        connection.sendall(HEAD.replace(b"1000", b"%d" % len(body)) + b"\r\n" + body[:9])
        server.signal(signal.SIGTERM)
        server.wait_for_line("Waiting for connections to close")
        connection.sendall(body[9:])
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    code, log = server.wait()
    assert code == -signal.SIGTERM
    assert "Traceback" not in log


def test_a_second_interrupt_ends_the_process(start: Callable[..., Process]) -> None:
    server = start()
    server.wait_for_line("INFO: serving")
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(server.post, LONG, "passage")
        wait_for(lambda: f"queue_inputs {len(LONG)}.0" in server.read_metrics())
        server.signal(signal.SIGINT)
        server.wait_for_line("Waiting for connections to close")
        before = time.monotonic()
        server.signal(signal.SIGINT)
        code, log = server.wait()
        assert time.monotonic() - before < 10
        assert isinstance(answer.exception(), httpx.TransportError)
    assert code == 128 + signal.SIGINT
    assert "Traceback" not in log


def test_a_signal_while_the_model_loads(start: Callable[..., Process]) -> None:
    server = start()
    server.wait_for_line("Uvicorn running on")
    before = time.monotonic()
    server.signal(signal.SIGTERM)
    code, log = server.wait()
    assert time.monotonic() - before < 20
    assert code == -signal.SIGTERM
    assert "Traceback" not in log
