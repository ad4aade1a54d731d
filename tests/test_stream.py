"""Streams: what `embed` gives, a bounded way ahead of the caller, with nothing lost on the way."""

from __future__ import annotations

import asyncio
import gc
import io
import itertools
import threading
import time
import weakref
import zlib
from collections.abc import AsyncIterator, Iterable, Iterator
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from shared_engine import (
    ConfigurationError,
    Embedder,
    EmbeddingInput,
    EngineClosedError,
    InputTooLongError,
    InputTypeError,
    NonFiniteVectorError,
    Options,
    PartialResultError,
    Request,
    ServerError,
    track_usage,
)
from shared_engine.backend import Backend, Rows
from shared_engine.pipeline import EmbeddingPipeline
from shared_engine.stream import WINDOWS_AHEAD
from tests.support.faulty_nim import FaultyNim
from tests.support.nim import vectors

TEXTS = [f"document {i} " + "and so on " * (i % 5) for i in range(50)]
LONG = "long " * 200
WIDTH = 4


def expected(texts: Iterable[str]) -> np.ndarray:
    rows = [(len(text), zlib.crc32(text.encode()) % 997, 1, 2) for text in texts]
    out = np.array(rows, np.float32)
    return out / np.linalg.norm(out, axis=1, keepdims=True)


class FakeBackend(Backend):
    """Computes when told to, or at once; refuses LONG, and has no finite vector for "nan"."""

    modalities = frozenset({"text", "image", "text_image"})
    dimensions = (WIDTH,)
    description = fingerprint = "fake"

    def __init__(self, at_once: bool) -> None:
        self.at_once = at_once
        self.waiting: list[tuple[Request, Future[Rows]]] = []
        self.outages = 0
        """Requests that are going to fail."""
        self.seconds_to_submit = 0.0

    def submit(self, request: Request) -> Future[Rows]:
        time.sleep(self.seconds_to_submit)
        future: Future[Rows] = Future()
        self.waiting.append((request, future))
        if self.at_once:
            self.answer()
        return future

    def answer(self, which: int = 0) -> None:
        request, future = self.waiting.pop(which)
        if self.outages:
            self.outages -= 1
            future.set_exception(ServerError("the server fails", status=503))
            return
        out = 3 * expected(document.text or "" for document in request.documents)
        out[[document.text == "nan" for document in request.documents]] = np.inf
        request.on_usage(len(out))
        if request.on_progress:
            request.on_progress(len(out))
        errors = {
            row: InputTooLongError("has 200 tokens; the limit is 99")
            for row, document in enumerate(request.documents)
            if document.text == LONG
        }
        future.set_result(Rows(out, errors))


class Faked(Embedder):
    """An embedder with a fake where the model would be."""

    def __init__(self, at_once: bool = True, **options: Any) -> None:
        super().__init__(Options(**options))
        self.fake = FakeBackend(at_once)
        lease: Any = SimpleNamespace(acquire=lambda: self.fake)
        self._pipeline = EmbeddingPipeline(lease, self.options, self._used)


class Source(Iterator[str]):
    """Texts without end that can be counted, and whether they are still held."""

    class Text(str):
        __slots__ = ("__weakref__",)

    def __init__(self, count: int) -> None:
        self.texts = iter(range(count))
        self.read = 0
        self.held: weakref.WeakSet[Source.Text] = weakref.WeakSet()

    def __next__(self) -> str:
        text = self.Text(f"text {next(self.texts)}")
        self.read += 1
        self.held.add(text)
        return text


def answer_the_first(embedder: Faked) -> threading.Thread:
    """Answer one batch as soon as all that may be in flight are."""

    def answer() -> None:
        while len(embedder.fake.waiting) < WINDOWS_AHEAD:
            time.sleep(0.001)
        embedder.fake.answer()

    thread = threading.Thread(target=answer)
    thread.start()
    return thread


async def slowly(texts: Iterable[str]) -> AsyncIterator[str]:
    for text in texts:
        await asyncio.sleep(0)
        yield text


def everything(stream: Iterator[Rows]) -> tuple[np.ndarray, dict[int, Exception]]:
    """Return all vectors of a stream, and its errors by position."""
    parts: list[np.ndarray] = []
    errors: dict[int, Exception] = {}
    for rows in stream:
        assert rows.offset == sum(map(len, parts))
        parts.append(rows.vectors)
        errors |= {rows.offset + row: error for row, error in rows.errors.items()}
    return np.concatenate(parts), dict(sorted(errors.items()))


# What comes out


