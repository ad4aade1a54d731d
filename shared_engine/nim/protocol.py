"""What goes over the wire to a NIM: one request body, one parser, one table of errors.

Sources: NVIDIA's reference of `POST /v1/embeddings` (Text Embedding NIM 2.0) and replies that users
have published; NVIDIA calls the wording of errors unstable, so the status decides first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray
from pybase64 import b64decode

from shared_engine import images
from shared_engine.documents import Document
from shared_engine.errors import (
    AuthenticationError,
    ImageTooLargeError,
    InputTooLongError,
    InvalidRequestError,
    MalformedResponseError,
    ModelNotFoundError,
    NeMoRetrieverError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    RemoteError,
    RequestTimeoutError,
    ServerError,
    UnsupportedDimensionsError,
)
from shared_engine.nim.transport import retry_after
from shared_engine.wire import read_error_index

_LONGEST_DETAIL = 1000
_TOO_LONG = (  # patterns of (tokens, limit); NIM, vLLM, text-embeddings-inference
    re.compile(
        r"length (?P<tokens>\d+) exceeds (?:the )?maximum allowed token size (?P<limit>\d+)"
    ),
    re.compile(r"maximum context length is (?P<limit>\d+) tokens.*?(?P<tokens>\d+) (?:input )?tok"),
    re.compile(r"must have less than (?P<limit>\d+) tokens. Given: (?P<tokens>\d+)"),
    re.compile(r"exceeds? (?:the )?(?:model's )?max\w* (?:allowed )?(?:token|sequence|context)"),
)
_COUNT = (
    r"at most \d+ (?:items|inputs)|too many inputs|number of inputs|batch.*(?:exceed|max|limit|>)"
)
_BATCH = re.compile(_COUNT)
_TOO_LARGE = re.compile(
    rf"{_COUNT}|too large|payload.*(?:exceed|maximum|limit)|reduce the (?:payload|batch|image)"
)


def encoded(document: Document, image_urls: bool = False) -> bytes:
    r"""Return a document as one item of `input`, in JSON: a text, a data URL, or both.

    An image is opened and may be converted, which takes up to seconds.

    >>> encoded(Document(text="a\n"))
    b'"a\\n"'

    Raises:
        InputError: the image cannot be opened; `image_urls` says whether it may be fetched.
    """
    text = json.dumps(document.text or "", ensure_ascii=False).encode()
    if document.image is None:
        return text
    url = images.encode_data_url(document.image, urls=image_urls).encode()
    if document.modality == "image":
        return b'"%b"' % url
    return b'%b\\n%b"' % (text[:-1], url)  # the separator of NVIDIA's own client


def body(fields: Mapping[str, object], inputs: Sequence[bytes]) -> bytes:
    """Return a request: the fields that are not None, and inputs that `encoded` gave.

    >>> body({"model": "m", "input_type": "query", "user": None}, [b'"a"', b'"b"'])
    b'{"model":"m","input_type":"query","input":["a","b"]}'
    """
    wanted = {name: value for name, value in fields.items() if value is not None}
    head = json.dumps(wanted, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join((head[:-1], b',"input":[', b",".join(inputs), b"]}"))


class Reply(NamedTuple):
    """What a server replied, once it is believed."""

    vectors: NDArray[np.float32]
    """(n, d), in the order of the request."""
    tokens: int
    """As the server counted them; 0 if it did not say."""


def parse(content: bytes, n: int, dimensions: int | None = None) -> Reply:
    """Return the vectors of a reply to `n` inputs, each given as floats or as base64 float32.

    Raises:
        MalformedResponseError: not one vector for each input, not all of one length or of
            `dimensions`, or not all finite.
    """
    try:
        reply = orjson.loads(content)
        items = reply["data"]
        rows: list[Any] = [None] * n
        for item in items:
            rows[_index(item["index"], n)] = item["embedding"]
    except (ValueError, TypeError, KeyError, LookupError) as exc:
        raise MalformedResponseError(f"the reply is no list of embeddings: {exc!r:.200}") from None
    if len(items) != n or any(row is None for row in rows):
        given = sum(row is not None for row in rows)
        raise MalformedResponseError(f"the reply has {given} different vectors for {n} inputs")
    try:
        vectors = _stacked(rows)
    except (ValueError, TypeError) as exc:
        raise MalformedResponseError(f"a vector of the reply cannot be read: {exc}") from None
    if dimensions is not None and vectors.shape[1] != dimensions:
        raise MalformedResponseError(
            f"expected vectors of {dimensions} values, the server sent {vectors.shape[1]}"
        )
    if not np.isfinite(vectors).all():
        raise MalformedResponseError("the reply holds NaN or infinity")
    return Reply(vectors, _tokens(reply))


def _index(index: object, n: int) -> int:
    if type(index) is not int or not 0 <= index < n:
        raise ValueError(f"index {index!r:.50} is not in 0..{n - 1}")
    return index


def _stacked(rows: list[Any]) -> NDArray[np.float32]:
    if not all(isinstance(row, str) for row in rows):
        vectors = np.array(rows, np.float32)  # (n, d); ValueError where lengths differ
    else:
        raw = b"".join(first := [b64decode(row, validate=True) for row in rows])
        if {len(row) for row in first} != {len(first[0])}:
            raise ValueError("lengths differ")
        vectors = np.frombuffer(raw, "<f4").reshape(len(rows), -1)  # (n, d)
    if vectors.ndim != 2 or not vectors.shape[1]:
        raise ValueError("expected a list of numbers or base64")
    return vectors


def _tokens(reply: Mapping[str, Any]) -> int:
    usage = reply.get("usage")
    given = usage.get("total_tokens", usage.get("prompt_tokens")) if isinstance(usage, dict) else 0
    return given if type(given) is int and given > 0 else 0


class Refusal(NamedTuple):
    """What is known of a reply that is not a success."""

    status: int
    detail: str
    """The server's own words."""
    location: tuple[object, ...] = ()
    """The path to the field at fault, if the server names it: ("body", "dimensions")."""

    @property
    def field(self) -> object:
        """The name of the field at fault."""
        return next((part for part in self.location if part != "body"), None)

    def about(self, field: str) -> bool:
        """Whether a field of the request is what the server does not take."""
        return self.status in (400, 422) and (
            self.field == field if self.location else field in self.detail
        )

    @property
    def too_large(self) -> bool:
        """Whether a smaller batch may pass."""
        return self.status == 413 or (
            self.status in (400, 422)
            and self.tokens_and_limit is None
            and _TOO_LARGE.search(self.detail.lower()) is not None
        )

    @property
    def by_count(self) -> bool:
        """Whether it was too large by the number of inputs rather than by bytes."""
        return _BATCH.search(self.detail.lower()) is not None

    @property
    def one_input(self) -> bool:
        """Whether one of the inputs is at fault, so that the others pass without it."""
        if self.tokens_and_limit is not None or self.position is not None:
            return True
        return self.status in (400, 422) and self.field == "input" and not self.too_large

    @property
    def unexplained(self) -> bool:
        """Whether only its words tell what is wrong with the request: an unreadable image, say."""
        return (
            self.status in (400, 422)
            and not (self.location or self.too_large or self.about("dimensions"))
            and self.tokens_and_limit is None
        )

    @property
    def position(self) -> int | None:
        """Which of the inputs is at fault, if the server says."""
        if self.status not in (400, 413, 422) or self.field != "input":
            return None
        part = self.location[self.location.index("input") + 1 :][:1]
        return part[0] if part and type(part[0]) is int else None

    @property
    def tokens_and_limit(self) -> tuple[int, int] | None:
        """Length and limit where a text is too long, 0 for what the server does not say."""
        if self.status not in (400, 413, 422):
            return None
        for pattern in _TOO_LONG:
            if match := pattern.search(self.detail):
                given = match.groupdict()
                return int(given.get("tokens") or 0), int(given.get("limit") or 0)
        return None


