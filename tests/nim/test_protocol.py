"""Invalid replies, and errors in every shape that servers use."""

from __future__ import annotations

import base64
import json
import pickle

import httpx
import numpy as np
import pytest

from shared_engine import (
    AuthenticationError,
    InputTooLongError,
    InvalidRequestError,
    MalformedResponseError,
    ModelNotFoundError,
    NeMoRetrieverError,
    PayloadTooLargeError,
    PermissionDeniedError,
    RateLimitError,
    RequestTimeoutError,
    ServerError,
    UnsupportedDimensionsError,
)
from shared_engine.nim.protocol import build_error, parse_reply, read_error
from tests.support.nim import encode_vector, write_reply

ROWS = np.array([[1, 2], [3, 4], [5, 6]], "<f4")


def reply(rows=ROWS, order=(2, 0, 1), encode=True, **extra) -> bytes:
    encoding = "base64" if encode else "float"
    written = write_reply((i, encode_vector(rows[i], encoding)) for i in order)
    return json.dumps(json.loads(written) | extra).encode()


@pytest.mark.parametrize("encode", [True, False])
def test_rows_are_put_in_order(encode: bool) -> None:
    out = parse_reply(reply(encode=encode, usage={"prompt_tokens": 7, "total_tokens": 7}), 3)
    np.testing.assert_array_equal(out.vectors, ROWS)
    assert out.vectors.dtype == np.float32
    assert out.tokens == 7


@pytest.mark.parametrize("usage", [None, {}, {"total_tokens": None}, {"total_tokens": "7"}, 3])
def test_usage_may_be_missing(usage: object) -> None:
    assert parse_reply(reply(usage=usage), 3).tokens == 0


GOOD = base64.b64encode(ROWS[0].tobytes()).decode()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"<html>",
        b"null",
        b"[]",
        b"{}",
        b'{"data": null}',
        b'{"data": [1, 2, 3]}',
        reply(order=(0, 1)),
        reply(order=(0, 1, 1)),
        reply(order=(0, 1, 2, 2)),
        reply(rows=np.array([[1, 2], [3, np.nan], [5, 6]], "<f4")),
        reply(rows=np.array([[1, 2], [3, np.inf], [5, 6]], "<f4"), encode=False),
        reply(rows=[ROWS[0], ROWS[1], np.zeros(3, "<f4")]),
        reply(rows=[ROWS[0], ROWS[1], np.zeros(3, "<f4")], encode=False),
        reply(rows=np.zeros((3, 0), "<f4")),
        reply(rows=np.zeros((3, 0), "<f4"), encode=False),
        json.dumps({"data": [{"index": i, "embedding": "YWJj"} for i in range(3)]}).encode(),
        json.dumps({"data": [{"index": i, "embedding": "!!!"} for i in range(3)]}).encode(),
        json.dumps({"data": [{"index": i, "embedding": None} for i in range(3)]}).encode(),
        json.dumps({"data": [{"index": i, "embedding": ["x"]} for i in range(3)]}).encode(),
        json.dumps({"data": [{"index": i, "embedding": [None]} for i in range(3)]}).encode(),
        json.dumps({"data": [{"index": i, "embedding": {}} for i in range(3)]}).encode(),
        json.dumps({"data": [{"index": i - 1, "embedding": GOOD} for i in range(3)]}).encode(),
        json.dumps({"data": [{"index": str(i), "embedding": GOOD} for i in range(3)]}).encode(),
        json.dumps({"data": [{"embedding": GOOD} for i in range(3)]}).encode(),
    ],
)
def test_an_invalid_reply_is_refused(content: bytes) -> None:
    with pytest.raises(MalformedResponseError):
        parse_reply(content, 3)


def test_the_requested_length_is_checked() -> None:
    assert parse_reply(reply(), 3, 2).vectors.shape == (3, 2)
    with pytest.raises(MalformedResponseError, match="expected vectors of 4 values"):
        parse_reply(reply(), 3, 4)