@pytest.fixture
def embedder(checkpoint):
    with Embedder(Options(model=checkpoint, max_batch_tokens=128, max_tokens=120)) as made:
        yield made


@pytest.mark.parametrize("batch_size", [1, 7, 25, 1024])
@pytest.mark.parametrize("role", ["document", "query"])
def test_a_stream_gives_what_embed_does(embedder, role, batch_size):
    with track_usage() as used:
        at_once = embedder.embed(TEXTS, role)
    with track_usage() as streamed:
        parts = list(embedder.stream(iter(TEXTS), role, batch_size))
    assert [len(part) for part in parts[:-1]] == [batch_size] * (len(parts) - 1)
    assert 0 < len(parts[-1]) <= batch_size
    assert np.abs(np.concatenate(parts) - at_once).max() <= 1e-6
    assert streamed.tokens == used.tokens


async def test_the_async_twin_gives_it_too(embedder):
    at_once = await embedder.aembed(TEXTS)
    for source in (TEXTS, iter(TEXTS), slowly(TEXTS)):
        with track_usage() as used:
            parts = [part async for part in embedder.astream(source, batch_size=7)]
        assert [len(part) for part in parts] == [7] * 7 + [1]
        assert np.abs(np.concatenate(parts) - at_once).max() <= 1e-6
        assert used.tokens > len(TEXTS)


def test_a_stream_from_a_server_is_the_same():
    texts = [f"text {i}" for i in range(500)]
    with FaultyNim({"503": 0.1}) as nim:
        options = Options(model="nvidia/m", base_url=nim.url, max_batch_size=20)
        with Embedder(options) as embedder:
            out = np.concatenate(list(embedder.stream(iter(texts), batch_size=90)))
            assert np.abs(out - vectors(texts)).max() <= 1e-6
            assert embedder.usage == 2 * len(texts)


def test_nothing_in_nothing_out():
    assert list(Faked().stream([])) == []
    stream = Faked().stream(iter(()))
    assert next(stream, None) is None
    assert next(stream, None) is None


async def test_nothing_in_nothing_out_async():
    assert [part async for part in Faked().astream(slowly([]))] == []


def test_what_is_no_stream_is_refused_at_once():
    for wrong in ("text", EmbeddingInput("text")):
        with pytest.raises(InputTypeError, match="wrap it in a list"):
            Faked().stream(wrong)
        with pytest.raises(InputTypeError, match="wrap it in a list"):
            Faked().astream(wrong)
    with pytest.raises(ConfigurationError, match="batch_size=0: must be 1 or more"):
        Faked().stream([], batch_size=0)


def test_number_types_are_those_of_embed():
    (got,) = Faked(embedding_type="int8").stream(TEXTS)
    assert np.array_equal(got, Faked(embedding_type="int8").embed(TEXTS))


def test_one_progress_bar_counts_the_whole_stream(capfd):
    assert len(list(Faked(show_progress=True).stream(TEXTS, batch_size=10))) == 5
    lines = capfd.readouterr().err.strip().split("\n")
    assert len(lines) == 1
    assert "50doc" in lines[0].split("\r")[-1]


# How far ahead


def test_the_source_is_read_a_bounded_way_ahead():
    source = Source(1000)
    stream = Faked().stream(source, batch_size=10)
    assert source.read == 0
    for handed_out in range(50):
        next(stream)
        assert source.read <= 10 * (handed_out + WINDOWS_AHEAD)
    assert source.read >= 510  # but ahead it is


def test_the_device_has_work_while_the_caller_is_busy():
    embedder = Faked(at_once=False)
    stream = embedder.stream(TEXTS, batch_size=10)
    answering = answer_the_first(embedder)
    assert np.abs(next(stream) - expected(TEXTS[:10])).max() <= 1e-6
    assert len(embedder.fake.waiting) == WINDOWS_AHEAD - 1
    answering.join()


def test_memory_is_flat_over_20_000_documents():
    source, most = Source(20_000), 0
    for part in Faked().stream(source, batch_size=1000):
        assert part.shape == (1000, WIDTH)
        most = max(most, len(source.held))
    assert source.read == 20_000
    assert most <= 1000 * (WINDOWS_AHEAD + 1)


def test_the_batches_of_a_stream_share_one_flow_that_no_other_call_has(monkeypatch):
    embedder, requests = Faked(), []
    submit = embedder.fake.submit
    monkeypatch.setattr(
        embedder.fake, "submit", lambda request: requests.append(request) or submit(request)
    )
    for _ in range(2):
        assert len(list(embedder.stream(TEXTS, batch_size=25))) == 2
    embedder.embed(TEXTS)
    first, same, second, same_again, none = (request.flow for request in requests)
    assert first is same is not None
    assert second is same_again is not None
    assert first is not second
    assert none is None


