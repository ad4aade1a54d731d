"""Count the tokens of calls, without a change to their results."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

from shared_engine.threads import after_fork


@dataclass(eq=False)
class TokenCount:
    """A sum of tokens; several threads may add to it."""

    tokens: int = 0
    """Tokens so far, prefixes and special tokens included."""

    def add(self, tokens: int) -> None:
        """Add the tokens of some inputs."""
        with _lock:
            self.tokens += tokens


_counting: ContextVar[tuple[TokenCount, ...]] = ContextVar("counting", default=())


def _renew_lock() -> None:
    global _lock  # noqa: PLW0603 - a thread of a fork's parent may hold it
    _lock = threading.Lock()


_lock: threading.Lock
_renew_lock()
after_fork(_renew_lock)


@contextmanager
def track_usage() -> Iterator[TokenCount]:
    """Count the tokens of every call inside the `with` block, through any adapter, sync or async.

        with track_usage() as used:
            vectors = embeddings.embed_documents(texts)
        print(used.tokens)

    Based on a context variable: tasks and `asyncio.to_thread` calls of the block are counted,
    threads started in any other manner are not. A NIM counts its own tokens, or sends no count.
    """
    count = TokenCount()
    token = _counting.set((*_counting.get(), count))
    try:
        yield count
    finally:
        _counting.reset(token)


def count_for(*own: TokenCount) -> Callable[[int], None]:
    """Return a function that adds tokens to `own` and to every enclosing `track_usage` block."""
    counts = (*own, *_counting.get())

    def add(tokens: int) -> None:
        for count in counts:
            count.add(tokens)

    return add
