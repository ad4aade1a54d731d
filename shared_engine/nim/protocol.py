"""What goes over the wire to a NIM: one request body, one parser, one table of errors.

Sources: NVIDIA's reference of `POST /v1/embeddings` (Text Embedding NIM 2.0) and replies that users
have published; NVIDIA calls the wording of errors unstable, so the status decides first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray
from pybase64 import b64decode

from shared_engine import images
from shared_engine.documents import EmbeddingInput, Modality
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
from shared_engine.nim.transport import read_retry_after
from shared_engine.wire import read_error_index

_WHITE = (  # a PNG of 64 x 64 pixels
    b"data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAIAAAAlC+aJAAAAS0lEQVR42u3PMQ"
    b"0AAAwDoPo33UrYvQQckD4XAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAY"
    b"HLAMpT0sIcNbcEAAAAAElFTkSuQmCC"
)
PROBES: Mapping[Modality, bytes] = {
    "text": b'"?"',
    "image": b'"%b"' % _WHITE,
    "text_image": b'"?\\n%b"' % _WHITE,
}
"""Inputs that nothing is wrong with, as `encode_input` gives them."""
MOST_VALUES = 16_384
"""Values of a vector, where nobody knows how long it is."""
_BYTES_PER_VALUE = 32
"""The most that one needs in JSON, indented; base64 needs six, but servers choose."""
_LONGEST_DETAIL = 1000
_DEEPEST = 8
"""Levels of an error's body that are looked at."""
_NOT_AN_INPUT = frozenset({401, 402, 404, 405, 407, 408, 410, 421, 425, 426, 429})
"""Statuses of 4xx that are never an input's fault. 403 may be: gateways refuse texts so, too."""
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


def encode_input(
    document: EmbeddingInput, allow_image_urls: bool = False, most_characters: int | None = None
) -> bytes:
    r"""Return a document as one item of `input`, in JSON: a text, a data URL, or both.

    An image is opened and may be converted, which takes up to seconds. One whose data URL has more
    than `most_characters` is made smaller.

    >>> encode_input(EmbeddingInput(text="a\n"))
    b'"a\\n"'

    Raises:
        InputError: the image cannot be opened; `allow_image_urls` says whether it may be fetched.
    """
    text = json.dumps(document.text or "", ensure_ascii=False).encode()
    if document.image is None:
        return text
    url = images.encode_data_url(document.image, allow_image_urls, most_characters).encode()
    if document.modality == "image":
        return b'"%b"' % url
    return b'%b\\n%b"' % (text[:-1], url)  # the separator of NVIDIA's own client


def build_body(fields: Mapping[str, object], inputs: Sequence[bytes]) -> bytes:
    """Return a request: the fields that are not None, and inputs that `encode_input` gave.

    >>> build_body({"model": "m", "input_type": "query", "user": None}, [b'"a"', b'"b"'])
    b'{"model":"m","input_type":"query","input":["a","b"]}'
    """
    wanted = {name: value for name, value in fields.items() if value is not None}
    head = json.dumps(wanted, ensure_ascii=False, separators=(",", ":")).encode()
    return b"".join((head[:-1], b',"input":[', b",".join(inputs), b"]}"))


def bound_reply(n: int, width: int) -> int:
    """Return the most bytes that a reply with n vectors of `width` values may need."""
    return 64 * 1024 + n * (1024 + width * _BYTES_PER_VALUE)


Mask = Callable[[str], str]


def _show_all(text: str) -> str:
    return text


class Reply(NamedTuple):
    """What a server replied, once it was checked."""

    vectors: NDArray[np.float32]
    """(n, d), in the order of the request."""
    tokens: int
    """As the server counted them; 0 if it did not say."""


def parse_reply(
    content: bytes, n: int, dimensions: int | None = None, mask: Mask = _show_all
) -> Reply:
    """Return the vectors of a reply to `n` inputs, each given as floats or as base64 float32.

    `mask` takes out of the server's words what nobody may read.

    Raises:
        MalformedResponseError: not one vector for each input, not all of one length or of
            `dimensions`, or not all finite. It quotes nothing, but for what the server says where
            it sent the body of an error.
    """
    # Each error is raised outside of `except`: what led to it quotes the reply.
    reply = _load_json(content)
    rows = _sort_items(reply, n)
    if rows is None:
        words, _ = _find_words(reply, mask)
        told = f": {words}" if words else ""
        raise MalformedResponseError(f"the reply is no list of embeddings{told}", detail=words)
    if any(row is None for row in rows):
        given = sum(row is not None for row in rows)
        raise MalformedResponseError(f"the reply has {given} different vectors for {n} inputs")
    vectors = _stack(rows)
    if vectors is None:
        raise MalformedResponseError("a vector of the reply cannot be read")
    if dimensions is not None and vectors.shape[1] != dimensions:
        raise MalformedResponseError(
            f"expected vectors of {dimensions} values, the server sent {vectors.shape[1]}"
        )
    if not np.isfinite(vectors).all():
        raise MalformedResponseError("the reply holds NaN or infinity")
    return Reply(vectors, _read_tokens(reply))


