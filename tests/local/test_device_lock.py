"""Models that share a device: one step at a time, searches first, and documents not forgotten."""

from __future__ import annotations

import threading
from collections.abc import Callable

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
        waiting = sum(self.lock._waiting.values())

        def run() -> None:
            with self.lock.hold("search" in name):
                self.order.append(name)
                during()

        self.threads.append(threading.Thread(target=run, daemon=True))
        self.threads[-1].start()
        wait_for(lambda: name in self.order or sum(self.lock._waiting.values()) > waiting)

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
            lock.yield_device()
        steps.order.append("end of documents")

    steps.start("documents", pause)
    for number in range(SEARCHES_IN_A_ROW + 3):
        steps.start(f"search {number}")
    arrived.set()
    order = steps.join()
    assert order[0] == "documents"
    assert order.index("end of documents") == 1 + SEARCHES_IN_A_ROW
    assert len(order) == 2 + SEARCHES_IN_A_ROW + 3


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


def test_a_rerank_runs_within_a_step_of_documents_of_another_model(tmp_path):
    """The step begins before the rerank and ends after it, and neither changes the other."""
    options = {"device": "cpu", "dtype": "float32"}
    with (
        Embedder(Options(model=str(build_checkpoint(tmp_path / "embed")), **options)) as embedder,
        Reranker(RerankOptions(model=str(build_reranker(tmp_path / "rerank")), **options)) as there,
    ):
        query, texts = "what is it?", ["a text of some words " * 60] * 8
        scores, vectors = there.score(query, texts), embedder.embed(texts)
        encoder = embedder.load()._encoders[0]
        forward, lock = encoder._forward, lock_of(encoder.device)
        found: list[np.ndarray] = []

        def rerank(x, positions, layout, buffers, on_pause):
            encoder._forward = forward
            threading.Thread(target=lambda: found.append(there.score(query, texts))).start()
            wait_for(lambda: lock._waiting[True] > 0)
            out = forward(x, positions, layout, buffers, on_pause)
            wait_for(lambda: len(found) == 1)  # this step still holds the lock
            return out

        encoder._forward = rerank
        np.testing.assert_allclose(embedder.embed(texts), vectors, atol=1e-6)
        np.testing.assert_allclose(found, [scores], atol=1e-5)
