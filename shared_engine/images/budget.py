"""How much memory the images that are being decoded may take, over all threads."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager


class MemoryBudget:
    """So many bytes, lent to threads in the order in which they ask.

    One that asks for more than there is gets all of it, and so works alone. A thread must not ask
    while it holds some: two of those could wait for each other.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.renew()

    def renew(self) -> None:
        """Forget who holds what, as in the child of a fork, where those threads are not."""
        self.free = self.capacity
        self._waiting: deque[object] = deque()
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, size: int) -> Iterator[None]:
        """Wait for `size` bytes, and hold them until the end."""
        size = min(size, self.capacity)
        turn = object()
        with self._changed:
            self._waiting.append(turn)
            try:
                self._changed.wait_for(lambda: self._waiting[0] is turn and self.free >= size)
                self.free -= size
            finally:
                self._waiting.remove(turn)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self.free += size
                self._changed.notify_all()