def refusal(response: httpx.Response) -> Refusal:
    """Read the words of a server from a reply in any of the shapes that NIMs and gateways use.

    >>> def words(**body): return refusal(httpx.Response(400, json=body)).detail
    >>> words(error="Input length 9 exceeds maximum allowed token size 8")
    'Input length 9 exceeds maximum allowed token size 8'
    >>> words(error={"message": "no such model"}), words(detail=[{"msg": "bad", "loc": ["body"]}])
    ('no such model', 'bad')
    >>> words(status=429, title="Too Many Requests")
    'Too Many Requests'
    >>> refusal(httpx.Response(400, json={"object": "error", "message": "Invalid.", "detail": {
    ...     "type": "extra_forbidden", "loc": ["body", "dimensions"], "msg": "Not permitted"}}))
    Refusal(status=400, detail='Invalid. Not permitted', location=('body', 'dimensions'))
    >>> refusal(httpx.Response(413, json={"error": "too large", "index": 2})).position
    2
    """
    try:
        content = response.json()
    except ValueError:
        return Refusal(response.status_code, _short(response.text))
    words: list[str] = []
    location: list[tuple[object, ...]] = []
    _collect(content, words, location)
    if (index := read_error_index(content)) is not None:  # as our own server says it
        location.append(("body", "input", index))
    detail = " ".join(dict.fromkeys(words)) or response.text
    return Refusal(response.status_code, _short(detail), location[0] if location else ())


