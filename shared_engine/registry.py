"""One backend per configuration in a process, shared by all objects with equal options.

An `Embedder` or `Reranker` holds a `Lease`. Equal options lead to one engine, so that a chain and
an index share a loaded model; closing the last lease closes it. The child of a fork starts with
none.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref

from shared_engine.backend import Backend
from shared_engine.errors import CheckpointError, EngineClosedError
from shared_engine.options import EngineOptions
from shared_engine.routing import Choice, explain_key_in_environment, select_backend
from shared_engine.threads import after_fork

_log = logging.getLogger("shared_engine")


class Engine:
    """A backend that is created at the first `load`."""

    def __init__(self, options: EngineOptions, choice: Choice) -> None:
        names = options.names_of("engine", choice.scope)
        values = (_make_hashable(getattr(options, name)) for name in names)
        self.key = (options.task, choice.base_url, choice.api_key, *values)
        self.pid = os.getpid()
        self.leases = 0
        self._options = options
        self._choice = choice
        self._lock = threading.Lock()
        self._backend: Backend | None = None
        self._is_closed = False

    def load(self) -> Backend:
        """Return the backend; the first call loads the model."""
        with self._lock:
            if self._backend is None:
                if _exiting:
                    raise EngineClosedError("the interpreter is shutting down")
                if self._is_closed:  # by another thread, since this one took it from a lease
                    raise EngineClosedError("this object was closed; create a new one")
                self._backend = self._create()
            return self._backend

    def _create(self) -> Backend:
        base_url, api_key, reason, level = self._choice
        _log.log(level, "%s", reason)
        if base_url is None:
            from shared_engine.local import LocalBackend  # imports torch

            try:
                return LocalBackend(self._options)
            except CheckpointError as exc:
                raise type(exc)(f"{exc}{explain_key_in_environment()}") from exc.__cause__
        from shared_engine.nim import NimBackend  # imports httpx

        return NimBackend(self._options, base_url, api_key)

    def close(self, cancel: bool, wait: bool) -> None:
        """Close the backend if it was created."""
        with self._lock:
            self._is_closed = True
            backend, self._backend = self._backend, None
        if backend is not None:
            _closing.add(backend)
            backend.close(cancel, wait)


class Lease:
    """A share in the engine of some options, taken at the first `acquire`."""

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._engine: Engine | None = None
        self._closed = False
        self._finalizer: weakref.finalize[..., Lease] | None = None

    def acquire(self) -> Backend:
        """Return the backend; the first call of any lease loads the model.

        Raises:
            EngineClosedError: `close` was called.
            ConfigurationError: the options cannot work.
        """
        engine = self._engine
        if engine is None or engine.pid != os.getpid() or self._closed:
            engine = self._join()
        return engine.load()

    def _join(self) -> Engine:
        choice = select_backend(self._options)
        with _lock:
            if self._closed:
                raise EngineClosedError("this object was closed; create a new one")
            engine = self._engine
            if engine is not None and engine.pid == os.getpid():  # another thread was first
                return engine
            if self._finalizer is not None:  # of the engine in the parent of a fork
                self._finalizer.detach()
            wanted = Engine(self._options, choice)
            engine = self._engine = _engines.setdefault(wanted.key, wanted)
            engine.leases += 1
            # May run inside the garbage collector, so it must not wait for a worker.
            self._finalizer = weakref.finalize(self, _release, engine, cancel=True, wait=False)
            self._finalizer.atexit = False
            return engine

    def close(self, cancel: bool = False) -> None:
        """Return the share; the last one finishes the accepted work, or cancels it, and waits."""
        with _lock:
            self._closed = True
            engine, finalizer = self._engine, self._finalizer
        if engine is not None and finalizer is not None and finalizer.detach():
            _release(engine, cancel, wait=True)


# Reentrant, as a finalizer may run in a thread that holds it.
_lock = threading.RLock()
_engines: dict[tuple[object, ...], Engine] = {}
_closing: weakref.WeakSet[Backend] = weakref.WeakSet()
"""Backends that were closed; their threads keep them alive until they have stopped."""
_exiting = False


def _make_hashable(value: object) -> object:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


def _release(engine: Engine, cancel: bool, wait: bool) -> None:
    if engine.pid != os.getpid():
        return
    with _lock:
        engine.leases -= 1
        if engine.leases:
            return
        if _engines.get(engine.key) is engine:
            del _engines[engine.key]
    engine.close(cancel, wait)


def _start_afresh() -> None:
    global _lock  # noqa: PLW0603 - a thread of the fork's parent may hold it
    _lock = threading.RLock()
    _engines.clear()
    _closing.clear()


@atexit.register
def _close_all() -> None:
    global _exiting  # noqa: PLW0603
    _exiting = True
    for engine in list(_engines.values()):
        engine.close(cancel=True, wait=True)
    for backend in list(_closing):  # a thread inside torch must not outlive the interpreter
        backend.close(wait=True)


after_fork(_start_afresh)
