"""One backend for each configuration in a process, however many objects ask for it.

An `Embedder` holds a `Lease`. Equal options lead to the same engine, so that a chain and an index
share one loaded model; the last lease to go closes it. A forked child starts with none.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref

from shared_engine.backend import Backend
from shared_engine.errors import CheckpointError
from shared_engine.options import Options
from shared_engine.routing import Choice, explain_key_in_environment, select_backend
from shared_engine.threads import raise_closed

_log = logging.getLogger("shared_engine")


class Engine:
    """A backend that is made when first asked for."""

    def __init__(self, options: Options, choice: Choice) -> None:
        names = options.names_of("engine", choice.scope)
        values = (_make_hashable(getattr(options, name)) for name in names)
        self.key = (choice.base_url, choice.api_key, options.is_model_given, *values)
        self.pid = os.getpid()
        self.leases = 0
        self._options = options
        self._choice = choice
        self._lock = threading.Lock()
        self._backend: Backend | None = None

    @property
    def backend(self) -> Backend:
        """The backend; the first access loads the model."""
        with self._lock:
            if self._backend is None:
                if _exiting:
                    raise_closed("the interpreter is ending")
                self._backend = self._build()
            return self._backend

    def _build(self) -> Backend:
        base_url, api_key, reason, level = self._choice
        _log.log(level, "%s", reason)
        if base_url is None:
            from shared_engine.local import LocalBackend  # brings torch

            try:
                return LocalBackend(self._options)
            except CheckpointError as exc:
                raise type(exc)(f"{exc}{explain_key_in_environment()}") from exc.__cause__
        from shared_engine.nim import NimBackend  # brings httpx

        return NimBackend(self._options, base_url, api_key)

    def close(self, cancel: bool, wait: bool) -> None:
        """Close the backend if there is one."""
        with self._lock:
            backend, self._backend = self._backend, None
        if backend is not None:
            _closing.add(backend)
            backend.close(cancel, wait)


class Lease:
    """A share in the engine of some options, taken at first use."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._engine: Engine | None = None
        self._closed = False
        self._finalizer: weakref.finalize[..., Lease] | None = None

    @property
    def backend(self) -> Backend:
        """The backend; the first access by anybody loads the model.

        Raises:
            EngineClosedError: `close` was called.
            ConfigurationError: the options cannot work.
        """
        engine = self._engine
        if engine is None or engine.pid != os.getpid() or self._closed:
            engine = self._acquire()
        return engine.backend

    def _acquire(self) -> Engine:
        choice = select_backend(self._options)
        with _lock:
            if self._closed:
                raise_closed("this Embedder was closed; make a new one")
            engine = self._engine
            if engine is not None and engine.pid == os.getpid():  # another thread was first
                return engine
            if self._finalizer is not None:  # of the parent's engine
                self._finalizer.detach()
            wanted = Engine(self._options, choice)
            engine = self._engine = _engines.setdefault(wanted.key, wanted)
            engine.leases += 1
            # Runs wherever the garbage collector does, so it must not wait for a worker.
            self._finalizer = weakref.finalize(self, _give_back, engine, cancel=True, wait=False)
            self._finalizer.atexit = False
            return engine

    def close(self, cancel: bool = False) -> None:
        """Give the share back; the last finishes what was accepted, or cancels it, and waits."""
        with _lock:
            self._closed = True
            engine, finalizer = self._engine, self._finalizer
        if engine is not None and finalizer is not None and finalizer.detach():
            _give_back(engine, cancel, wait=True)


# Reentrant, because a finalizer may run in a thread that holds it.
_lock = threading.RLock()
_engines: dict[tuple[object, ...], Engine] = {}
_closing: weakref.WeakSet[Backend] = weakref.WeakSet()
"""Backends that were told to close; their threads keep them alive until they are done."""
_exiting = False


def _make_hashable(value: object) -> object:
    return tuple(sorted(value.items())) if isinstance(value, dict) else value


def _give_back(engine: Engine, cancel: bool, wait: bool) -> None:
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
    global _lock  # noqa: PLW0603 - the parent's may be held for ever
    _lock = threading.RLock()
    _engines.clear()
    _closing.clear()


@atexit.register
def _close_all() -> None:
    global _exiting  # noqa: PLW0603
    _exiting = True
    for engine in list(_engines.values()):
        engine.close(cancel=True, wait=True)
    for backend in list(_closing):  # a thread inside torch must not see the interpreter go
        backend.close(wait=True)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