def _collect(part: object, words: list[str], location: list[tuple[object, ...]]) -> None:
    if isinstance(part, str):
        words.append(part.strip())
    elif isinstance(part, list):
        for item in part[:5]:
            _collect(item, words, location)
    elif isinstance(part, dict):
        if isinstance(part.get("loc"), list):
            location.append(tuple(part["loc"]))
        for name in ("title", "message", "msg", "error", "detail"):
            _collect(part.get(name), words, location)


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST_DETAIL else text[:_LONGEST_DETAIL] + "..."


_BY_STATUS: Mapping[int, tuple[type[RemoteError], str]] = {
    401: (AuthenticationError, "the server does not accept the key; give api_key=, or set "
          "NVIDIA_API_KEY"),
    403: (PermissionDeniedError, "the key may not use this model"),
    404: (ModelNotFoundError, "the server has no such model or path; see GET /v1/models"),
    408: (RequestTimeoutError, "the server gave up on the request"),
    413: (PayloadTooLargeError, "the request is too large, even with one input"),
    429: (RateLimitError, "the server wants fewer requests"),
}  # fmt: skip


def error(response: httpx.Response, said: Refusal, has_image: bool = False) -> NeMoRetrieverError:
    """Return the error of a reply that is not a success."""
    if (lengths := said.tokens_and_limit) is not None:
        tokens, limit = lengths
        return InputTooLongError(
            f"is too long for the server ({said.detail}); split it, or choose what "
            'is cut with truncate="START" or "END"',
            tokens=tokens,
            limit=limit,
        )
    if said.about("dimensions"):
        return UnsupportedDimensionsError(f"the server refuses the dimensions: {said.detail}")
    if said.too_large and has_image:
        return ImageTooLargeError(
            f"has an image that is too large for the server ({said.status}): {said.detail}"
        )
    kind, meaning = _BY_STATUS.get(said.status, (InvalidRequestError, "the server refuses this"))
    if said.status >= 500:
        kind, meaning = ServerError, "the server failed"
    elif said.too_large:
        kind, meaning = _BY_STATUS[413]
    elif 300 <= said.status < 400:
        target = httpx.URL(response.headers.get("location", "")).copy_with(query=None)
        kind, meaning = InvalidRequestError, f"the server redirects to {target}; set base_url to it"
    ids = (response.headers.get(name) for name in ("nvcf-reqid", "x-request-id"))
    request_id = next((value for value in ids if value), None)
    words = f"{meaning} ({said.status}): {said.detail}"
    if request_id:
        words += f" [request {request_id}]"
    out = kind(words, status=said.status, detail=said.detail, request_id=request_id)
    if isinstance(out, RateLimitError):
        out.retry_after = retry_after(response.headers)
    return out


def models(response: httpx.Response) -> dict[str, str | None]:
    """Return the ids that `/v1/models` lists, each with its `root`; none where it cannot.

    >>> models(httpx.Response(200, json={"data": [{"id": "mine", "root": "nvidia/m"}]}))
    {'mine': 'nvidia/m'}
    >>> models(httpx.Response(404))
    {}
    """
    try:
        items = response.json()["data"] if response.is_success else []
        return {item["id"]: item.get("root") for item in items if isinstance(item["id"], str)}
    except (ValueError, TypeError, LookupError, AttributeError):
        return {}
