"""The base of `Embedder` and `Reranker`: a model that is loaded at first use and shared."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from shared_engine.backend import Backend, Rows
from shared_engine.catalogue import CATALOGUE, AvailableModel
from shared_engine.documents import Modality
from shared_engine.errors import ConfigurationError
from shared_engine.pipeline import OptionsT, Pipeline
from shared_engine.registry import Lease
from shared_engine.routing import select_backend
from shared_engine.threads import call_in_thread, result_of, run_off_loop, wait_until_done
from shared_engine.usage import TokenCount

if TYPE_CHECKING:
    from numpy.typing import NDArray

_T = TypeVar("_T")

_SMALL = 64 * 2048
"""Values of an array that is finished on the event loop, in well under a millisecond; larger ones
are finished in a thread."""


class Model(Generic[OptionsT]):
    """A model in this process or at a server; the base of `Embedder` and `Reranker`."""

    _options_type: type[OptionsT]
    _pipeline_type: type[Pipeline[OptionsT]]

    def __init__(
        self, options: OptionsT | str | Path | None = None, *, _lease: Lease | None = None
    ) -> None:
        """Create the object; the model is loaded at first use.

        Args:
            options: Options, or the name or folder of a model; None is the default model.
        """
        self.options: OptionsT = self._options_type.of(options)
        self._lease = _lease or Lease(self.options)
        self._owns_lease = _lease is None
        self._used = TokenCount()
        self._pipeline = self._pipeline_type(self._lease, self.options, self._used)

    def _unwrap(self, rows: Rows) -> NDArray[Any]:
        """Finish rows, and return their values or raise their errors."""
        rows = self._pipeline.finish(rows)
        try:
            if len(rows) == 1 and rows.errors:
                raise rows.errors[0]
            return rows.unwrap()
        finally:
            del rows  # an error holds this frame by its traceback, so the frame must not hold it

    async def _await(self, submit: Callable[[], Future[Rows]], convert: Callable[[Rows], _T]) -> _T:
        """Submit in a thread, and convert the result, without blocking the event loop."""
        submitting = call_in_thread(submit)
        try:
            future = await asyncio.wrap_future(submitting)
        except asyncio.CancelledError:  # here, as the loop may end before another task runs
            submitting.add_done_callback(_cancel_submitted)
            raise
        finally:
            del submitting  # as in `_unwrap`
        await wait_until_done(future)
        rows = result_of(future)
        try:
            if rows.vectors.size <= _SMALL:
                return convert(rows)
            return await run_off_loop(convert, rows)
        finally:
            del future, rows  # as in `_unwrap`

    def load(self) -> Backend:
        """Load the model, or create the client of the server, and return the shared backend.

        The first call of another method does it, too.

        Raises:
            CheckpointError: the weights cannot be found or are not supported.
            ConfigurationError: the options cannot work.
            EngineClosedError: `close` was called.
        """
        return self._lease.acquire()

    @property
    def model(self) -> str | None:
        """Name of the model. Loads nothing; None while only a server knows it."""
        if self.options.model is None and self.base_url is None:
            return self.options.local_model
        return self.options.model or self.load().model

    @property
    def base_url(self) -> str | None:
        """Address of the server; None for a model in this process. Loads nothing."""
        return select_backend(self.options).base_url

    @property
    def modalities(self) -> frozenset[Modality]:
        """Kinds of input that the model takes. Loads the model.

        A server with a model outside the catalogue may take fewer.
        """
        return self.load().modalities

    @property
    def description(self) -> str:
        """Model, device or server, and the reasons for them. Loads the model."""
        return self.load().description

    @property
    def usage(self) -> int:
        """Tokens that this object has computed so far, prompts and special tokens included."""
        return self._used.tokens

    def list_models(self) -> list[AvailableModel]:
        """Return the models of the catalogue, or those that the server serves.

        Raises:
            RemoteError: the server does not list them.
        """
        if self.base_url is None:
            task = self.options.task
            return [AvailableModel(spec.name) for spec in CATALOGUE if spec.task == task]
        return self.load().list_models()

    def wait_until_ready(self, timeout: float = 600.0) -> None:
        """Load the model, or wait until the server is ready.

        Raises:
            RequestTimeoutError: it was not ready within `timeout` seconds.
        """
        self.load().wait_until_ready(timeout)

    def with_options(self, **changes: Any) -> Self:
        """Return an object on the same engine with other `truncate` and so on.

        It counts its own `usage`, and works until the original is closed.

        Raises:
            ConfigurationError: an option that needs another engine.
            pydantic.ValidationError: an unknown option, or an invalid value.
        """
        kind, name = type(self.options), type(self).__name__
        if fixed := changes.keys() & {*kind.names_of("routing", "engine", "local", "nim")}:
            raise ConfigurationError(
                f"{', '.join(sorted(fixed))}: would need another engine; create a new {name}, or "
                f"change only {', '.join(kind.names_of('request'))}"
            )
        options: Any = self.options.replace(**changes)
        return type(self)(options, _lease=self._lease)

    def close(self, cancel: bool = False) -> None:
        """Release the model; further calls raise EngineClosedError.

        Closing the last object of a model finishes the accepted work, or cancels it, and frees the
        device. Leaving a `with` block by an exception, such as an interrupt, cancels.
        """
        if self._owns_lease:
            self._lease.close(cancel)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(cancel=kind is not None)

    def __reduce__(self) -> tuple[type[Self], tuple[OptionsT]]:
        return type(self), (self.options,)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.options!r})"


def _cancel_submitted(submitting: Future[Future[Rows]]) -> None:
    if not submitting.cancelled() and submitting.exception() is None:
        submitting.result().cancel()
