"""Threads for the work that must not block an event loop, and waiting for futures."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, ParamSpec, TypeVar

from shared_engine.errors import EngineClosedError

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MAX_THREADS = 16


def run_off_loop(
    function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> asyncio.Future[_T]:
    """Call a function in a thread, with the caller's context variables; await the result."""
    return asyncio.wrap_future(call_in_thread(function, *args, **kwargs))


def call_in_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
    """Call a function in a thread of ours, with the caller's context variables.

    asyncio's default executor belongs to the program, whose blocking jobs may hold all its threads.

    Raises:
        EngineClosedError: the interpreter is shutting down.
    """
    context = copy_context()
    try:
        return _threads.submit(lambda: context.run(function, *args, **kwargs))
    except RuntimeError as exc:
        raise EngineClosedError("the interpreter is shutting down") from exc


def run_in_own_thread(function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
    """Call a function in a new thread that ends with it, and wait for the result."""
    with ThreadPoolExecutor(1) as thread:
        return result_of(thread.submit(function, *args, **kwargs))


def result_of(future: Future[_T]) -> _T:
    """Wait for a future and return its result, or raise its error. An interrupt cancels it.

    Raises:
        EngineClosedError: the future was cancelled.
    """
    try:
        return future.result()
    except CancelledError:
        raise EngineClosedError("the engine was closed before this work was done") from None
    finally:
        future.cancel()
        del future  # an error holds this frame by its traceback, so the frame must not hold it


async def wait_until_done(future: Future[Any]) -> None:
    """Return when a future is done or has failed; cancelling this cancels the future."""
    waiting = asyncio.wrap_future(future)
    try:
        await asyncio.wait([waiting])
    except asyncio.CancelledError:
        future.cancel()
        raise
    if not waiting.cancelled():
        waiting.exception()  # retrieved, so that asyncio does not log it as never retrieved


def after_fork(renew: Callable[[], object]) -> None:
    """Call a function in the child of every fork, which lacks the threads of its parent."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=renew)


def _start_threads() -> None:
    global _threads  # noqa: PLW0603 - the threads stay with the parent of a fork
    _threads = ThreadPoolExecutor(_MAX_THREADS, "nemoretriever-async")


_threads: ThreadPoolExecutor
_start_threads()
after_fork(_start_threads)
