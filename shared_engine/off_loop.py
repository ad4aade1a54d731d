"""Threads of our own for what an event loop must not do itself.

asyncio's default ones belong to the program, whose blocking jobs may hold all of them.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, ParamSpec, TypeVar

_P = ParamSpec("_P")
_T = TypeVar("_T")

_MOST_THREADS = 16


def run_off_loop(
    function: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs
) -> asyncio.Future[_T]:
    """Call a function in a thread, with the caller's context variables; await the result."""
    context = copy_context()
    return asyncio.get_running_loop().run_in_executor(
        _threads, lambda: context.run(function, *args, **kwargs)
    )


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


def _make_threads() -> None:
    global _threads  # noqa: PLW0603 - after a fork the threads stayed with the parent
    _threads = ThreadPoolExecutor(_MOST_THREADS, "nemoretriever-async")


_threads: ThreadPoolExecutor
_make_threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_threads)
