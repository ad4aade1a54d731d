"""The decision on a refusal, as a table: reply, batch and what is known, then the decision."""

from __future__ import annotations

import httpx
import pytest

from shared_engine.nim.batches import RequestBatch
from shared_engine.nim.decisions import (
    Decision,
    Fail,
    Isolate,
    Known,
    Probe,
    Resend,
    Split,
    decide,
)
from shared_engine.nim.protocol import ErrorReply, read_error

ONE = RequestBatch((4,), (b'"a"',), "text")
TWO = RequestBatch((4, 7), (b'"a"', b'"b"'), "text")
IMAGE = RequestBatch((4,), (b'"data:"',), "image")
IMAGES = RequestBatch((4, 7), (b'"data:"', b'"data:"'), "image")

SENT = Known("base64", "text")
PLAIN = Known("float")
WHOLE, CUT = Known("float", truncate="NONE"), Known("float", truncate="END")
ACCEPTED = Known("float", is_accepted=True)
REFUSED = Known("float", is_accepted=False)


def refusal(status: int, message: str = "no", *loc: object, index: int | None = None) -> ErrorReply:
    body: dict[str, object] = {"error": message}
    if loc:
        body = {"detail": [{"loc": ["body", *loc], "msg": message}]}
    return read_error(httpx.Response(status, json={**body, "index": index}))


TOO_LONG = "Input length 9 exceeds maximum allowed token size 8"
TOO_LARGE = "reduce the payload or image size"
TOO_MANY = "batch size 50 > maximum allowed 16"


@pytest.mark.parametrize(
    ("reply", "batch", "known", "expected"),
    [
        # A feature that the server lacks, once.
        (refusal(422, "bad", "encoding_format"), TWO, SENT, Resend("base64")),
        (refusal(400, "unknown encoding_format"), ONE, SENT, Resend("base64")),
        (refusal(422, "bad", "encoding_format"), TWO, PLAIN, "request"),
        (refusal(500, "encoding_format"), TWO, SENT, "server"),
        (refusal(400, "bad", "modality"), TWO, SENT, Resend("modality")),
        (refusal(400, "bad", "modality"), TWO, PLAIN, "request"),
        (refusal(400, "bad", "modality"), IMAGES, SENT, "request"),
        (refusal(400, "Unrecognized arguments: truncate"), TWO, WHOLE, Resend("truncate")),
        (refusal(422, "bad", "truncate"), IMAGES, WHOLE, Resend("truncate")),
        (refusal(422, "bad", "truncate"), TWO, CUT, "request"),
        (refusal(422, "bad", "truncate"), TWO, PLAIN, "request"),
        (refusal(400, f"{TOO_LONG}; see truncate"), TWO, WHOLE, Isolate(None)),
        # Too large: halves, or the only input is at fault.
        (refusal(413), TWO, SENT, Split(by_count=False)),
        (refusal(422, TOO_LARGE), IMAGES, SENT, Split(by_count=False)),
        (refusal(422, TOO_MANY), TWO, SENT, Split(by_count=True)),
        (refusal(413, TOO_MANY), TWO, SENT, Split(by_count=True)),
        (refusal(413), ONE, SENT, "input"),
        (refusal(422, TOO_LARGE), IMAGE, SENT, "input"),
        (refusal(413, TOO_LARGE, index=1), IMAGES, SENT, Isolate(1)),
        # An input that the reply names, or describes.
        (refusal(400, TOO_LONG), TWO, SENT, Isolate(None)),
        (refusal(400, TOO_LONG), ONE, SENT, "input"),
        (refusal(422, "empty", "input", 1), TWO, SENT, Isolate(1)),
        (refusal(422, "empty", "input"), TWO, SENT, Isolate(None)),
        (refusal(400, "broken image", index=0), IMAGES, SENT, Isolate(0)),
        (refusal(400, "broken image", index=0), IMAGE, SENT, "input"),
        # An ambiguous refusal: a probe decides.
        *(
            line
            for status in (400, 403, 415, 422)
            for line in (
                (refusal(status), TWO, PLAIN, Probe()),
                (refusal(status), ONE, PLAIN, Probe()),
                (refusal(status), TWO, ACCEPTED, Isolate(None)),
                (refusal(status), ONE, ACCEPTED, "input"),
                (refusal(status), TWO, REFUSED, "request"),
                (refusal(status), ONE, REFUSED, "request"),
            )
        ),
        # The request or the server, whatever is known of inputs.
        *(
            line
            for known in (SENT, ACCEPTED, REFUSED)
            for line in (
                (refusal(401), TWO, known, "request"),
                (refusal(404), TWO, known, "request"),
                (refusal(307), TWO, known, "request"),
                (refusal(422, "bad", "dimensions"), TWO, known, "request"),
                (refusal(408), TWO, known, "server"),
                (refusal(429), TWO, known, "server"),
                (refusal(503), ONE, known, "server"),
            )
        ),
    ],
)
def test_a_refusal_leads_to_a_decision(
    reply: ErrorReply, batch: RequestBatch, known: Known, expected: Decision | str
) -> None:
    """A text stands for the fault of a `Fail`."""
    decision = decide(reply, batch, known)
    if isinstance(decision, Fail):
        assert decision.fault == expected
    else:
        assert decision == expected
