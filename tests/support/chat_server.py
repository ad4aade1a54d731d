"""A language model's server on a real socket: OpenAI's protocol, with one scripted answer."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class ChatServer:
    """What the server answers, and what it was asked."""

    answer: str = "It is red [1]."
    status: int = 200
    released: threading.Event = field(default_factory=threading.Event)
    """Cleared, an answer waits for it."""
    keys: list[str | None] = field(default_factory=list)
    """The Authorization of each request."""
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""

    def __post_init__(self) -> None:
        self.released.set()


@contextmanager
def serve_chat() -> Iterator[ChatServer]:
    """Serve a model called `a-model` at a free port."""
    chat = ChatServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            chat.keys.append(self.headers["Authorization"])
            self._send(json.dumps({"data": [{"id": "a-model"}]}), "application/json")

        def do_POST(self) -> None:
            chat.keys.append(self.headers["Authorization"])
            length = int(self.headers["Content-Length"])
            chat.asked.append(json.loads(self.rfile.read(length)))
            chat.released.wait(30)
            if chat.status != 200:
                quoted = f"unwelcome: {self.headers['Authorization']}"
                self._send(json.dumps({"title": quoted}), "application/json")
                return
            if not chat.asked[-1].get("stream"):
                message = {"role": "assistant", "content": chat.answer}
                reply = {"choices": [{"index": 0, "message": message}]}
                self._send(json.dumps(reply), "application/json")
                return
            pieces = [
                {"choices": [{"index": 0, "delta": {"role": "assistant", "content": word}}]}
                for word in chat.answer.splitlines(keepends=True)
            ]
            lines = "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces)
            self._send(f"{lines}data: [DONE]\n\n", "text/event-stream")

        def _send(self, text: str, kind: str) -> None:
            content = text.encode()
            self.send_response(chat.status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            if chat.status in (301, 307):
                self.send_header("Location", f"{chat.url}/elsewhere")
            self.end_headers()
            self.wfile.write(content)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        chat.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,))
        thread.start()
        try:
            yield chat
        finally:
            chat.released.set()
            server.shutdown()
            thread.join()