def _load_json(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except ValueError:
        return None


def _sort_items(reply: Any, n: int) -> list[Any] | None:
    """Return what is given for each input, None where nothing is, or None if it is no list."""
    rows: list[Any] = [None] * n
    try:
        for item in reply["data"]:
            index = item["index"]
            if type(index) is not int or not 0 <= index < n or rows[index] is not None:
                return None
            rows[index] = item["embedding"]
    except (TypeError, LookupError):
        return None
    return rows


def _stack(rows: list[Any]) -> NDArray[np.float32] | None:
    try:
        if not all(isinstance(row, str) for row in rows):
            given = np.array(rows)  # (n, d); ValueError where lengths differ
            if given.dtype.kind not in "fiu":
                return None
            with np.errstate(over="ignore"):  # it is infinite then, and refused
                vectors = given.astype(np.float32)
        else:
            parts = [b64decode(row, validate=True) for row in rows]
            if len({len(part) for part in parts}) != 1:
                return None
            vectors = np.frombuffer(b"".join(parts), "<f4").reshape(len(rows), -1)  # (n, d)
    except (ValueError, TypeError, OverflowError):
        return None
    return vectors if vectors.ndim == 2 and vectors.shape[1] else None


def _read_tokens(reply: Mapping[str, Any]) -> int:
    usage = reply.get("usage")
    given = usage.get("total_tokens", usage.get("prompt_tokens")) if isinstance(usage, dict) else 0
    return given if type(given) is int and given > 0 else 0


class ErrorReply(NamedTuple):
    """What is known of a reply that is not a success."""

    status: int
    detail: str
    """The server's own words."""
    location: tuple[object, ...] = ()
    """The path to the field at fault, if the server names it: ("body", "dimensions")."""
    request_id: str | None = None
    """The server's name for the request."""

    @property
    def field(self) -> object:
        """The name of the field at fault."""
        return next((part for part in self.location if part != "body"), None)

    def is_about(self, field: str) -> bool:
        """Whether a field of the request is what the server does not take."""
        if self.status not in (400, 422):
            return False
        if self.location:
            return self.field == field
        return field in self.detail and "image" not in self.detail.lower()

    @property
    def is_too_large(self) -> bool:
        """Whether a smaller batch may pass."""
        return self.status == 413 or (
            self.status in (400, 422)
            and self.tokens_and_limit is None
            and _TOO_LARGE.search(self.detail.lower()) is not None
        )

    @property
    def is_about_count(self) -> bool:
        """Whether it was too large by the number of inputs rather than by bytes."""
        return _BATCH.search(self.detail.lower()) is not None

    @property
    def blames_one_input(self) -> bool:
        """Whether one of the inputs is at fault, so that the others pass without it."""
        if self.tokens_and_limit is not None or self.position is not None:
            return True
        return self._is_input_status and self.field == "input" and not self.is_too_large

    @property
    def may_blame_one_input(self) -> bool:
        """Whether an input may be at fault, or the request whatever its inputs are."""
        return self._is_input_status and not (self.location or self.is_too_large)

    @property
    def position(self) -> int | None:
        """Which of the inputs is at fault, if the server says."""
        if not self._is_input_status or self.field != "input":
            return None
        part = self.location[self.location.index("input") + 1 :][:1]
        return part[0] if part and type(part[0]) is int and part[0] >= 0 else None

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

    @property
    def _is_input_status(self) -> bool:
        return 400 <= self.status < 500 and self.status not in _NOT_AN_INPUT


def read_error(response: httpx.Response, mask: Mask = _show_all) -> ErrorReply:
    """Read the words of a server from a reply in any of the shapes that NIMs and gateways use.

    `mask` takes out of a text what nobody may read.

    >>> def words(**body): return read_error(httpx.Response(400, json=body)).detail
    >>> words(error="Input length 9 exceeds maximum allowed token size 8")
    'Input length 9 exceeds maximum allowed token size 8'
    >>> words(error={"message": "no such model"}), words(detail=[{"msg": "bad", "loc": ["body"]}])
    ('no such model', 'bad')
    >>> words(status=429, title="Too Many Requests")
    'Too Many Requests'
    >>> read_error(httpx.Response(400, json={"object": "error", "message": "Invalid.", "detail": {
    ...     "type": "extra_forbidden", "loc": ["body", "dimensions"], "msg": "Not permitted"}}))[:3]
    (400, 'Invalid. Not permitted', ('body', 'dimensions'))
    >>> read_error(httpx.Response(413, json={"error": "too large", "index": 2})).position
    2
    """
    content = _load_json(response.content)
    words, location = _find_words(content, mask)
    if not words:
        words = _shorten(mask(response.content.decode(errors="replace")))
    ids = (response.headers.get(name) for name in ("nvcf-reqid", "x-request-id"))
    request_id = next((_shorten(mask(value))[:100] for value in ids if value), None)
    return ErrorReply(response.status_code, words, location, request_id)


def _find_words(content: object, mask: Mask) -> tuple[str, tuple[object, ...]]:
    words: list[str] = []
    locations: list[tuple[object, ...]] = []
    _collect(content, words, locations)
    if (index := read_error_index(content)) is not None:  # as our own server says it
        locations.append(("body", "input", index))
    detail = _shorten(mask(" ".join(dict.fromkeys(words))))
    return detail, locations[0] if locations else ()


def _collect(
    part: object, words: list[str], locations: list[tuple[object, ...]], depth: int = 0
) -> None:
    if depth > _DEEPEST:
        return
    if isinstance(part, str):
        words.append(part.strip())
    elif isinstance(part, list):
        for item in part[:5]:
            _collect(item, words, locations, depth + 1)
    elif isinstance(part, dict):
        if isinstance(part.get("loc"), list):
            locations.append(tuple(part["loc"]))
        for name in ("title", "message", "msg", "error", "detail"):
            _collect(part.get(name), words, locations, depth + 1)


def make_printable(text: str) -> str:
    """Return a server's words in one line, without what would command a terminal."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _shorten(text: str) -> str:
    text = make_printable(text[: 20 * _LONGEST_DETAIL])
    return text if len(text) <= _LONGEST_DETAIL else text[:_LONGEST_DETAIL] + "..."


_BY_STATUS: Mapping[int, tuple[type[RemoteError], str]] = {
    401: (AuthenticationError, "the server wants a key that it knows: api_key= or NVIDIA_API_KEY"),
    403: (PermissionDeniedError, "the key may not use this model"),
    404: (ModelNotFoundError, "the server has no such model or path; see GET /v1/models"),
    407: (AuthenticationError, "the proxy wants another user name or password"),
    408: (RequestTimeoutError, "the server gave up on the request"),
    413: (PayloadTooLargeError, "the request is too large, even with one input"),
    429: (RateLimitError, "the server wants fewer requests"),
}  # fmt: skip


def build_error(
    response: httpx.Response, reply: ErrorReply, has_image: bool = False, blames_one: bool = False
) -> NeMoRetrieverError:
    """Return the error of a reply that is no success; `reply` is what `read_error` gave for it.

    Where an input is at fault, the words may be its own.
    """
    if (lengths := reply.tokens_and_limit) is not None:
        tokens, limit = lengths
        return InputTooLongError(
            f"is too long for the server ({reply.detail}); split it, or choose what "
            'is cut with truncate="START" or "END"',
            tokens=tokens,
            limit=limit,
        )
    if reply.is_about("dimensions") and not blames_one:
        return UnsupportedDimensionsError(f"the server refuses the dimensions: {reply.detail}")
    if reply.is_too_large and has_image:
        return ImageTooLargeError(
            f"has an image that is too large for the server ({reply.status}): {reply.detail}"
        )
    kind, meaning = _BY_STATUS.get(reply.status, (InvalidRequestError, "the server refuses this"))
    if reply.status >= 500:
        kind, meaning = ServerError, "the server failed"
    elif reply.is_too_large:
        kind, meaning = _BY_STATUS[413]
    elif 300 <= reply.status < 400:
        target = _find_target(response)
        kind, meaning = InvalidRequestError, f"the server redirects to {target}; set base_url to it"
    words = f"{meaning} ({reply.status}): {reply.detail}"
    if reply.request_id:
        words += f" [request {reply.request_id}]"
    out = kind(words, status=reply.status, detail=reply.detail, request_id=reply.request_id)
    if isinstance(out, RateLimitError):
        out.retry_after = read_retry_after(response.headers)
    return out


def _find_target(response: httpx.Response) -> str:
    try:
        url = httpx.URL(response.headers["location"])
    except (KeyError, httpx.InvalidURL):
        return "nowhere"
    return f"{url.scheme}://{url.netloc.decode()}" if url.host else "another path"


def list_models(response: httpx.Response) -> dict[str, str | None]:
    """Return the ids that `/v1/models` lists, each with its `root`; none where it cannot.

    >>> list_models(httpx.Response(200, json={"data": [{"id": "mine", "root": "nvidia/m"}]}))
    {'mine': 'nvidia/m'}
    >>> list_models(httpx.Response(404))
    {}
    """
    try:
        items = _load_json(response.content)["data"] if response.is_success else []
        return {item["id"]: item.get("root") for item in items if isinstance(item["id"], str)}
    except (TypeError, LookupError, AttributeError):
        return {}
