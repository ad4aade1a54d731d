"""What a caller gets of the model in this process, whatever happens to a text, a step or a device.

`LocalBackend` is given its encoders by `load`, so that a test can stand in front of them.
"""

from __future__ import annotations

import threading
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from shared_engine import (
    ConfigurationError,
    DeviceMemoryError,
    EmbeddingInput,
    EngineClosedError,
    EngineError,
    InputTooLongError,
    Options,
    PartialResultError,
    Request,
)
from shared_engine.backend import Rows
from shared_engine.local.backend import LocalBackend
from shared_engine.local.llama import Encoder
from tests.support.rows import vectors_of
from tests.support.vl_checkpoints import build_vl_checkpoint

TEXTS = [f"text {i} " + "word " * (i * 37 % 25) for i in range(40)]
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


def request(texts: list[str], role: str = "document", **given: Any) -> Request:
    return Request([EmbeddingInput(text) for text in texts], role, **given)


@pytest.fixture
def open_backend(checkpoint: Path) -> Iterator[Callable[..., LocalBackend]]:
    opened: list[LocalBackend] = []

    def open_one(load: Callable[..., Any] = Encoder, **options: Any) -> LocalBackend:
        given = {"model": checkpoint, "device": "cpu", "dtype": "float32", **options}
        opened.append(LocalBackend(Options(**given), load))
        return opened[-1]

    yield open_one
    for backend in opened:
        backend.close(cancel=True)


@pytest.fixture
def expected(open_backend) -> np.ndarray:
    return vectors_of(open_backend().submit(request(TEXTS)))


@pytest.mark.parametrize("name", ["on_progress", "on_usage"])
def test_an_error_of_a_callback_is_logged_and_loses_no_vector(open_backend, expected, caplog, name):
    def fail(_: int) -> None:
        raise OSError("standard error is closed")

    backend = open_backend()
    for _ in range(2):
        vectors = vectors_of(backend.submit(request(TEXTS, **{name: fail})))
        assert np.abs(vectors - expected).max() <= 1e-5
    assert "standard error is closed" in caplog.text


class Faulty:
    """A real encoder behind a fault: it fails for steps of more tokens than it can hold."""

    def __init__(self, holds: int, error: Exception) -> None:
        self.holds, self.error = holds, error
        self.steps: list[int] = []
        self.device, self.runs_ahead = torch.device("cpu"), False

    def load(self, *given: Any) -> Faulty:
        self.encoder = Encoder(*given)
        self.description = self.encoder.description
        return self

    def __call__(self, sequences, tiles, *_):
        tokens = sum(len(ids) for ids in sequences)
        if tokens > self.holds:
            raise self.error
        self.steps.append(tokens)
        return self.encoder(sequences, tiles)


# Texts that are too long


@pytest.mark.parametrize("role", ["query", "document"])
def test_a_long_text_fails_alone(open_backend, role):
    backend = open_backend(max_tokens=50)
    texts = ["short"] * 300 + ["word " * 200, "short"]
    rows = backend.submit(request(texts, role)).result(60)
    ((row, too_long),) = rows.errors.items()
    assert isinstance(too_long, InputTooLongError)
    assert (row, too_long.limit) == (300, 50)
    assert too_long.tokens > 600
    vectors = rows.vectors
    assert np.isnan(vectors[300]).all()
    alone = vectors_of(backend.submit(request(["short"], role)))
    assert np.abs(np.delete(vectors, 300, axis=0) - alone).max() <= 1e-6
    with pytest.raises(InputTooLongError, match=r"^has 60"):
        vectors_of(backend.submit(request(["word " * 200], role)))
    for truncate in ("START", "END"):
        assert np.isfinite(
            vectors_of(backend.submit(request(texts, role, truncate=truncate)))
        ).all()


@pytest.mark.parametrize("role", ["query", "document"])
def test_a_tokenizer_that_fails_is_an_error_of_its_texts(open_backend, monkeypatch, role):
    backend = open_backend()
    monkeypatch.setattr(backend._tokenizer, "encode", lambda *_: 1 / 0)
    with pytest.raises(EngineError, match="the tokenizer failed: division by zero"):
        vectors_of(backend.submit(request(["a"], role)))


