"""One step at a time on a device that several models share; steps of searches go first.

Each model has its own queue and thread. Two threads that computed simultaneously would each take
twice as long, and an ingest with one model would delay a search with another. So a thread holds the
lock of its device while it starts a step: on a CPU until the step is computed, on a GPU until the
step is queued. On a CPU, a long step yields the device to waiting searches in its pauses.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition

import torch

from shared_engine.threads import after_fork

SEARCHES_IN_A_ROW = 8
"""Steps of searches that may delay a step of documents."""


class DeviceLock:
    """The lock of one device. A thread must not acquire it twice."""

    def __init__(self) -> None:
        self._changed = Condition()
        self._is_held = False
        self._waiting: dict[bool, deque[object]] = {False: deque(), True: deque()}
        """Steps that wait, of documents and of searches, in the order of their arrival."""
        self._searches = 0
        """Steps of searches since a step of documents was computed while others waited."""

    @contextmanager
    def hold(self, is_search: bool) -> Iterator[None]:
        """Hold the lock for one step."""
        with self._changed:
            self._acquire(is_search)
            self._searches += is_search and bool(self._waiting[False])
        try:
            yield
        finally:
            with self._changed:
                self._release()
                if not is_search:
                    self._searches = 0

    def may_continue(self) -> bool:
        """Count another step of searches of the holder, and return whether it may run now.

        Otherwise documents would get the lock between two steps of one search.
        """
        with self._changed:
            if self._waiting[True]:
                return False
            self._searches += bool(self._waiting[False])
            return self._searches <= SEARCHES_IN_A_ROW

    def yield_device(self, is_search: bool) -> None:
        """Let waiting steps of searches run; for the holder, in a pause of its step."""
        if self._waiting[True] and (is_search or self._searches < SEARCHES_IN_A_ROW):
            with self._changed:
                self._release()
                self._acquire(is_search)

    def _acquire(self, is_search: bool) -> None:
        queue, place = self._waiting[is_search], object()
        queue.append(place)
        while self._is_held or queue[0] is not place or self._must_wait(is_search):
            self._changed.wait()
        queue.popleft()
        self._is_held = True

    def _must_wait(self, is_search: bool) -> bool:
        is_turn_of_documents = self._searches >= SEARCHES_IN_A_ROW
        if is_search:
            return is_turn_of_documents and bool(self._waiting[False])
        return not is_turn_of_documents and bool(self._waiting[True])

    def _release(self) -> None:
        self._is_held = False
        self._changed.notify_all()


def lock_of(device: torch.device) -> DeviceLock:
    """Return the lock of a device, the same for every model in this process."""
    return _locks.setdefault(str(device), DeviceLock())  # atomic


_locks: dict[str, DeviceLock] = {}
after_fork(_locks.clear)  # the threads that held them stayed with the parent
