"""Models that share a device: one step at a time, searches first, and documents not forgotten."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shared_engine import Embedder, Options, Reranker, RerankOptions
from shared_engine.local.device_lock import SEARCHES_IN_A_ROW, DeviceLock, lock_of
from tests.support.checkpoints import build_checkpoint
from tests.support.rerankers import build_reranker
from tests.support.servers import wait_for


class Steps:
    """Threads that hold the lock for a step, and the order in which they did."""

    def __init__(self, lock: DeviceLock) -> None:
        self.lock = lock
        self.order: list[str] = []
        self.threads: list[threading.Thread] = []

    def start(self, name: str, during: Callable[[], None] = lambda: None) -> None:
        """Start a thread with one step; those of searches have names with "search"."""
        waiting = sum(map(len, self.lock._waiting.values()))

        def run() -> None:
            with self.lock.hold("search" in name):
                self.order.append(name)
                during()

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()
        wait_for(lambda: name in self.order or sum(map(len, self.lock._waiting.values())) > waiting)

    def join(self) -> list[str]:
        for thread in self.threads:
            thread.join(30)
            assert not thread.is_alive()
        return self.order


@pytest.fixture
def lock() -> DeviceLock:
    return DeviceLock()


def test_searches_go_before_documents_that_waited_longer(lock):
    steps, release = Steps(lock), threading.Event()
    steps.start("first", release.wait)
    steps.start("documents")
    steps.start("search")
    release.set()
    assert steps.join() == ["first", "search", "documents"]


def test_documents_get_a_step_after_some_steps_of_searches(lock):
    steps, release = Steps(lock), threading.Event()
    steps.start("first", release.wait)
    steps.start("documents")
    for number in range(SEARCHES_IN_A_ROW + 3):
        steps.start(f"search {number}")
    release.set()
    assert steps.join().index("documents") == 1 + SEARCHES_IN_A_ROW


def test_a_step_of_documents_yields_in_its_pauses_up_to_a_limit(lock):
    steps, arrived = Steps(lock), threading.Event()

    def pause() -> None:
        assert arrived.wait(30)
        for _ in range(3):
            lock.yield_device(is_search=False)
        steps.order.append("end of documents")

    steps.start("documents", pause)
    for number in range(SEARCHES_IN_A_ROW + 3):
        steps.start(f"search {number}")
    arrived.set()
    order = steps.join()
    assert order[0] == "documents"
    assert order.index("end of documents") == 1 + SEARCHES_IN_A_ROW
    assert len(order) == 2 + SEARCHES_IN_A_ROW + 3


def test_searches_take_turns_in_the_order_of_their_arrival(lock):
    """A rerank has many steps; a query of another model waits for the end of one, or a pause."""
    steps, arrived, release = Steps(lock), threading.Event(), threading.Event()

    def pause() -> None:
        assert lock.may_continue()
        arrived.wait(30)
        assert not lock.may_continue()
        lock.yield_device(is_search=True)
        steps.order.append("end of rerank's search")

    steps.start("rerank's search", pause)
    steps.start("search 1", release.wait)
    arrived.set()
    wait_for(lambda: "search 1" in steps.order)
    steps.start("search 2")
    release.set()
    assert steps.join() == ["rerank's search", "search 1", "end of rerank's search", "search 2"]


def test_a_search_counts_once_for_documents_that_wait_however_often_it_pauses(lock):
    steps, arrived = Steps(lock), threading.Event()

    def pause() -> None:
        assert arrived.wait(30)
        lock.yield_device(is_search=True)
        counts.append(lock._searches)

    counts: list[int] = []
    steps.start("rerank's search", pause)
    steps.start("documents")
    steps.start("search")
    arrived.set()
    assert steps.join() == ["rerank's search", "search", "documents"]
    assert counts == [1]  # the first began before documents waited


def test_a_step_that_fails_releases_the_lock(lock):
    for is_search in (True, False):
        with pytest.raises(ZeroDivisionError), lock.hold(is_search):
            raise ZeroDivisionError
    assert Steps(lock).join() == []
    with lock.hold(is_search=True):
        pass


def test_models_of_one_device_share_its_lock():
    cpu = torch.device("cpu")
    assert lock_of(cpu) is lock_of(torch.device("cpu"))
    assert lock_of(cpu) is not lock_of(torch.device("cuda", 0))


@pytest.mark.parametrize("within", ["documents", "rerank"])
def test_a_search_runs_within_a_step_of_another_model(tmp_path, within):
    """The step begins before the search and ends after it, and neither changes the other."""
    options = {"device": "cpu", "dtype": "float32"}
    with (
        Embedder(Options(model=str(build_checkpoint(tmp_path / "embed")), **options)) as embedder,
        Reranker(RerankOptions(model=str(build_reranker(tmp_path / "rerank")), **options)) as there,
    ):
        query, texts = "what is it?", ["a text of some words " * 60] * 8
        tasks: dict[str, tuple[Any, Callable[[], np.ndarray]]] = {
            "documents": (embedder, lambda: embedder.embed(texts)),
            "rerank": (there, lambda: there.score(query, texts)),
            "query": (embedder, lambda: embedder.embed([query], role="query")),
        }
        model, task = tasks[within]
        search = tasks["rerank" if within == "documents" else "query"][1]
        expected = task(), search()
        encoder = model.load()._encoders[0]
        forward, lock = encoder._forward, lock_of(encoder.device)
        found: list[np.ndarray] = []

        def step(x, positions, layout, buffers, on_pause):
            encoder._forward = forward
            threading.Thread(target=lambda: found.append(search())).start()
            wait_for(lambda: lock._waiting[True])
            out = forward(x, positions, layout, buffers, on_pause)
            wait_for(lambda: len(found) == 1)  # this step still holds the lock
            return out

        encoder._forward = step
        np.testing.assert_allclose(task(), expected[0], atol=1e-5)
        np.testing.assert_allclose(found[0], expected[1], atol=1e-5)