# Memory


@pytest.mark.parametrize(
    "error",
    [
        OUT_OF_MEMORY,
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(h)`"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: not enough memory: you"),
        RuntimeError("could not allocate memory"),
        RuntimeError("std::bad_alloc"),
        torch.AcceleratorError("CUDA error: out of memory"),  # of pinned memory
    ],
    ids=lambda error: f"{type(error).__name__} {str(error)[:20]}",
)
def test_out_of_memory_halves_the_step_and_loses_nothing(open_backend, expected, error, caplog):
    faulty = Faulty(holds=100, error=error)
    backend = open_backend(faulty.load, max_batch_tokens=512)
    assert np.abs(vectors_of(backend.submit(request(TEXTS))) - expected).max() <= 1e-6
    assert max(faulty.steps) <= 100
    assert backend.step_stats.max_batch_tokens <= 100  # and it remembers
    assert "retrying its halves" in caplog.text


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OUT_OF_MEMORY, "free memory there, or use another device"),
        (
            torch.AcceleratorError("CUDA error: no kernel image is available\nmore"),
            "install a torch",
        ),
    ],
)
def test_a_model_that_a_device_cannot_take_is_named(open_backend, error, said):
    def load(*_: Any) -> Encoder:
        weights = torch.empty(1)
        loaded.append(weakref.ref(weights))
        raise error

    loaded: list[weakref.ref] = []
    with pytest.raises(ConfigurationError, match=said) as raised:
        open_backend(load)
    assert f"device='cpu': {str(error).splitlines()[0]}; " in str(raised.value)
    assert loaded[0]() is None


def test_a_failed_device_refuses_new_requests(open_backend, expected, monkeypatch):
    """After an illegal access every call of CUDA fails; an error of one kernel passes."""
    faulty = Faulty(holds=10**6, error=torch.AcceleratorError("CUDA error: an illegal access\n..."))
    backend = open_backend(faulty.load)
    assert backend.failure is None
    synchronize = mock.Mock()
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    faulty.holds = 0
    with pytest.raises(EngineError, match="the forward pass failed: CUDA error: an illegal"):
        vectors_of(backend.submit(request(TEXTS[:1])))
    assert backend.failure is None
    faulty.holds = 10**6
    assert np.abs(vectors_of(backend.submit(request(TEXTS))) - expected).max() <= 1e-6
    faulty.holds, synchronize.side_effect = 0, faulty.error
    with pytest.raises(EngineError, match="the forward pass failed"):
        vectors_of(backend.submit(request(TEXTS[:1])))
    assert backend.failure is faulty.error
    faulty.holds = 10**6
    for role in ("query", "document"):
        with pytest.raises(EngineError, match=r"illegal access\).* restart the process$") as raised:
            backend.submit(request(TEXTS[:1], role))
        assert raised.value.__cause__ is faulty.error


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_ends_by_an_error_leaves_nobody_waiting(open_backend):
    """As by an encoder with vectors of a wrong size, or a version of torch that lacks something."""

    class Misshapen(Faulty):
        def __call__(self, sequences, tiles, *_):
            return types.SimpleNamespace(numpy=lambda: np.zeros((len(sequences), 3)))

    backend = open_backend(Misshapen(holds=0, error=OUT_OF_MEMORY).load)
    with pytest.raises(CancelledError):
        backend.submit(request(TEXTS)).result(60)
    with pytest.raises(EngineError, match=r"the engine failed \(shape mismatch") as raised:
        backend.submit(request(TEXTS))
    assert raised.value.__cause__ is backend.failure


def test_memory_is_released_when_the_last_backend_closes(open_backend, monkeypatch):
    """The weights are gone before torch is asked to give back what is free."""
    left: list[Any] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: left.append(alive()))
    faulty = Faulty(holds=10**6, error=OUT_OF_MEMORY)

    def load(*given: Any) -> Faulty:
        made = faulty.load(*given)
        made.device = types.SimpleNamespace(type="cuda")
        return made

    backend = open_backend(load)
    vectors_of(backend.submit(request(TEXTS)))
    alive, faulty = weakref.ref(faulty), None
    assert alive() is not None
    backend.close()
    assert left == [None]


def test_two_devices_that_run_out_of_memory_agree_on_the_smaller_step(open_backend):
    """The second fails at a step that it took before the first had shrunk it.

    Devices of two numbers, as steps on one device are computed one after the other.
    """
    both_have_one, has_shrunk = threading.Barrier(2), threading.Event()
    numbers = iter(range(2))

    class Device(Faulty):
        def __call__(self, sequences, tiles, *_):
            tokens = sum(len(ids) for ids in sequences)
            if tokens > 300:
                both_have_one.wait(10)
                if not self.holds:
                    assert has_shrunk.wait(10)
                raise OUT_OF_MEMORY
            if self.holds and tokens > self.holds:
                raise OUT_OF_MEMORY
            self.steps += [tokens] * len(sequences)
            if self.holds and len(self.steps) == 26:  # all of its step
                has_shrunk.set()
            return self.encoder(sequences, tiles)

    def load(*given: Any) -> Faulty:
        number = next(numbers)
        made = Device(holds=30 * number, error=OUT_OF_MEMORY).load(*given)
        made.device = torch.device("cpu", number)
        return made

    backend = open_backend(load, device="cpu,cpu", max_batch_tokens=512)
    vectors = vectors_of(backend.submit(request(["fifteen tokens in this one text"] * 52)))
    assert np.abs(vectors - vectors[0]).max() <= 1e-6
    assert backend.step_stats.steps == 2
    assert backend.step_stats.max_batch_tokens < 100  # and not half of the second's, 247


def test_a_text_that_does_not_fit_alone_is_named_and_the_others_kept(open_backend, expected):
    backend = open_backend(Faulty(holds=100, error=OUT_OF_MEMORY).load, max_batch_tokens=512)
    texts = [*TEXTS[:20], "much too long " * 50, *TEXTS[20:]]
    with pytest.raises(PartialResultError, match="1 of 41 inputs failed") as failed:
        vectors_of(backend.submit(request(texts)))
    (index,) = failed.value.errors
    assert index == 20
    assert isinstance(failed.value.errors[index], DeviceMemoryError)
    assert np.abs(np.delete(failed.value.vectors, 20, axis=0) - expected).max() <= 1e-6


def test_a_short_lack_of_memory_has_no_lasting_effect(open_backend, expected):
    """No row fails, not even that of a lone sequence, and the step is what it was."""

    class Short(Faulty):
        def __call__(self, sequences, tiles, *_):
            if self.holds and sum(len(ids) for ids in sequences) > 60:
                self.holds -= 1
                raise self.error
            return self.encoder(sequences, tiles)

    short = Short(holds=4, error=OUT_OF_MEMORY)
    backend = open_backend(short.load, max_batch_tokens=512)
    assert np.abs(vectors_of(backend.submit(request(TEXTS))) - expected).max() <= 1e-6
    assert not short.holds
    assert backend.step_stats.max_batch_tokens < 512
    for _ in range(20):
        vectors_of(backend.submit(request(TEXTS * 5)))
    assert backend.step_stats.max_batch_tokens == 512


@pytest.mark.parametrize("times", [1, 2])
def test_a_lone_sequence_is_tried_once_more(open_backend, times):
    class Short(Faulty):
        def __call__(self, sequences, tiles, *_):
            self.holds -= 1
            if self.holds >= 0:
                raise self.error
            return self.encoder(sequences, tiles)

    backend = open_backend(Short(holds=times, error=OUT_OF_MEMORY).load)
    future = backend.submit(request(["alone"]))
    if times == 1:
        assert np.isfinite(vectors_of(future)).all()
        assert backend.step_stats.max_batch_tokens == 2048  # it was not the step that was too large
    else:
        with pytest.raises(DeviceMemoryError, match=r"^does not fit"):
            vectors_of(future)


def test_a_failed_step_fails_its_rows_only(open_backend):
    faulty = Faulty(holds=100, error=RuntimeError("cublas has a bad day"))
    backend = open_backend(faulty.load, max_batch_tokens=64)
    with pytest.raises(PartialResultError) as failed:
        vectors_of(backend.submit(request(["fine", "much too long " * 50, "fine too"])))
    assert list(failed.value.errors) == [1]
    assert isinstance(failed.value.errors[1], EngineError)
    assert "bad day" in str(failed.value.errors[1].__cause__)
    assert vectors_of(backend.submit(request(["next"]))).shape == (1, 64)


# A device that runs ahead of its thread


class Ahead:
    """An encoder as a GPU's: its steps go on after it has returned."""

    runs_ahead = True
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.running = self.most = self.steps = 0
        self.error: Exception | None = None

    def load(self, *given: Any) -> Ahead:
        self.encoder = Encoder(*given)
        self.description = self.encoder.description
        return self

    def __call__(self, sequences, tiles):
        if self.steps == 3:
            self.steps += 1
            raise OUT_OF_MEMORY
        self.steps += 1
        self.running += 1
        self.most = max(self.most, self.running)
        return Later(self, sequences, tiles)


class Later:
    """What such a step will give."""

    def __init__(self, ahead: Ahead, *step: Any) -> None:
        self.ahead, self.step = ahead, step

    def numpy(self) -> np.ndarray:
        self.ahead.running -= 1
        if self.ahead.error:
            raise self.ahead.error
        return self.ahead.encoder(*self.step).numpy()


def test_a_gpu_has_its_next_step_before_the_last_is_collected(open_backend):
    texts = [f"text {i} " + "word " * (i * 37 % 60) for i in range(200)]
    expected = vectors_of(open_backend().submit(request(texts)))
    ahead = Ahead()
    backend = open_backend(ahead.load, max_batch_tokens=200)
    assert np.abs(vectors_of(backend.submit(request(texts))) - expected).max() <= 1e-6
    assert (ahead.most, ahead.running) == (3, 0)  # of a step and the halves of another
    ahead.error = RuntimeError("an illegal memory access was encountered")
    with pytest.raises(EngineError, match="illegal memory access"):  # found out too late
        vectors_of(backend.submit(request(texts[:1])))
    ahead.error = None
    got = vectors_of(backend.submit(request(texts[:1])))
    assert np.abs(got - expected[:1]).max() <= 1e-6


# Searches during an ingest, where a device takes long for a step


class Paused(Faulty):
    """An encoder that is searched in every pause of a step of documents."""

    query = request(["a search"], "query")
    is_paused = False

    def open(self, open_backend: Callable[..., LocalBackend], **options: Any) -> LocalBackend:
        self.answers: list[Future[Rows]] = []
        self.is_answered: list[bool] = []
        self.backend = open_backend(self.load, **options)
        return self.backend

    def __call__(self, sequences, tiles, on_pause=None):
        if self.is_paused:  # a search
            return super().__call__(sequences, tiles)

        def search_then_pause() -> None:
            answer = self.backend.submit(self.query)
            self.is_paused = True
            on_pause()
            self.is_paused = False
            self.answers.append(answer)
            self.is_answered.append(answer.done())

        return self.encoder(sequences, tiles, search_then_pause)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_query_runs_within_a_step_of_documents_and_changes_none(open_backend, dtype):
    paused = Paused(10**6, OUT_OF_MEMORY)
    paused.query = request(["a search that is longer than all documents " * 40], "query")
    backend = paused.open(open_backend, dtype=dtype)
    found = vectors_of(backend.submit(request(TEXTS[:10])))
    assert paused.is_answered == [True] * 6  # two in each of three layers
    alone = open_backend(dtype=dtype)
    assert np.array_equal(found, vectors_of(alone.submit(request(TEXTS[:10]))))
    expected = vectors_of(alone.submit(paused.query))
    assert all(np.array_equal(vectors_of(answer), expected) for answer in paused.answers)


@pytest.mark.parametrize("role", ["query", "document"])
def test_a_step_ends_in_its_next_pause_when_nobody_waits_for_it(open_backend, role):
    class Cancelled(Paused):
        pauses = 0
        is_submitted = threading.Event()

        def __call__(self, sequences, tiles, on_pause):
            def cancel_then_pause() -> None:
                self.pauses += 1
                assert self.is_submitted.wait(10)
                self.future.cancel()
                on_pause()

            return self.encoder(sequences, tiles, cancel_then_pause)

    cancelled = Cancelled(10**6, OUT_OF_MEMORY)
    backend = open_backend(cancelled.load)
    cancelled.future = backend.submit(request(["word " * 500], role))
    cancelled.is_submitted.set()
    backend.close()
    assert cancelled.future.cancelled()
    assert cancelled.pauses == 1


def test_a_query_runs_while_an_image_is_computed(tmp_path, open_backend):
    folder = build_vl_checkpoint(tmp_path / "vl")
    page = Request([EmbeddingInput(image=Image.new("RGB", (80, 80), "navy"))], "document")
    paused = Paused(10**6, OUT_OF_MEMORY)
    found = vectors_of(paused.open(open_backend, model=folder).submit(page))
    # Two in each of three layers of the tower, and of the three after it.
    assert paused.is_answered == [True] * 12
    alone = open_backend(model=folder)
    assert np.array_equal(found, vectors_of(alone.submit(page)))
    expected = vectors_of(alone.submit(paused.query))
    assert all(np.array_equal(vectors_of(answer), expected) for answer in paused.answers)


def test_a_query_that_fails_in_a_pause_fails_alone(open_backend, expected):
    paused = Paused(0, RuntimeError("cublas has a bad day"))
    backend = paused.open(open_backend)
    assert np.abs(vectors_of(backend.submit(request(TEXTS))) - expected).max() <= 1e-6
    assert paused.answers
    for answer in paused.answers:
        with pytest.raises(EngineError, match="bad day"):
            vectors_of(answer)


def test_a_query_in_a_pause_survives_an_out_of_memory_of_the_step(open_backend, expected):
    class Short(Paused):
        def __call__(self, sequences, tiles, on_pause=None):
            pooled = super().__call__(sequences, tiles, on_pause)
            if on_pause is not None and len(sequences) > 10:
                raise self.error
            return pooled

    paused = Short(10**6, OUT_OF_MEMORY)
    backend = paused.open(open_backend)
    assert np.abs(vectors_of(backend.submit(request(TEXTS))) - expected).max() <= 1e-6
    answers = [vectors_of(answer) for answer in paused.answers]
    assert len(answers) > 4
    assert all(np.array_equal(answer, answers[0]) for answer in answers)


# Ends


def test_closing_again_only_joins(open_backend):
    gate = threading.Event()

    class Waiting(Faulty):
        def __call__(self, sequences, tiles, *_):
            assert gate.wait(10)
            return super().__call__(sequences, tiles)

    backend = open_backend(Waiting(10**6, OUT_OF_MEMORY).load)
    done: Future[Rows] = backend.submit(request(TEXTS))
    backend.close(wait=False)
    with ThreadPoolExecutor(2) as pool:
        closing = [pool.submit(backend.close, wait=True) for _ in range(2)]
        assert not any(each.done() for each in closing)
        gate.set()
        for each in closing:
            each.result(10)
    assert done.done()
    assert np.isfinite(done.result().vectors).all()
    with pytest.raises(EngineClosedError):
        backend.submit(request(["late"]))


def test_threads_have_descriptive_names(open_backend):
    open_backend(device="cpu,cpu")
    names = {thread.name for thread in threading.enumerate()}
    assert {
        "nemoretriever-compute-0",
        "nemoretriever-compute-1",
        "nemoretriever-prepare-0",
    } <= names
