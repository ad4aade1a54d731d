"""The contract between the `Embedder` and whatever computes: one method, a few facts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, runtime_checkable

from shared_engine.catalogue import AvailableModel
from shared_engine.documents import EmbeddingInput, Modality, Role
from shared_engine.options import Truncate

if TYPE_CHECKING:  # numpy takes longer to import than all of this package
    import numpy as np
    from numpy.typing import NDArray

_log = logging.getLogger("shared_engine")


class Flow:
    """Requests of one flow run in order and take turns with others as one. It holds nothing."""

    __slots__ = ("__weakref__",)


@dataclass(frozen=True)
class Request:
    """One caller's list of documents, already checked, and how to embed it."""

    documents: list[EmbeddingInput]
    role: Role
    dimensions: int | None = None
    """Length of the vectors; None is the model's full size."""
    truncate: Truncate = "NONE"
    on_progress: Callable[[int], object] | None = None
    """Called from another thread with the number of documents that were just finished."""
    on_usage: Callable[[int], object] | None = None
    """Called from another thread with the number of tokens that were just embedded."""
    flow: Flow | None = None
    """What the batches of one stream share; None is a flow of its own."""

    def report_progress(self, documents: int) -> None:
        """Call `on_progress`; what it raises is logged, as the thread works for other callers."""
        _call(self.on_progress, documents)

    def report_usage(self, tokens: int) -> None:
        """Call `on_usage`, as `report_progress` does."""
        _call(self.on_usage, tokens)


def _call(callback: Callable[[int], object] | None, count: int) -> None:
    try:
        if callback is not None:
            callback(count)
    except Exception:
        _log.exception("a callback of a request raised; its vectors are not lost")


class StepStats(NamedTuple):
    """What a device has computed since it started."""

    steps: int
    tokens: int
    """Cost of all those steps in tokens; `steps * max_batch_tokens` would have been full ones."""
    max_batch_tokens: int
    """The most tokens in one step."""


@runtime_checkable
class HasStepStats(Protocol):
    """A backend that computes in steps and counts them, which a remote one cannot."""

    @property
    def step_stats(self) -> StepStats:
        """The counts so far."""


@runtime_checkable
class Remote(Protocol):
    """A backend of which only its server knows some facts; each is asked for when needed."""

    def list_models(self) -> list[AvailableModel]:
        """Return the models that the server serves; RemoteError where it does not say."""

    def probe_width(self) -> int:
        """Return the length of a full vector; RemoteError where it cannot be had."""


@runtime_checkable
class HasHealth(Protocol):
    """A backend whose device can fail for good while the process lives on."""

    @property
    def failure(self) -> Exception | None:
        """What it failed with, after which each `submit` is an EngineError; None while it works."""


class Backend(Protocol):
    """Something that turns documents into vectors, here or elsewhere."""

    @property
    def modalities(self) -> frozenset[Modality]:
        """Kinds of input it takes."""

    @property
    def dimensions(self) -> tuple[int, ...]:
        """Vector sizes it offers, ascending; the last is the model's full size.

        Empty where only the server knows; it then judges what it is asked for.
        """

    @property
    def description(self) -> str:
        """What runs where, and why, in one line."""

    @property
    def fingerprint(self) -> str:
        """The same for two backends only if their vectors are."""

    def submit(self, request: Request) -> Future[NDArray[np.float32]]:
        """Accept a request and return at once; the future gives (n, dimensions) float32.

        Row i belongs to document i. Rows are cut to size but not yet of unit length. Cancelling the
        future drops what has not started. Safe to call from many threads.

        What fails for one document (a text over the limit with `truncate="NONE"`, an image that
        cannot be decoded) fails alone: the future raises PartialResultError with the others'
        vectors, or, where the request has one document only, that document's own error. See
        `errors.combine_errors`, which puts the index on errors that are made without one.

        Raises:
            EngineClosedError: the backend was closed.
        """

    def wait_until_ready(self, timeout: float) -> None:
        """Return when it can compute; RequestTimeoutError after `timeout` seconds."""

    def close(self, cancel: bool = False, wait: bool = True) -> None:
        """Finish what was accepted, or `cancel` what has not started; `wait` until that is done."""
