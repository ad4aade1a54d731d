"""A graph replays over addresses: nothing that it reads or writes may be freed before it.

Here an emulator replays on a CPU; that a GPU does the same is for test_gpu.py to show.
"""

from __future__ import annotations

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from shared_engine.local import graphs, llama, memory
from shared_engine.local.checkpoint import resolve
from shared_engine.local.device import select_devices
from shared_engine.local.llama import Encoder
from shared_engine.options import Options
from tests.support import graph_emulator

CUDA = torch.device("cuda", 0)


@pytest.fixture
def load(checkpoint: Path, monkeypatch) -> Callable[[], Encoder]:
    """Load an encoder with emulated graphs, which were not replayed yet."""
    attend = graph_emulator.attend_by_mask
    monkeypatch.setattr(llama, "varlen", attend)
    monkeypatch.setattr(llama, "check_graphs", lambda *_: None)
    monkeypatch.setattr(graphs, "_make_recorder", lambda _: graph_emulator.record)
    found = resolve(Options(model=checkpoint))
    (placement,) = select_devices("cpu", "float32", None, found.config)
    placement = replace(placement, kernel=attend)

    def load() -> Encoder:
        encoder = Encoder(found, placement)
        encoder._graphs, why = encoder._record_graphs(placement)
        assert encoder._graphs is not None, why
        return encoder

    return load


@pytest.fixture
def encoder(load) -> Encoder:
    return load()


def find_lost(encoder: Encoder) -> dict[int, list[graph_emulator.Address]]:
    buckets = encoder._graphs._buckets.items()
    return {size: bucket.replay.__self__.lost() for size, bucket in buckets}


def test_a_graph_loses_no_memory(encoder):
    assert find_lost(encoder) == {size: [] for size in graphs.SIZES}


def test_replays_between_other_steps_give_the_same_means(encoder):
    assert not any(find_lost(encoder).values())  # else a replay may end this process
    random = np.random.default_rng(0)

    def draw(lengths: Any) -> list[np.ndarray]:
        return [random.integers(5, 300, n).astype(np.int32) for n in lengths]

    with torch.inference_mode():
        graphs.check_graphs(encoder._graphs, encoder._compute, 300, len(encoder._cos))
        for _ in range(20):
            for lengths in ([7], [20, 8], [60], [100, 20, 8]):
                sequences = draw(lengths)
                encoder._compute(draw(random.integers(1, 60, 30)))
                replayed = encoder._graphs(sequences).clone()
                expected = encoder._compute(sequences)
                assert torch.cosine_similarity(replayed, expected).min() >= 0.999999


@pytest.fixture
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collector")
def test_an_encoder_is_freed_with_its_last_reference(load):
    """Its worker returns a GPU's memory to the system then, and waits for no garbage collector."""
    encoder = load()
    alive = weakref.ref(encoder)
    del encoder
    assert alive() is None


def test_the_emulator_finds_freed_memory():
    def make(kept: torch.Tensor) -> Callable[[], None]:
        freed = torch.ones(3)
        return graph_emulator.record(lambda: kept.add_(freed * 2))

    kept = torch.ones(3)
    replay: Any = make(kept)
    assert [str(x) for x in replay.__self__.lost()] == ["(3,) torch.float32"]


def test_the_emulator_replays_over_the_present_contents():
    x, out = torch.ones(3), torch.zeros(3)
    replay = graph_emulator.record(lambda: torch.add(x * 2, 1, out=out))
    x.fill_(5)
    replay()
    assert out.tolist() == [11.0] * 3


def test_the_buckets_of_a_model_share_a_stream_that_no_other_model_has(monkeypatch):
    """cuBLAS has a workspace for each stream, and a pool of memory is shared by one stream only."""
    streams: list[Any] = []

    def make_stream(device: torch.device) -> Any:
        assert device == CUDA
        streams.append(object())
        return streams[-1]

    monkeypatch.setattr(torch.cuda, "Stream", make_stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    recorded: list[tuple[Any, Any]] = []

    def capture(device: torch.device, stream: Any, pool: Any, step: Callable[[], None]) -> Any:
        assert device == CUDA
        recorded.append((stream, pool))
        return step

    monkeypatch.setattr(graphs, "_capture", capture)
    for _ in range(2):
        record = graphs._make_recorder(CUDA)
        for _ in range(4):
            record(lambda: None)
    assert [streams.index(stream) for stream, _ in recorded] == [0] * 4 + [1] * 4
    assert len({id(pool) for _, pool in recorded}) == 2


class FakeCuda:
    """The parts of torch.cuda that record a graph, which the emulator does not have."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stream, self.is_recording = "default", False
        self.overlapped = False
        names = {"device": lambda _: nullcontext(), "current_stream": lambda _: self.stream}
        names |= {"stream": self.use, "CUDAGraph": mock.Mock, "graph": self.record}
        for name, value in {**names, "empty_cache": self.empty_cache}.items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextmanager
    def use(self, stream: Any) -> Iterator[None]:
        before, self.stream = self.stream, stream
        try:
            yield
        finally:
            self.stream = before

    @contextmanager
    def record(self, *_: Any, stream: Any, **__: Any) -> Iterator[None]:
        """As torch's, which keeps its stream after an error."""
        self.overlapped |= self.is_recording
        self.stream, self.is_recording = stream, True
        time.sleep(0.01)
        yield
        self.stream, self.is_recording = stream, False

    def empty_cache(self) -> None:
        self.overlapped |= self.is_recording


@pytest.fixture
def cuda(monkeypatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_a_thread_uses_its_own_stream_after_a_recording_that_fails(cuda):
    def step() -> None:
        if cuda.is_recording:
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(RuntimeError, match="capturing"):
        graphs._capture(CUDA, mock.Mock(), None, step)
    assert cuda.stream == "default"
    assert not memory.recording.locked()


def test_only_recordings_run_on_the_stream_of_the_graphs(cuda):
    """Then the cuBLAS workspace of the stream lies in their pool, and lives as long as they do."""
    streams: list[Any] = []
    for _ in range(2):
        graphs._capture(CUDA, "graphs", None, lambda: streams.append(cuda.stream))
    assert streams == ["default", "graphs"] * 2


def test_no_other_recording_and_no_release_of_memory_happens_during_one(cuda, monkeypatch):
    """Both make a recording fail: torch waits for the device there, which must not record then."""
    monkeypatch.setattr(cuda, "use", lambda _: nullcontext())  # streams are of one thread
    tasks = [lambda: graphs._capture(CUDA, mock.Mock(), None, lambda: None)] * 3
    tasks += [memory.release_gpu_memory] * 3
    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(task) for task in tasks]:
            done.result()
    assert not cuda.overlapped