def test_the_engine_keeps_nothing_of_a_batch_that_is_done(embedder):
    source, most = Source(3000), 0
    gc.collect()
    gc.disable()  # by reference counts alone
    try:
        for _ in embedder.stream(source, batch_size=100):
            most = max(most, len(source.held))
    finally:
        gc.enable()
    assert most <= 100 * (WINDOWS_AHEAD + 2)  # the last step may hold a batch that it served


async def test_the_event_loop_stays_free():
    embedder, gaps = Faked(), []
    embedder.fake.seconds_to_submit = 0.1

    def blocking() -> Iterator[str]:
        for text in TEXTS[:12]:
            time.sleep(0.01)
            yield text

    async def tick() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            gaps.append(time.perf_counter() - before)

    ticking = asyncio.create_task(tick())
    parts = [part async for part in embedder.astream(blocking(), batch_size=4)]
    ticking.cancel()
    assert np.abs(np.concatenate(parts) - expected(TEXTS[:12])).max() <= 1e-6
    assert len(gaps) > 25  # blocked, there would be a dozen in these 0.4 seconds


# Ending early


@pytest.mark.parametrize("how", ["close", "forget"])
def test_leaving_early_cancels_what_has_not_started(how):
    embedder, source = Faked(at_once=False), Source(1000)
    stream = embedder.stream(source, batch_size=10)
    answering = answer_the_first(embedder)
    for _ in stream:
        break
    answering.join()
    futures = [future for _, future in embedder.fake.waiting]
    assert len(futures) == WINDOWS_AHEAD - 1
    if how == "close":
        stream.close()
        assert next(stream, None) is None
        assert source.read == 10 * WINDOWS_AHEAD
    else:
        del stream
    assert all(future.cancelled() for future in futures)


async def test_cancelling_cancels_what_has_not_started():
    embedder, source = Faked(at_once=False), Source(1000)
    stream = embedder.astream(source, batch_size=10)
    waiting = asyncio.ensure_future(anext(stream))
    while len(embedder.fake.waiting) < WINDOWS_AHEAD:  # noqa: ASYNC110 - threads fill it
        await asyncio.sleep(0.001)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert all(future.cancelled() for _, future in embedder.fake.waiting)
    assert [part async for part in stream] == []


def test_closing_the_embedder_lets_the_stream_have_what_was_accepted(checkpoint):
    embedder = Embedder(Options(model=checkpoint, max_batch_tokens=128, max_tokens=119))
    stream = embedder.stream(iter(TEXTS * 10), batch_size=50)
    parts = [next(stream)]
    embedder.close()
    with pytest.raises(EngineClosedError):
        parts.extend(stream)
    assert len(parts) >= WINDOWS_AHEAD


# Errors


def test_refused_documents_are_named_by_position_and_the_others_kept(embedder):
    texts: list[Any] = list(TEXTS)
    for position in (13, 14, 33):
        texts[position] = LONG
    texts[28] = None
    got, errors = everything(embedder.stream(iter(texts), batch_size=10, errors="return"))
    assert got.shape == (50, 64)
    assert list(errors) == [13, 14, 28, 33]
    assert [type(errors[i]).__name__ for i in (13, 28)] == ["InputTooLongError", "InputTypeError"]
    for position, error in errors.items():
        assert error.index == position
        assert f"input {position} " in str(error)
        assert np.isnan(got[position]).all()
    good = [i for i in range(50) if i not in errors]
    assert np.abs(got[good] - embedder.embed([TEXTS[i] for i in good])).max() <= 1e-6


def test_a_failed_row_raises_with_its_batch_and_ends_the_stream():
    stream = Faked().stream([*TEXTS[:25], LONG, *TEXTS[25:]], batch_size=10)
    with pytest.raises(PartialResultError) as failed:
        for _ in stream:
            pass
    assert str(failed.value).startswith("1 of 10 inputs failed, the first: input 25 has 200 tokens")
    assert (failed.value.offset, list(failed.value.errors)) == (20, [25])
    assert np.abs(failed.value.vectors[:5] - expected(TEXTS[20:25])).max() <= 1e-6
    assert list(stream) == []


def test_an_unknown_way_to_treat_errors_is_refused():
    with pytest.raises(ConfigurationError, match=r"errors='ignore': expected \"raise\" or"):
        Faked().stream(TEXTS, errors="ignore")


