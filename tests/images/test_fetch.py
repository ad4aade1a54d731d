"""Images from addresses: of the public internet only, within one deadline."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpcore
import pytest

from shared_engine import ImageError
from shared_engine.images import fetch, sources
from shared_engine.images.encode import encode_data_url
from shared_engine.images.tiles import cut_tiles
from tests.support.image_files import HTML, PNG


class Pages(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        path, _, rest = self.path[1:].partition("?")
        getattr(self, f"_{path}", lambda rest: self.send_error(404))(rest)

    def _png(self, rest: str) -> None:
        self._send(200, PNG, "image/png")

    def _html(self, rest: str) -> None:
        self._send(200, HTML, "image/png")

    def _to(self, rest: str) -> None:
        self.send_response(302)
        self.send_header("Location", rest)
        self.end_headers()

    def _loop(self, rest: str) -> None:
        self._to("/loop")

    def _large(self, rest: str) -> None:
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(bytes(1 << 20))

    def _drip(self, rest: str) -> None:
        """Headers without end, a few bytes at a time, none of them late."""
        with suppress(OSError):
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                self.wfile.write(b"X: 1\r\n")
                time.sleep(0.02)

    def _headers(self, rest: str) -> None:
        self._send(200, f"{self.requestline}\n{self.headers}".encode(), "text/plain")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Pages) as pages:
        thread = threading.Thread(target=pages.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{pages.server_port}"
        pages.shutdown()
        thread.join()


def fetched(url: str, seconds: float = 10.0) -> bytes:
    """Fetch as `cut_tiles(urls=True)` does, but from this machine's own 127.0.0.1 as well."""

    def allowed(address: fetch.IPAddress) -> bool:
        return fetch.is_public(address) or str(address) == "127.0.0.1"

    return sources._join(fetch.fetch(url, allowed, seconds))


def test_a_url_is_fetched(server):
    assert fetched(f"{server}/png") == PNG
    assert fetched(f"{server}/to?png#x") == PNG
    assert fetched(f"{server}/to?{server}/to?/to?/png") == PNG


def test_a_fetch_sends_no_credentials(server, monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    asked = fetched(server.replace("//", "//user:secret@") + "/headers?q=a b&ä").decode()
    assert asked.startswith("GET /headers?q=a%20b&%C3%A4 HTTP/1.1\n")
    assert f"Host: {server[7:]}" in asked
    assert "User-Agent: nemoretriever-embeddings/" in asked  # some sites answer no other request
    assert "uthorization" not in asked
    assert "ookie" not in asked


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("/nothing", "status 404"),
        ("/loop", "more than 3 times"),
        ("/to?/to?/to?/to?/png", "more than 3 times"),
        ("/to?file:///etc/hostname", "redirects to file"),
        ("/to?http://127.0.0.2/", "127.0.0.2, which is not on the public"),
        ("/to?http://169.254.169.254/latest/meta-data", "169.254.169.254"),
        ("/large", "25,000,000 bytes"),
    ],
)
def test_a_wrong_reply_is_refused(server, path, words):
    with pytest.raises(ValueError, match=words):
        fetched(server + path)


def test_a_slow_server_meets_the_deadline(server):
    start = time.monotonic()
    with pytest.raises(httpcore.ReadTimeout):
        fetched(f"{server}/drip", seconds=0.3)
    assert time.monotonic() - start < 2


def test_a_fetched_file_must_be_an_image(server):
    with pytest.raises(ImageError, match="a web page; expected a PNG"):
        cut_tiles(fetched(f"{server}/html"), 2)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0", "0.0.0.0"),
        *("10.0.0.1", "172.16.0.1", "192.168.1.1", "100.64.0.1", "169.254.169.254"),
        *("224.0.0.1", "240.0.0.1", "255.255.255.255", "192.0.2.1", "198.18.0.1", "localhost"),
        *("[::1]", "[::]", "[fe80::1]", "[fd00::1]", "[ff02::1]", "[::ffff:127.0.0.1]"),
        *("[::ffff:10.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "[::127.0.0.1]"),
        *("[fec0::1]", "[64:ff9b:1::a00:1]", "[ff0e::1]", "[::ffff:0:a00:1]", "[2001:0:a00:1::]"),
    ],
)
def test_private_addresses_are_never_connected_to(host, monkeypatch):
    monkeypatch.setattr(socket, "create_connection", lambda *_, **__: pytest.fail("connected"))
    for use in (
        lambda url: cut_tiles(url, 2, urls=True),
        lambda url: encode_data_url(url, urls=True),
    ):
        with pytest.raises(ImageError, match=r"not on the public internet|Invalid IPv4") as caught:
            use(f"http://{host}/latest/meta-data?key=secret")
        assert "secret" not in str(caught.value)


@pytest.mark.parametrize("found", [["93.184.215.14", "10.0.0.1"], ["2606:4700::1", "::1"]])
def test_a_host_with_any_private_address_is_refused(found, monkeypatch):
    rows = [(0, 0, 0, "", (address, 443)) for address in found]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: rows)
    with pytest.raises(ImageError, match=r"is at (10\.0\.0\.1|::1), which"):
        cut_tiles("https://pages.example/a.png", 2, urls=True)


def test_the_connection_goes_to_the_checked_address(monkeypatch):
    """A second look-up, which could answer otherwise, never happens."""
    answers = iter([[(0, 0, 0, "", ("93.184.215.14", 80))]])
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: next(answers))
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], *_: object, **__: object) -> socket.socket:
        asked.append(address)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(ImageError, match="no network in tests"):
        cut_tiles("http://pages.example/a.png", 2, urls=True)
    assert asked == [("93.184.215.14", 80)]


@pytest.mark.parametrize(
    "url", ["http://", "http://[", "http://a..b/", "http://a:99999/", "http:///a"]
)
def test_invalid_urls_are_refused(url):
    with pytest.raises(ImageError):
        cut_tiles(url, 2, urls=True)


def test_the_deadline_includes_the_lookup(server, monkeypatch):
    look_up = socket.getaddrinfo

    def slow(*args: object, **options: object) -> object:
        time.sleep(0.3)
        return look_up(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    start = time.monotonic()
    with pytest.raises(httpcore.TimeoutException):
        fetched(f"{server}/drip", seconds=0.5)
    assert time.monotonic() - start < 5


def test_a_host_without_an_address_is_refused(monkeypatch):
    def look_up(*_: object, **__: object) -> list[object]:
        raise socket.gaierror(-2, "Name not known")

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    with pytest.raises(ImageError, match="Name not known"):
        cut_tiles("https://pages.example/a.png", 2, urls=True)


def test_the_next_address_is_tried_where_one_does_not_answer(server, monkeypatch):
    found, look_up = ["127.0.0.2", "127.0.0.1"], socket.getaddrinfo

    def answer(host: str, port: int, *args: int, **options: int) -> list[Any]:
        hosts = found if host == "pages.example" else [host]
        return [row for each in hosts for row in look_up(each, port, *args, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    url = server.replace("127.0.0.1", "pages.example") + "/png"
    assert b"".join(fetch.fetch(url, lambda _: True)) == PNG
    found.pop()
    with pytest.raises(httpcore.ConnectError):
        list(fetch.fetch(url, lambda _: True))
