"""The decision after the refusal of a batch, as one pure function."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from shared_engine.nim.batches import RequestBatch
from shared_engine.nim.forms import Known
from shared_engine.nim.protocol import ErrorReply
from shared_engine.nim.transport import is_retried

Feature: TypeAlias = Literal["base64", "modality", "truncate"]


@dataclass(frozen=True)
class Resend:
    """Send the batch again, and from now on without a feature that the server lacks."""

    without: Feature


@dataclass(frozen=True)
class Split:
    """Send the batch again in halves: it is too large."""

    by_count: bool
    """Whether it had too many inputs; otherwise too many bytes."""


@dataclass(frozen=True)
class Isolate:
    """Send the batch again in two parts, to separate the input at fault from the others."""

    position: int | None
    """Position of the input at fault in the batch, if the server named it."""


@dataclass(frozen=True)
class Probe:
    """Find out whether the server accepts valid inputs of this modality, then decide again."""


@dataclass(frozen=True)
class Fail:
    """Fail the batch."""

    fault: Literal["input", "request", "server"]
    """The cause: its only input; the request, so other batches fail as well; or the server, which
    failed after every retry."""


Decision: TypeAlias = Resend | Split | Isolate | Probe | Fail


def decide(reply: ErrorReply, batch: RequestBatch, known: Known) -> Decision:
    """Return the decision about a batch that the server refused."""
    if (feature := _find_unsupported(reply, batch, known)) is not None:
        return Resend(without=feature)
    is_single = len(batch.rows) == 1
    if reply.is_too_large and reply.position is None and not is_single:
        return Split(by_count=reply.is_about_count)
    is_input_fault = reply.names_input or reply.is_too_large
    if reply.is_ambiguous and not is_input_fault:
        if known.is_accepted is None:
            return Probe()
        is_input_fault = known.is_accepted
    if is_input_fault:
        return Fail("input") if is_single else Isolate(reply.position)
    return Fail("server" if is_retried(reply.status) else "request")


def _find_unsupported(reply: ErrorReply, batch: RequestBatch, known: Known) -> Feature | None:
    if known.encoding == "base64" and reply.is_about("encoding_format"):
        return "base64"
    if known.modality and not batch.has_images and reply.is_about("modality"):
        return "modality"
    is_too_long = reply.tokens_and_limit is not None
    if known.truncate == "NONE" and reply.is_about("truncate") and not is_too_long:
        return "truncate"
    return None
