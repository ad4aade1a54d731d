"""One engine for each configuration in a process, however many objects ask for it.

`choose` decides whether this process or a NIM computes.

An `Embedder` holds a `Lease`. Equal options lead to the same engine, so that a chain and an index
share one loaded model; the last lease to go closes it. A forked child starts with none.
"""

from __future__ import annotations

import atexit
import logging
import os
import threading
import weakref
from typing import NamedTuple

from pydantic import SecretStr

from shared_engine.backend import Backend
from shared_engine.errors import ConfigurationError
from shared_engine.nim_address import HOSTED, is_hosted, is_safe_for_keys, normalised
from shared_engine.options import Options

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
_ONLY_HERE = ("checkpoint", "revision", "max_tokens", "max_tiles")
"""Options that would change the vectors, and that a NIM cannot be told."""

_log = logging.getLogger("shared_engine")


class Choice(NamedTuple):
    """Which engine runs, and why."""

    base_url: str | None
    """Address of the NIM, or None for a model in this process."""
    api_key: SecretStr | None
    reason: str


def choose(options: Options) -> Choice:
    """Decide from what was said: a base_url, a key, or neither.

    >>> choose(Options(base_url="http://nim:8000")).base_url
    'http://nim:8000/v1'

    Raises:
        ConfigurationError: a key is needed and missing, or an option makes no sense with a NIM.
    """
    url = os.environ.get("NVIDIA_BASE_URL")
    if options.base_url is not None:
        base_url, reason = options.base_url, "base_url is given"
    elif url:
        base_url, reason = normalised(url), "NVIDIA_BASE_URL is set"
    elif options.api_key is not None:
        base_url, reason = HOSTED, "a key is given and no base_url, so NVIDIA's catalogue"
    else:
        return Choice(None, None, "neither base_url nor a key is given, so this process")
    for name in _ONLY_HERE:
        if getattr(options, name) is not None:
            raise ConfigurationError(
                f"{name}= is for a model in this process, but {reason}; leave one of them out"
            )
    return Choice(base_url, _key(options, base_url), reason)


def _key(options: Options, base_url: str) -> SecretStr | None:
    given = options.api_key
    if given is not None and given.get_secret_value():
        return given
    value = os.environ.get("NVIDIA_API_KEY", "").strip()
    if not value and given is not None:
        raise ConfigurationError(
            "api_key is empty. Pickled options leave it out: set NVIDIA_API_KEY where they are "
            "loaded"
        )
    if not value and is_hosted(base_url):
        raise ConfigurationError("NVIDIA's catalogue needs a key: give api_key=, or NVIDIA_API_KEY")
    if value and given is None and not (options.allow_insecure_key or is_safe_for_keys(base_url)):
        _log.warning("NVIDIA_API_KEY is not sent to %s, which has no TLS", base_url)
        return None
    return SecretStr(value) if value else None


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