def build(status: int, body: object, headers: dict[str, str] | None = None) -> NeMoRetrieverError:
    text = body if isinstance(body, str) else json.dumps(body)
    response = httpx.Response(status, text=text, headers=headers)
    return build_error(read_error(response))


VALIDATION = {
    "object": "error",
    "message": "Your request cannot be validated, it is incorrect.",
    "detail": {
        "type": "extra_forbidden",
        "loc": ["body", "dimensions"],
        "msg": "Extra inputs are not permitted",
        "input": 64,
    },
    "type": "request_validation_error",
}


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, {"error": "'input_type' parameter is required"}, InvalidRequestError, "input_type"),
        (422, {"detail": "'input_type' is required"}, InvalidRequestError, "input_type"),
        (400, VALIDATION, UnsupportedDimensionsError, "not permitted"),
        (
            400,
            {"error": {"message": "bad dimensions"}},
            UnsupportedDimensionsError,
            "",
        ),
        (401, {"status": 401, "title": "Unauthorized", "detail": "no"}, AuthenticationError, "no"),
        (403, {"status": 403, "title": "Forbidden"}, PermissionDeniedError, "Forbidden"),
        (403, {"status": 403, "title": "Forbidden"}, PermissionError, "Forbidden"),
        (404, "404 page not found", ModelNotFoundError, "page not found"),
        (404, {"error": {"message": "The model `x` does not exist"}}, LookupError, "`x`"),
        (405, "<html>", InvalidRequestError, "check base_url= (405): <html>"),
        (408, "", TimeoutError, ""),
        (413, "<html>Request Entity Too Large</html>", PayloadTooLargeError, "Entity"),
        (422, {"error": "reduce the payload or image size"}, PayloadTooLargeError, "payload"),
        (429, {"status": 429, "title": "Too Many Requests"}, RateLimitError, "Too Many"),
        (500, {"error": "ResourceExhausted"}, ServerError, "ResourceExhausted"),
        (503, "upstream gone", RuntimeError, "upstream gone"),
        (504, [], ServerError, ""),
    ],
)
def test_errors_have_a_type_and_keep_the_servers_message(
    status: int, body: object, kind: type[Exception], words: str
) -> None:
    out = build(status, body)
    assert isinstance(out, kind)
    assert words in str(out)
    assert not str(out).endswith(": ")
    copy = pickle.loads(pickle.dumps(out))
    assert (type(copy), str(copy), vars(copy)) == (type(out), str(out), vars(out))


@pytest.mark.parametrize(
    ("words", "tokens", "limit"),
    [
        ("Input length 1728 exceeds maximum allowed token size 512", 1728, 512),
        ("This model's maximum context length is 512 tokens. However, you requested 600 tokens in "
         "the input", 600, 512),
        ("`inputs` must have less than 512 tokens. Given: 601", 601, 512),
        ("The input exceeds the maximum token limit", 0, 0),
    ],
)  # fmt: skip
def test_the_length_of_a_text_and_its_limit_are_parsed(words: str, tokens: int, limit: int) -> None:
    out = build(400, {"error": words})
    assert isinstance(out, InputTooLongError)
    assert (out.tokens, out.limit) == (tokens, limit)


def test_a_refused_key_names_what_to_set() -> None:
    out = build(401, {"detail": "no"})
    words = "authentication failed; pass api_key= or set NVIDIA_API_KEY (401): no"
    assert str(out) == words


def test_an_error_has_status_detail_request_id_and_retry_after() -> None:
    out = build(429, {"title": "Too Many"}, {"retry-after": "7", "nvcf-reqid": "abc"})
    assert isinstance(out, RateLimitError)
    assert (out.status, out.detail, out.request_id) == (429, "Too Many", "abc")
    assert out.retry_after == 7.0
    assert "abc" in str(out)
    long = build(400, "x" * 5000)
    assert len(str(long)) < 1200
    assert isinstance(build(408, ""), RequestTimeoutError)
