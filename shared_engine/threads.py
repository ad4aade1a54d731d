"""Threads: our own for what an event loop must not do itself, and the program's own at its end."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, NoReturn, ParamSpec, TypeVar

from shared_engine.errors import EngineClosedError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MOST_THREADS = 16


def run_off_loop(
    function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> asyncio.Future[_T]:
    """Call a function in a thread, with the caller's context variables; await the result."""
    return asyncio.wrap_future(call_in_thread(function, *args, **kwargs))


def call_in_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
    """Do as `run_off_loop` does, with a future that outlives the event loop.

    asyncio's default threads belong to the program, whose blocking jobs may hold all of them.
    """
    context = copy_context()
    try:
        return _threads.submit(lambda: context.run(function, *args, **kwargs))
    except RuntimeError as exc:  # no executor takes anything once the interpreter ends
        _park_daemon()
        raise EngineClosedError("the interpreter is ending") from exc


def run_in_own_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function in a new thread, and wait for it.

    An executor would start none for a thread that outlives the main one; nor does Python 3.12.

    Raises:
        EngineClosedError: the interpreter is ending.
    """
    future: Future[_T] = Future()

    def run(future: Future[_T]) -> None:
        try:
            future.set_result(function(*args, **kwargs))
        except BaseException as exc:
            future.set_exception(exc)

    try:
        threading.Thread(target=run, args=(future,), daemon=False).start()
    except RuntimeError:
        if threading.main_thread().is_alive():  # the system gives no more of them
            raise
        raise_closed("the interpreter is ending")
    try:
        return future.result()
    finally:
        del future  # an error's frames would hold it, and it the error


async def wait_until_done(future: Future[Any]) -> None:
    """Return when a future is done, with a result or without; being cancelled cancels it."""
    waiting = asyncio.wrap_future(future)
    try:
        await asyncio.wait([waiting])
    except asyncio.CancelledError:
        future.cancel()
        raise
    if not waiting.cancelled():
        waiting.exception()  # looked at, so that asyncio does not complain of it


def raise_closed(message: str) -> NoReturn:
    """Raise EngineClosedError; not in a daemon thread once the interpreter ends."""
    if not threading.main_thread().is_alive():
        _park_daemon()
    raise EngineClosedError(message)


def _park_daemon() -> None:
    """Keep a daemon thread where it is: it is about to vanish, and an error would only be noise."""
    if threading.current_thread().daemon:
        threading.Event().wait()


def _make_threads() -> None:
    global _threads  # noqa: PLW0603 - after a fork the threads stayed with the parent
    _threads = ThreadPoolExecutor(_MOST_THREADS, "nemoretriever-async")


_threads: ThreadPoolExecutor
_make_threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_threads)
