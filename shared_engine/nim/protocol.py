"""Replies of servers: one parser of vectors, one of scores, one table of errors.

Sources: NVIDIA's reference of `POST /v1/embeddings` (Text Embedding NIM 2.0) and replies that users
have published. NVIDIA calls the wording of errors unstable, so the status decides first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import httpx
import numpy as np
import orjson
from numpy.typing import NDArray
from pybase64 import b64decode

from shared_engine.catalogue import ModelSpec, Task, explain_end, suggest
from shared_engine.errors import (
    AuthenticationError,
    ImageTooLargeError,
    InputTooLongError,
    InvalidRequestError,
    MalformedResponseError,
    ModelNotFoundError,
    ModelRetiredError,
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
from shared_engine.wire import read_error_index, split_role_suffix

_INPUTS = ("input", "passages", "documents", "texts")
"""Names of the list of inputs in a request."""
_LONGEST_DETAIL = 1000
_DEEPEST = 8
"""Nesting levels of an error's body that are read."""
_NOT_AN_INPUT = frozenset({401, 402, 404, 405, 407, 408, 410, 421, 425, 426, 429})
"""4xx statuses that are never an input's fault. 403 may be, as gateways refuse texts with it."""
_TOO_LONG = (  # the wording of NIM, vLLM and text-embeddings-inference
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


Mask = Callable[[str], str]


class Reply(NamedTuple):
    """A reply whose vectors or scores were checked."""

    vectors: NDArray[np.float32]
    """(n, d), in the order of the request; (n, 1) for scores."""
    tokens: int
    """The server's count of tokens; 0 if it sent none."""
    model: str = ""
    """The server's name of the model; "" if it sent none."""


def parse_reply(content: bytes, n: int, dimensions: int | None = None, mask: Mask = str) -> Reply:
    """Return the vectors of a reply to `n` inputs, each a list of floats or base64 float32.

    Args:
        dimensions: The length of the vectors, if the request had one.
        mask: Removes secrets from the server's message.

    Raises:
        MalformedResponseError: there is not one vector for each input, they differ in length or
            from `dimensions`, or a value is not finite. It quotes the server's message if the
            reply is the body of an error, and the beginning of a reply that is not JSON.
    """
    reply = _load_reply(content, mask)
    rows = _sort_items(reply, n, "data", "embedding", kind="vectors", mask=mask)
    vectors = _stack(rows)
    if vectors is None:
        raise MalformedResponseError("a vector of the reply cannot be read")
    if dimensions is not None and vectors.shape[1] != dimensions:
        raise MalformedResponseError(
            f"expected vectors of {dimensions} values, the server sent {vectors.shape[1]}"
        )
    return _finish(reply, vectors)


def _load_reply(content: bytes, mask: Mask) -> Any:
    with suppress(ValueError):  # as the cause, it would quote the reply
        return orjson.loads(content)
    beginning = _shorten(mask(content[:1000].decode(errors="replace")))[:100]
    raise MalformedResponseError(f"the reply is not JSON: {beginning!r}")


def _load_json(content: bytes) -> Any:
    try:
        return orjson.loads(content)
    except ValueError:
        return None


def parse_scores(content: bytes, n: int, items: str | None, field: str, mask: Mask = str) -> Reply:
    """Return the scores of a reply to `n` documents.

    Args:
        items: Name of the list of results; None if the reply is the list.
        field: Name of the score in a result; `index` is the position of the document.
        mask: Removes secrets from the server's message.

    Raises:
        MalformedResponseError: there is not one finite score for each document.
    """
    reply = _load_reply(content, mask)
    rows = _sort_items(reply, n, items, field, kind="scores", mask=mask)
    is_numeric = all(type(row) in (int, float) for row in rows)
    scores = _stack([[row] for row in rows]) if is_numeric else None
    if scores is None:
        raise MalformedResponseError("a score of the reply is not a number")
    return _finish(reply, scores)


def _finish(reply: Any, values: NDArray[np.float32]) -> Reply:
    if not np.isfinite(values).all():
        raise MalformedResponseError("the reply has NaN or infinity")
    return Reply(values, _read_tokens(reply), _read_model(reply))


def _sort_items(
    reply: Any, n: int, items: str | None, field: str, *, kind: str, mask: Mask
) -> list[Any]:
    """Return a field of each result in the order of the request; every index must come once."""
    rows: list[Any] = [None] * n
    is_valid = True
    try:
        for item in reply if items is None else reply[items]:
            index = item["index"]
            if type(index) is not int or not 0 <= index < n or rows[index] is not None:
                is_valid = False
                break
            rows[index] = item[field]
    except (TypeError, LookupError):
        is_valid = False
    if not is_valid:
        message, _ = _find_message(reply, mask)
        quoted = f": {message}" if message else ""
        raise MalformedResponseError(f"the reply has no list of {kind}{quoted}", detail=message)
    if missing := rows.count(None):
        present = n - missing
        raise MalformedResponseError(f"the reply has {present} different {kind} for {n} inputs")
    return rows


def _stack(rows: list[Any]) -> NDArray[np.float32] | None:
    try:
        if not all(isinstance(row, str) for row in rows):
            values = np.array(rows)  # (n, d); ValueError if lengths differ
            if values.dtype.kind not in "fiu":
                return None
            with np.errstate(over="ignore"):  # becomes infinity, which the caller refuses
                vectors = values.astype(np.float32)
        else:
            parts = [b64decode(row, validate=True) for row in rows]
            if len({len(part) for part in parts}) != 1:
                return None
            vectors = np.frombuffer(b"".join(parts), "<f4").reshape(len(rows), -1)  # (n, d)
    except (ValueError, TypeError, OverflowError):
        return None
    return vectors if vectors.ndim == 2 and vectors.shape[1] else None


def _read_tokens(reply: Any) -> int:
    usage = reply.get("usage") if isinstance(reply, dict) else None
    count = usage.get("total_tokens", usage.get("prompt_tokens")) if isinstance(usage, dict) else 0
    return count if type(count) is int and count > 0 else 0


def _read_model(reply: Any) -> str:
    model = reply.get("model") if isinstance(reply, dict) else None
    return split_role_suffix(model)[0] if isinstance(model, str) else ""


class ErrorReply(NamedTuple):
    """The content of a reply that is not a success."""

    status: int
    detail: str
    """The server's message."""
    location: tuple[object, ...] = ()
    """The path to the field at fault, if the server names it: ("body", "dimensions")."""
    request_id: str | None = None
    """The server's id of the request."""
    headers: Mapping[str, str] = {}

    @property
    def field(self) -> object:
        """The name of the field at fault."""
        return next((part for part in self.location if part != "body"), None)

    def is_about(self, field: str) -> bool:
        """Whether the server refuses a field of the request."""
        if self.status not in (400, 422):
            return False
        if self.location:
            return self.field == field
        return field in self.detail and "image" not in self.detail.lower()

    @property
    def is_too_large(self) -> bool:
        """Whether the server may accept a smaller batch."""
        return self.status == 413 or (
            self.status in (400, 422)
            and self.tokens_and_limit is None
            and _TOO_LARGE.search(self.detail.lower()) is not None
        )

    @property
    def is_about_count(self) -> bool:
        """Whether the batch was too large by its number of inputs, not by bytes."""
        return _BATCH.search(self.detail.lower()) is not None

    @property
    def names_input(self) -> bool:
        """Whether the reply states that an input is at fault, so the others pass without it."""
        if self.tokens_and_limit is not None or self.position is not None:
            return True
        return self._is_input_status and self.field in _INPUTS and not self.is_too_large

    @property
    def is_ambiguous(self) -> bool:
        """Whether an input may be at fault, or any request would be refused like this one."""
        return self._is_input_status and not (self.location or self.is_too_large)

    @property
    def position(self) -> int | None:
        """The position of the input at fault in its batch, if the server names it."""
        if not self._is_input_status or self.field not in _INPUTS:
            return None
        part = self.location[self.location.index(self.field) + 1 :][:1]
        return part[0] if part and type(part[0]) is int and part[0] >= 0 else None

    @property
    def tokens_and_limit(self) -> tuple[int, int] | None:
        """Length and limit of a text that is too long; 0 for a number that is not in the reply."""
        if self.status not in (400, 413, 422):
            return None
        for pattern in _TOO_LONG:
            if match := pattern.search(self.detail):
                numbers = match.groupdict()
                return int(numbers.get("tokens") or 0), int(numbers.get("limit") or 0)
        return None

    @property
    def _is_input_status(self) -> bool:
        return 400 <= self.status < 500 and self.status not in _NOT_AN_INPUT


def read_error(response: httpx.Response, mask: Mask = str) -> ErrorReply:
    """Read the server's message from a reply in any of the shapes that NIMs and gateways use.

    Args:
        mask: Removes secrets from the message.

    >>> def read(**body): return read_error(httpx.Response(400, json=body)).detail
    >>> read(error="Input length 9 exceeds maximum allowed token size 8")
    'Input length 9 exceeds maximum allowed token size 8'
    >>> read(error={"message": "no such model"}), read(detail=[{"msg": "bad", "loc": ["body"]}])
    ('no such model', 'bad')
    >>> read(status=429, title="Too Many Requests")
    'Too Many Requests'
    >>> read_error(httpx.Response(400, json={"object": "error", "message": "Invalid.", "detail": {
    ...     "type": "extra_forbidden", "loc": ["body", "dimensions"], "msg": "Not permitted"}}))[:3]
    (400, 'Invalid. Not permitted', ('body', 'dimensions'))
    >>> read_error(httpx.Response(413, json={"error": "too large", "index": 2})).position
    2
    """
    content = _load_json(response.content)
    message, location = _find_message(content, mask)
    if not message:
        message = _shorten(mask(response.content.decode(errors="replace")))
    ids = (response.headers.get(name) for name in ("nvcf-reqid", "x-request-id"))
    request_id = next((_shorten(mask(value))[:100] for value in ids if value), None)
    return ErrorReply(response.status_code, message, location, request_id, response.headers)


def _find_message(content: object, mask: Mask) -> tuple[str, tuple[object, ...]]:
    """Return the message of an error's body, and the location of the field at fault."""
    messages: list[str] = []
    locations: list[tuple[object, ...]] = []
    _collect(content, messages, locations)
    if (index := read_error_index(content)) is not None:  # sent by `nemoretriever serve`
        locations.append(("body", "input", index))
    detail = _shorten(mask(" ".join(dict.fromkeys(messages))))
    return detail, locations[0] if locations else ()


def _collect(
    part: object, messages: list[str], locations: list[tuple[object, ...]], depth: int = 0
) -> None:
    if depth > _DEEPEST:
        return
    if isinstance(part, str):
        messages.append(part.strip())
    elif isinstance(part, list):
        for item in part[:5]:
            _collect(item, messages, locations, depth + 1)
    elif isinstance(part, dict):
        if isinstance(part.get("loc"), list):
            locations.append(tuple(part["loc"]))
        for name in ("title", "message", "msg", "error", "detail"):
            _collect(part.get(name), messages, locations, depth + 1)


def make_printable(text: str) -> str:
    """Return a server's text in one line, without control characters."""
    text = " ".join(text.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _shorten(text: str) -> str:
    text = make_printable(text[: 20 * _LONGEST_DETAIL])
    return text if len(text) <= _LONGEST_DETAIL else text[:_LONGEST_DETAIL] + "..."


_BY_STATUS: Mapping[int, tuple[type[RemoteError], str]] = {
    401: (AuthenticationError, "authentication failed; pass api_key= or set NVIDIA_API_KEY"),
    403: (PermissionDeniedError, "access denied; the key may not use this model"),
    404: (ModelNotFoundError, "no such model or path; see GET /v1/models"),
    405: (InvalidRequestError, "the path takes no POST; check base_url="),
    407: (AuthenticationError, "the proxy refused the user name or password"),
    408: (RequestTimeoutError, "the server timed out"),
    413: (PayloadTooLargeError, "the request is too large, even with one input"),
    429: (RateLimitError, "too many requests"),
}


def build_error(
    reply: ErrorReply,
    has_image: bool = False,
    is_input_fault: bool = False,
    *,
    spec: ModelSpec | None = None,
    task: Task = "embed",
    model: str = "",
) -> NeMoRetrieverError:
    """Return the error of a reply that is not a success.

    Args:
        is_input_fault: Whether its only input is at fault, so the message may quote that input.
        model: The name that was sent; a similar one is suggested if it is unknown.
    """
    if reply.status == 410:
        detail, instead = reply.detail.rstrip("."), explain_end(spec, task)
        return ModelRetiredError(f"the server ended the model (410): {detail}; {instead}")
    if (lengths := reply.tokens_and_limit) is not None:
        tokens, limit = lengths
        return InputTooLongError(
            f"is too long for the server ({reply.detail}); split it, or use "
            'truncate="END" to cut it off',
            tokens=tokens,
            limit=limit,
        )
    if reply.is_about("dimensions") and not is_input_fault:
        return UnsupportedDimensionsError(f"the server refused dimensions=: {reply.detail}")
    if reply.is_too_large and has_image:
        return ImageTooLargeError(
            f"has an image that is too large for the server ({reply.status}): {reply.detail}"
        )
    kind, meaning = _BY_STATUS.get(
        reply.status, (InvalidRequestError, "the server refused the request")
    )
    if reply.status >= 500:
        kind, meaning = ServerError, "the server failed"
    elif reply.is_too_large:
        kind, meaning = _BY_STATUS[413]
    elif 300 <= reply.status < 400:
        target = _find_target(reply.headers)
        kind, meaning = InvalidRequestError, f"the server redirects to {target}; use its base_url="
    message = f"{meaning} ({reply.status})" + (f": {reply.detail}" if reply.detail else "")
    if model and spec is None and reply.status == 404:
        message += suggest(model, task)
    if reply.request_id:
        message += f" [request {reply.request_id}]"
    out = kind(message, status=reply.status, detail=reply.detail, request_id=reply.request_id)
    if isinstance(out, RateLimitError):
        out.retry_after = read_retry_after(reply.headers)
    return out


def _find_target(headers: Mapping[str, str]) -> str:
    try:
        url = httpx.URL(headers["location"])
    except (KeyError, httpx.InvalidURL):
        return "an invalid address"
    return f"{url.scheme}://{url.netloc.decode()}" if url.host else "another path"


def is_nim(response: httpx.Response) -> bool:
    """Return whether the reply to `GET /v1/metadata` is that of a NIM or of `nemoretriever serve`.

    >>> is_nim(httpx.Response(200, json={"version": "2.4.0", "modelInfo": [{"shortName": "m"}]}))
    True
    >>> is_nim(httpx.Response(404, json={"detail": "Not Found"}))
    False
    """
    body = _load_json(response.content) if response.is_success else None
    return isinstance(body, dict) and isinstance(body.get("modelInfo"), list)


def list_models(response: httpx.Response) -> dict[str, str | None]:
    """Return the ids that `/v1/models` lists, each with its `root`; none for an invalid reply.

    A name with a role as suffix is left out if the name without it is listed.

    >>> list_models(httpx.Response(200, json={"data": [{"id": "mine", "root": "nvidia/m"}]}))
    {'mine': 'nvidia/m'}
    >>> list_models(httpx.Response(404))
    {}
    """
    try:
        items = _load_json(response.content)["data"] if response.is_success else []
        found = {item["id"]: item.get("root") for item in items if isinstance(item["id"], str)}
    except (TypeError, LookupError, AttributeError):
        return {}
    bases = {name: split_role_suffix(name)[0] for name in found}  # the name itself without a role
    return {n: root for n, root in found.items() if bases[n] == n or bases[n] not in found}
