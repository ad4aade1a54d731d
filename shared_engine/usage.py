"""How many tokens calls have used, without a change to what they return."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class TokenCount:
    """A sum of tokens that many threads may add to."""

    def __init__(self) -> None:
        self.tokens = 0
        """Tokens so far, prefixes and special tokens included."""
        self._make_lock()

    def _make_lock(self) -> None:
        self._lock, self._pid = threading.Lock(), os.getpid()

    def add(self, tokens: int) -> None:
        """Add the tokens of some inputs."""
        if self._pid != os.getpid():  # after a fork: the parent's may be held for ever
            self._make_lock()
        with self._lock:
            self.tokens += tokens

    def __repr__(self) -> str:
        return f"TokenCount(tokens={self.tokens})"


_counting: ContextVar[tuple[TokenCount, ...]] = ContextVar("counting", default=())


@contextmanager
def track_usage() -> Iterator[TokenCount]:
    """Count the tokens of every call inside the `with`, through any adapter, sync or async.

        with track_usage() as used:
            vectors = embeddings.embed_documents(texts)
        print(used.tokens)

    It is a context variable: tasks and `asyncio.to_thread` inside belong to it, a thread that was
    started otherwise does not. A NIM counts for itself; 0 where it does not say.
    """
    count = TokenCount()
    token = _counting.set((*_counting.get(), count))
    try:
        yield count
    finally:
        _counting.reset(token)


def count_for(own: TokenCount) -> Callable[[int], None]:
    """Return what adds tokens to a count and to all that the caller is inside of now."""
    counts = (own, *_counting.get())

    def add(tokens: int) -> None:
        for count in counts:
            count.add(tokens)

    return add
