"""One engine for each configuration in a process, however many objects ask for it.

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
from shared_engine.options import Options
from shared_engine.routing import choose

stopping: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
"""Threads of backends that were told to close; the interpreter waits for them before it goes."""

_BUILT_FROM_HERE = (
    "model",
    "checkpoint",
    "revision",
    "device",
    "dtype",
    "max_tokens",
    "max_tiles",
    "image_urls",
    "tokens_per_step",
)
_BUILT_FROM_THERE = (
    "model",
    "allow_insecure_key",
    "default_headers",
    "timeout",
    "deadline",
    "max_retries",
    "max_batch_size",
    "concurrency",
    "verify_ssl",
    "proxy",
    "user",
    "image_urls",
    "http_client",
)
"""The options that an engine is made of; the others travel with each request."""

_log = logging.getLogger("shared_engine")


class Engine:
    """A backend that is made when first asked for."""

    def __init__(self, options: Options) -> None:
        self.choice = choose(options)
        built_from = _BUILT_FROM_HERE if self.choice.base_url is None else _BUILT_FROM_THERE
        self.key = (*self.choice[:2], *(_hashable(getattr(options, name)) for name in built_from))
        self.pid = os.getpid()
        self.leases = 0
        self._options = options
        self._lock = threading.Lock()
        self._backend: Backend | None = None

    @property
    def backend(self) -> Backend:
        """The backend; the first access loads the model."""
        with self._lock:
            if self._backend is None:
                self._backend = self._made()
            return self._backend

    def _made(self) -> Backend:
        base_url, api_key, reason = self.choice
        _log.info("%s", reason)
        if base_url is None:
            from shared_engine.local import LocalBackend  # brings torch

            return LocalBackend(self._options)
        from shared_engine.nim import NimBackend

        return NimBackend(self._options, base_url, api_key)

    def close(self, cancel: bool, wait: bool) -> None:
        """Close the backend if there is one."""
        with self._lock:
            backend, self._backend = self._backend, None
        if backend is not None:
            backend.close(cancel, wait)


class Lease:
    """A share in the engine of some options."""

    def __init__(self, options: Options) -> None:
        with _lock:
            wanted = Engine(options)
            self._engine = _engines.setdefault(wanted.key, wanted)
            self._engine.leases += 1
        # Runs wherever the garbage collector does, so it must not wait for a worker.
        self._finalizer = weakref.finalize(self, _give_back, self._engine, cancel=True, wait=False)
        self._finalizer.atexit = False

    @property
    def backend(self) -> Backend:
        """The backend; the first access by anybody loads the model."""
        return self._engine.backend

    @property
    def foreign(self) -> bool:
        """Whether it came over a fork: threads and device stayed with the parent."""
        return self._engine.pid != os.getpid()

    def close(self, cancel: bool) -> None:
        """Give the share back; the last finishes what was accepted, or cancels it, and waits."""
        if self._finalizer.detach():
            _give_back(self._engine, cancel, wait=True)


# Reentrant, because a finalizer may run in a thread that holds it.
_lock = threading.RLock()
_engines: dict[tuple[object, ...], Engine] = {}


def _hashable(value: object) -> object:
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


@atexit.register
def _close_all() -> None:
    for engine in list(_engines.values()):
        engine.close(cancel=True, wait=True)
    for thread in list(stopping):  # those of engines that the garbage collector closed
        thread.join()  # a thread inside torch must not see the interpreter go


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_afresh)
