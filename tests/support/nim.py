"""Replies of a NIM, for all fakes: vectors that depend on the text alone, and one writer.

No two texts have the same vector, so a test notices a row that is lost, swapped or invented.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from shared_engine import Embedder, Options

MODEL = "nvidia/llama-nemotron-embed-1b-v2"
WIDTH = 16


def vector(text: str, input_type: str = "passage", width: int = WIDTH) -> NDArray[np.float32]:
    """Return the unit vector of a text in a role."""
    seed = hashlib.sha256(f"{input_type}: {text}".encode()).digest()[:8]
    out = np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(width)
    return (out / np.linalg.norm(out)).astype(np.float32)


def vectors(texts: Sequence[str], input_type: str = "passage") -> NDArray[np.float32]:
    return np.stack([vector(text, input_type) for text in texts])


def encode_vector(row: NDArray[np.float32], encoding: str = "float") -> bytes:
    """Return the JSON of a vector in the requested `encoding_format`."""
    if encoding == "base64":
        return b'"%b"' % base64.b64encode(row.astype("<f4").tobytes())
    return json.dumps(row.tolist()).encode()


def write_reply(
    values: Iterable[tuple[int, bytes]], model: str = MODEL, tokens: int | None = None
) -> bytes:
    """Return the body of a reply with the JSON of vectors, each with its index, in this order."""
    items = b",".join(
        b'{"object":"embedding","index":%d,"embedding":%b}' % (index, value)
        for index, value in values
    )
    usage = b""
    if tokens is not None:
        usage = b',"usage":{"prompt_tokens":%d,"total_tokens":%d}' % (tokens, tokens)
    name = json.dumps(model).encode()
    return b'{"object":"list","data":[%b],"model":%b%b}' % (items, name, usage)


def embed(body: Mapping[str, Any]) -> list[tuple[int, NDArray[np.float32]]]:
    """Return the vectors that a request is about, each with its index."""
    width = body.get("dimensions", WIDTH)
    rows = vectors(body["input"], body["input_type"])[:, :width]
    return list(enumerate(rows))


def answer(
    body: Mapping[str, Any], rows: Iterable[tuple[int, NDArray[np.float32]]] | None = None
) -> bytes:
    """Return the body of a NIM's reply to a request.

    Args:
        rows: Vectors to send instead of the right ones, each with its index.
    """
    rows = embed(body) if rows is None else rows
    encoding = body.get("encoding_format", "float")
    tokens = sum(len(text.split()) for text in body["input"])
    values = ((index, encode_vector(row, encoding)) for index, row in rows)
    return write_reply(values, body["model"], tokens)


def write_models(models: Iterable[str | Mapping[str, Any]]) -> bytes:
    """Return the body of a list of models, given by name or as rows."""
    rows = [{"id": row, "object": "model"} if isinstance(row, str) else row for row in models]
    return json.dumps({"object": "list", "data": rows}).encode()


def write_metadata(model: str = MODEL) -> bytes:
    """Return the body of `GET /v1/metadata`, which identifies a NIM."""
    facts = {"version": "2.4.0", "modelInfo": [{"shortName": model, "modelUrl": ""}]}
    return json.dumps(facts).encode()


Answer = Callable[[httpx.Request, dict[str, Any]], httpx.Response | None]


class Nim:
    """A NIM without a socket, which keeps its requests."""

    def __init__(self, answer: Answer | None = None, models: tuple[str, ...] = (MODEL,)) -> None:
        """Create the server.

        Args:
            answer: Called first with each request; a response that it returns is the reply.
        """
        self.requests: list[httpx.Request] = []
        self.bodies: list[dict[str, Any]] = []
        """Bodies of the requests that it answered with vectors."""
        self._answer = answer
        self._models = models

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        body = json.loads(request.content) if request.content else {}
        given = self._answer(request, body) if self._answer else None
        if given is not None:
            return given
        if request.url.path.endswith("/metadata"):
            return httpx.Response(200, content=write_metadata())
        if request.method == "GET":
            return httpx.Response(200, content=write_models(self._models))
        self.bodies.append(body)
        return httpx.Response(200, content=answer(body))

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.MockTransport(self))

    def embedder(self, **options: Any) -> Embedder:
        options = {"base_url": "http://nim:8000", "model": MODEL, **options}
        return Embedder(Options(http_client_factory=self.client, max_retries=0, **options))