@pytest.mark.parametrize(("kind", "failed"), [("float", np.nan), ("int8", 0), ("ubinary", 0)])
def test_rows_have_the_number_type_that_was_chosen(kind, failed):
    (rows,) = Faked(embedding_type=kind).stream([*TEXTS[:3], LONG], errors="return")
    good = Faked(embedding_type=kind).embed(TEXTS[:3])
    assert rows.vectors.dtype == good.dtype
    assert np.array_equal(rows.vectors[:3], good)
    assert np.array_equal(rows.vectors[3], np.full(good.shape[1], failed, good.dtype), True)


def test_what_fails_later_is_named_by_position_too():
    for batch_size in (1, 10):
        texts = [*TEXTS[:12], "nan", LONG, *TEXTS[12:]]
        got, errors = everything(Faked().stream(texts, batch_size=batch_size, errors="return"))
        assert {i: type(error) for i, error in errors.items()} == {
            12: NonFiniteVectorError,
            13: InputTooLongError,
        }
        assert "input 12 has a vector with NaN" in str(errors[12])
        assert np.abs(np.delete(got, [12, 13], 0) - expected(TEXTS)).max() <= 1e-6


def test_a_batch_of_nothing_but_refused_documents_keeps_its_place():
    got, errors = everything(Faked().stream([LONG] * 4 + TEXTS, batch_size=4, errors="return"))
    assert got.shape == (54, WIDTH)
    assert list(errors) == [0, 1, 2, 3]


def test_open_files_are_read_when_their_batch_is_submitted():
    embedder = Faked()
    texts = [EmbeddingInput("a picture", io.BytesIO(b"bytes")), "text", LONG]
    submitted: list[EmbeddingInput] = []
    submit = embedder.fake.submit
    embedder.fake.submit = lambda request: submitted.extend(request.documents) or submit(request)
    list(embedder.stream(texts, batch_size=3, errors="return"))
    assert submitted == [
        EmbeddingInput("a picture", b"bytes"),
        EmbeddingInput("text"),
        EmbeddingInput(LONG),
    ]


@pytest.mark.parametrize("errors", ["raise", "return"])
def test_the_error_of_a_whole_batch_comes_in_its_place_and_ends_the_stream(errors):
    embedder = Faked()
    stream = embedder.stream(iter(TEXTS), batch_size=10, errors=errors)
    next(stream)
    embedder.fake.outages = 1  # of the first batch that is not read yet
    parts = [next(stream), next(stream)]
    assert len(parts) == WINDOWS_AHEAD - 1
    with pytest.raises(ServerError):
        next(stream)
    assert list(stream) == []


def test_an_error_of_the_source_comes_after_what_it_gave():
    def source() -> Iterator[str]:
        yield from TEXTS[:25]
        raise OSError("the disk is gone")

    stream, parts = Faked().stream(source(), batch_size=10), []
    with pytest.raises(OSError, match="the disk is gone"):
        parts.extend(stream)
    assert np.abs(np.concatenate(parts) - expected(TEXTS[:25])).max() <= 1e-6
    assert list(stream) == []


async def test_an_error_of_an_async_source_does_too():
    async def source() -> AsyncIterator[str]:
        for text in TEXTS[:25]:
            yield text
        raise OSError("the disk is gone")

    stream = Faked().astream(source(), batch_size=10)
    parts = [await anext(stream) for _ in range(3)]
    with pytest.raises(OSError, match="the disk is gone"):
        await anext(stream)
    assert np.abs(np.concatenate(parts) - expected(TEXTS[:25])).max() <= 1e-6


async def test_an_async_stream_raises_or_returns_errors_too():
    texts = [*TEXTS[:5], LONG, *TEXTS[5:]]
    stream = Faked().astream(slowly(texts), batch_size=10)
    with pytest.raises(PartialResultError) as failed:
        await anext(stream)
    assert list(failed.value.errors) == [5]
    assert [part async for part in stream] == []
    rows = [rows async for rows in Faked().astream(slowly(texts), batch_size=10, errors="return")]
    assert [list(each.errors) for each in rows] == [[5], [], [], [], [], []]
    vectors = np.concatenate([each.vectors for each in rows])
    assert np.abs(np.delete(vectors, 5, 0) - expected(TEXTS)).max() <= 1e-6


def test_a_twin_of_the_source_goes_with_the_vectors():
    """As the docstring of `Embedder.stream` has it."""
    texts, twin = itertools.tee(iter(TEXTS))
    for part in Faked().stream(texts, batch_size=8):
        assert np.abs(part - expected(itertools.islice(twin, len(part)))).max() <= 1e-6
