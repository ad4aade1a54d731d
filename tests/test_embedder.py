"""The engine as its users meet it: inputs, threads, event loops, forks, failures, closing."""

from __future__ import annotations

import asyncio
import concurrent.futures
import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared_engine import (
    ConfigurationError,
    Embedder,
    EmbeddingInput,
    EngineClosedError,
    InputTooLongError,
    InputTypeError,
    Options,
    PartialResultError,
    UnsupportedModalityError,
    errors,
)
from shared_engine import registry as engines
from shared_engine.pipeline import EmbeddingPipeline
from tests.support.servers import NAME, running

TEXTS = [f"document {i} " + "and so on " * (i % 7) for i in range(40)]


@pytest.fixture
def embedder(checkpoint):
    with Embedder(Options(model=checkpoint, max_batch_tokens=128)) as made:
        yield made


@pytest.fixture
def expected(embedder):
    return embedder.embed(TEXTS)


# Inputs


def test_nothing_in_nothing_out(embedder):
    for role in ("query", "document"):
        assert embedder.embed([], role).shape == (0, 64)


def test_blank_texts_are_embedded_like_any_other(embedder):
    vectors = embedder.embed(["", " ", "\n\n", "text", ""])
    assert vectors.shape == (5, 64)
    assert np.abs(vectors[0] - vectors[4]).max() <= 1e-6
    assert np.abs(vectors[0] - vectors[3]).max() > 0.01


@pytest.mark.parametrize("bad", [None, 3, b"bytes", ["nested"], EmbeddingInput()])
def test_what_is_no_document_is_named_by_index(embedder, bad):
    with pytest.raises(InputTypeError, match="input 2") as failed:
        embedder.embed(["a", "b", bad, "d"])
    assert failed.value.index == 2
    assert isinstance(failed.value, TypeError)
    assert isinstance(failed.value, ValueError)


def test_a_bare_string_is_not_taken_for_a_list_of_characters(embedder):
    with pytest.raises(InputTypeError, match="wrap it in a list"):
        embedder.embed("hello")


async def test_another_role_is_refused(embedder):
    reason = """role='passage': expected "query" or "document"$"""  # the word of a NIM
    with pytest.raises(ConfigurationError, match=reason):
        embedder.embed(["a"], role="passage")
    with pytest.raises(ConfigurationError, match=reason):
        await embedder.aembed([], role="passage")
    with pytest.raises(ConfigurationError, match=reason):
        next(embedder.stream(["a"], role="passage", errors="return"))


def test_a_lone_surrogate_is_named_with_its_place(embedder):
    with pytest.raises(InputTypeError, match=r"input 1 holds a lone surrogate \(U\+D800\).* 3"):
        embedder.embed(["fine", "abc\ud800def"])


def test_an_image_is_refused_by_a_text_model(embedder):
    for document in (EmbeddingInput(image="a.png"), EmbeddingInput(text="a", image="a.png")):
        with pytest.raises(UnsupportedModalityError, match="input 1 is of modality"):
            embedder.embed(["text", document])


def test_a_generator_and_documents_are_taken(embedder, expected):
    vectors = embedder.embed(
        EmbeddingInput(text) if i % 2 else text for i, text in enumerate(TEXTS)
    )
    assert np.abs(vectors - expected).max() <= 1e-6


@pytest.mark.parametrize("role", ["query", "document"])
def test_a_long_text_fails_alone_here_as_at_a_nim(checkpoint, role):
    options = Options(model=str(checkpoint), max_tokens=50)
    texts = ["short"] * 300 + ["word " * 200, "short"]
    with running(options) as server, Embedder(options) as here:
        good = here.embed(["short"], role)
        with Embedder(Options(model=NAME, base_url=server.url)) as there:
            for embedder in (here, there):
                with pytest.raises(PartialResultError, match="input 300 ") as partial:
                    embedder.embed(texts, role)
                with pytest.raises(InputTooLongError, match="input 0 ") as alone:
                    embedder.embed(texts[300:301], role)
                ((row, error),) = partial.value.errors.items()
                assert (row, type(error), error.index) == (300, InputTooLongError, 300)
                assert (error.tokens, error.limit) == (alone.value.tokens, alone.value.limit)
                assert (error.tokens > 600, error.limit) == (True, 50)
                others = np.delete(partial.value.vectors, 300, 0)
                assert np.abs(others - good).max() <= 1e-6
                assert np.isnan(partial.value.vectors[300]).all()
    for truncate in ("START", "end"):
        options = Options(model=checkpoint, max_tokens=50, truncate=truncate)
        assert Embedder(options).embed(texts, role).shape == (302, 64)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.text(max_size=40), max_size=12))
def test_any_unicode_gives_as_many_finite_unit_vectors(embedder, texts):
    vectors = embedder.embed(texts)
    assert vectors.shape == (len(texts), 64)
    assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max(initial=0) <= 1e-5


def test_thousands_of_texts(tmp_path):
    """Many steps, and every row in its place: the texts repeat after a thousand."""
    from tests.support.checkpoints import SHAPES, build_checkpoint

    folder = build_checkpoint(tmp_path / "small", SHAPES["gqa"], num_hidden_layers=1)
    names = [f"t{i % 1000}" for i in range(5_000)]
    with Embedder(Options(model=folder)) as embedder:
        vectors = embedder.embed(names)
        assert vectors.shape == (5_000, 64)
        first = vectors[:1000]
        assert np.abs(vectors.reshape(5, 1000, 64) - first).max() <= 1e-6
        assert np.abs(first[:5] - embedder.embed(names[:5])).max() <= 1e-6


# Callers at once


async def test_async_gives_what_sync_does(embedder, expected):
    assert np.abs(await embedder.aembed(TEXTS) - expected).max() <= 1e-6
    singles = await asyncio.gather(*(embedder.aembed([text]) for text in TEXTS))
    assert np.abs(np.concatenate(singles) - expected).max() <= 1e-6


def test_several_event_loops(embedder, expected):
    for _ in range(3):
        assert np.abs(asyncio.run(embedder.aembed(TEXTS)) - expected).max() <= 1e-6
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for got in pool.map(lambda _: asyncio.run(embedder.aembed(TEXTS)), range(4)):
            assert np.abs(got - expected).max() <= 1e-6


def test_many_threads_each_get_their_own_rows(embedder, expected):
    def work(seed: int) -> float:
        order = np.random.default_rng(seed).permutation(len(TEXTS))
        got = embedder.embed([TEXTS[i] for i in order], "document")
        return float(np.abs(got - expected[order]).max())

    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        assert max(pool.map(work, range(48))) <= 1e-6


async def test_the_event_loop_stays_free(embedder):
    gaps, last = [], time.perf_counter()

    async def tick() -> None:
        nonlocal last
        while True:
            await asyncio.sleep(0.005)
            now = time.perf_counter()
            gaps.append(now - last)
            last = now

    ticking = asyncio.create_task(tick())
    await embedder._aembed_lists(TEXTS * 50)
    ticking.cancel()
    assert len(gaps) > 3  # it ran meanwhile; how smoothly is for a benchmark


def test_an_interrupted_call_cancels_its_work(embedder, monkeypatch):
    class Interrupted(concurrent.futures.Future):
        def result(self, timeout: float | None = None) -> None:
            raise KeyboardInterrupt

    work = Interrupted()
    monkeypatch.setattr(embedder.load(), "submit", lambda request: work)
    with pytest.raises(KeyboardInterrupt):
        embedder.embed(TEXTS)
    assert work.cancelled()


def test_a_call_that_is_cancelled_while_it_is_submitted_is_cancelled_though_its_loop_ended(
    embedder, monkeypatch
):
    begun, may_go_on = threading.Event(), threading.Event()
    submitted: list[concurrent.futures.Future] = []

    def slow(self, *args):
        begun.set()
        may_go_on.wait(10)
        submitted.append(concurrent.futures.Future())
        return submitted[-1]

    async def cancelled():
        call = asyncio.create_task(embedder.aembed(["a text"]))
        while not begun.is_set():  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(0.001)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    monkeypatch.setattr(EmbeddingPipeline, "submit", slow)
    asyncio.run(cancelled())
    may_go_on.set()
    until = time.monotonic() + 10
    while not (submitted and submitted[0].cancelled()):
        assert time.monotonic() < until
        time.sleep(0.001)


async def test_a_cancelled_caller_leaves_the_queue(embedder):
    bulk = asyncio.create_task(embedder.aembed(TEXTS * 500))
    scheduler = embedder.load()._scheduler
    while not scheduler._to_run[False]:  # noqa: ASYNC110 - other threads put it there
        await asyncio.sleep(0.01)
    bulk.cancel()
    with pytest.raises(asyncio.CancelledError):
        await bulk
    before = time.perf_counter()
    await embedder.aembed(["next"])
    assert time.perf_counter() - before < 20
    assert not scheduler._to_run[False]
    assert not scheduler._to_prepare


@pytest.mark.parametrize(
    "dtype", [pytest.param("auto", marks=pytest.mark.slow), "float32", "bfloat16"]
)
def test_a_fork_rebuilds_the_engine(checkpoint, dtype):
    """In a process of its own: pytest's threads make a fork here a warning."""
    program = f"""
import os, signal, numpy as np
from shared_engine import Embedder, Options
embedder = Embedder(Options(model={str(checkpoint)!r}, device="cpu", dtype={dtype!r}))
texts = ["some", "texts", "here"] * 50
before = embedder.embed(texts)
child = os.fork()
if child == 0:
    signal.alarm(100)  # its pipe would keep the test for ever
    after = embedder.embed(texts)
    os._exit(int(np.abs(before - after).max() > 1e-6))
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert np.abs(embedder.embed(texts) - before).max() <= 1e-6
print("ok")
"""
    done = run(program, OMP_NUM_THREADS="2")  # torch's own threads are lost in the child too
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


def test_a_stream_is_refused_in_a_fork_and_goes_on_in_its_parent(checkpoint):
    program = f"""
import os, signal, numpy as np
from shared_engine import Embedder, EngineClosedError, Options
embedder = Embedder(Options(model={str(checkpoint)!r}, device="cpu", max_batch_tokens=8))
texts = [f"text {{i}}" for i in range(60)]
stream = embedder.stream(texts, batch_size=4)
first = next(stream)
pending = list(stream._pending)
child = os.fork()
if child == 0:
    signal.alarm(100)  # a child that waits for ever would keep the test
    try:
        next(stream)
    except EngineClosedError as exc:
        was_cancelled = any(window.future.cancelled() for window in pending)
        os._exit(int("create a new one" not in str(exc) or was_cancelled))
    os._exit(2)
rest = np.concatenate([first, *stream])
assert np.abs(embedder.embed(texts) - rest).max() <= 1e-6
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
print("ok")
"""
    done = run(program)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr


# One engine


def test_equal_options_share_one_engine_and_the_last_to_go_closes_it(checkpoint):
    gc.collect()  # what other tests have left
    before = len(engines._engines)
    one = Embedder(Options(model=checkpoint, max_tokens=321))
    two = Embedder(Options(model=checkpoint, max_tokens=321, dimensions=16, truncate="END"))
    assert len(engines._engines) == before  # making one loads nothing
    assert one.load() is two.load()
    workers = one.load()._workers
    one.close()
    assert two.embed(["still here"]).shape == (1, 16)
    with pytest.raises(EngineClosedError):
        one.embed(["x"])
    del two
    gc.collect()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
    assert len(engines._engines) == before


def test_pickle_and_copies_are_the_options(embedder, expected):
    embedder.embed(["loaded"])
    for twin in (
        pickle.loads(pickle.dumps(embedder)),
        copy.copy(embedder),
        copy.deepcopy(embedder),
    ):
        assert twin.options == embedder.options
        assert np.array_equal(twin.embed(TEXTS[:3]), embedder.embed(TEXTS[:3]))


def test_errors_pickle_with_what_they_carry():
    for error in (
        errors.InputTooLongError("long", index=3, tokens=9, limit=8),
        errors.PartialResultError(
            "some", vectors=np.eye(2, dtype="f4"), errors={1: errors.EngineError("x")}
        ),
        errors.MissingExtraError("pip"),
    ):
        twin = pickle.loads(pickle.dumps(error))
        assert type(twin) is type(error)
        assert str(twin) == str(error)
        assert vars(twin).keys() == vars(error).keys()


def test_cache_keys_differ_where_vectors_do(checkpoint, tmp_path):
    from tests.support.checkpoints import build_checkpoint

    keys = [Embedder(Options(model=checkpoint)).cache_key(role) for role in ("query", "document")]
    keys += [
        Embedder(Options(model=checkpoint, **change)).cache_key("document")
        for change in ({"dimensions": 16}, {"truncate": "END"}, {"dtype": "bfloat16"})
    ]
    retrained = build_checkpoint(tmp_path / "retrained", seed=1)
    keys.append(Embedder(Options(model=retrained)).cache_key("document"))
    assert len(set(keys)) == len(keys)
    assert Embedder(Options(model=checkpoint)).cache_key("query") == keys[0]


def test_the_choice_is_logged_once_with_its_reason(checkpoint, caplog):
    caplog.set_level(logging.INFO, "shared_engine")
    embedder = Embedder(Options(model=checkpoint, max_tokens=123, device="cpu", dtype="float32"))
    for _ in range(3):
        embedder.embed(["x"])
    choice, message = [record.message for record in caplog.records]
    assert choice == "neither base_url= nor api_key= is given, so this process"
    assert message == embedder.description
    assert "on cpu, float32, 2048 tokens per step (device: requested; dtype: requested" in message


def test_the_progress_bar_counts_to_the_end(checkpoint, capfd):
    Embedder(Options(model=checkpoint, show_progress=True)).embed(TEXTS)
    assert "40/40" in capfd.readouterr().err
    Embedder(Options(model=checkpoint)).embed(TEXTS)
    assert capfd.readouterr().err == ""


# Closing


def test_close_drains(checkpoint):
    embedder = Embedder(Options(model=checkpoint, max_tokens=780))
    results: list[np.ndarray] = []
    caller = threading.Thread(target=lambda: results.append(embedder.embed(TEXTS * 20)))
    backend = embedder.load()
    caller.start()
    while not backend._scheduler._jobs:
        time.sleep(0.001)
    embedder.close()
    caller.join(60)
    assert results[0].shape == (800, 64)


def test_close_can_cancel(checkpoint):
    embedder = Embedder(Options(model=checkpoint, max_tokens=781, max_batch_tokens=64))
    backend = embedder.load()
    outcome: list[BaseException] = []

    def caller() -> None:
        try:
            embedder.embed(TEXTS * 500)
        except BaseException as exc:
            outcome.append(exc)

    thread = threading.Thread(target=caller)
    thread.start()
    while not backend._scheduler._jobs:
        time.sleep(0.001)
    embedder.close(cancel=True)
    thread.join(30)
    assert not any(worker.is_alive() for worker in backend._workers)
    assert isinstance(outcome[0], EngineClosedError)


USES = {
    "one long call": "embedder.embed(['word'] * 100_000)",
    "many calls": "while True: embedder.embed(['word'])",
    "a stream": "list(embedder.stream(itertools.repeat('word'), batch_size=50))",
    "a loop": "asyncio.run(embedder.aembed(['word'] * 100_000))",
    "an async stream": "asyncio.run(read(embedder.astream(itertools.repeat('word'))))",
}


def test_a_program_ends_whatever_is_under_way(checkpoint):
    program = f"""
import asyncio, itertools, threading, time
from shared_engine import Embedder, Options
async def read(stream):
    async for part in stream: pass
def main():
    embedders = [Embedder(Options(model={str(checkpoint)!r}, max_tokens=n)) for n in (40, 50)]
    for each in embedders:
        each.embed(["x"])
    for embedder in embedders:
        for how in {list(USES.values())!r}:
            env = globals() | {{"embedder": embedder}}
            threading.Thread(target=exec, args=(how, env), daemon=True).start()
    time.sleep(0.3)
main()
"""
    done = run(program)
    assert done.returncode == 0, done.stderr
    never_closed = f"""
from shared_engine import Options
from shared_engine.local.backend import LocalBackend
backend = LocalBackend(Options(model={str(checkpoint)!r}))
"""
    assert run(never_closed).returncode == 0


def run(program: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=Path(__file__).parents[1],
        env=os.environ | env,
    )


def test_several_devices_take_steps_from_one_queue(checkpoint):
    """Every row is right and in its place."""
    texts = [f"text {i} " + "word " * (i * 37 % 60) for i in range(300)]
    expected = Embedder(Options(model=checkpoint, device="cpu", dtype="float32")).embed(texts)
    options = Options(model=checkpoint, device="cpu, cpu", dtype="float32", max_batch_tokens=200)
    with Embedder(options) as embedder:
        assert np.abs(embedder.embed(texts) - expected).max() <= 1e-6
        assert embedder.description.count("cpu, float32, 200 tokens per step") == 2


def test_devices_of_different_kinds_are_refused(checkpoint, monkeypatch):
    dtypes = iter([(torch.float32, "slow"), (torch.bfloat16, "fast")])
    monkeypatch.setattr("shared_engine.local.device._select_dtype", lambda *_: next(dtypes))
    with pytest.raises(ConfigurationError, match="different dtypes"):
        Embedder(Options(model=checkpoint, device="cpu,cpu")).embed(["x"])


# Threads and loops of the program


def test_first_calls_at_once_lose_no_count(checkpoint):
    options = Options(model=str(checkpoint), max_tokens=77)
    with Embedder(options) as kept:
        kept.embed(["word"])
        each = kept.usage
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        try:
            for _ in range(40):
                embedder, barrier = Embedder(options), threading.Barrier(8)

                def call(embedder=embedder, barrier=barrier):
                    barrier.wait()
                    embedder.embed(["word"])

                callers = [threading.Thread(target=call) for _ in range(8)]
                for caller in callers:
                    caller.start()
                for caller in callers:
                    caller.join()
                assert embedder.usage == 8 * each
                embedder.close()
                (engine,) = [e for e in engines._engines.values() if e.load() is kept.load()]
                assert engine.leases == 1  # nobody took two shares
        finally:
            sys.setswitchinterval(interval)


def test_an_engine_that_was_closed_while_a_call_waited_for_it_loads_no_second_model(checkpoint):
    embedder = Embedder(Options(model=str(checkpoint), max_tokens=61))  # its own engine
    loaded = embedder.load()
    (engine,) = [e for e in engines._engines.values() if e.load() is loaded]
    embedder.close()
    with pytest.raises(EngineClosedError, match="this object was closed"):  # as in that call
        engine.load()


async def test_a_vector_does_not_wait_for_the_programs_own_jobs(checkpoint):
    from langchain_nemoretriever import NeMoRetrieverEmbeddings
    from llamaindex_nemoretriever import NeMoRetrieverEmbedding

    langchain = NeMoRetrieverEmbeddings(model=str(checkpoint))
    llamaindex = NeMoRetrieverEmbedding(model=str(checkpoint))
    embedder = langchain.embedder
    many = ["a text"] * 3000  # too many values for the loop itself
    embedder.embed(["loaded"])
    loop, release = asyncio.get_running_loop(), threading.Event()
    with ThreadPoolExecutor(1) as busy:
        loop.set_default_executor(busy)
        blocked = loop.run_in_executor(None, release.wait)
        try:
            async with asyncio.timeout(20):
                await embedder.aembed(many)
                await embedder._aembed_lists(many)
                assert [len(part) async for part in embedder.astream(many, batch_size=2000)]
                await langchain.aembed_documents(many)
                await langchain.aembed_query("a query")
                await llamaindex.aget_text_embedding_batch(many)
                await llamaindex.aget_query_embedding("a query")
        finally:
            release.set()
            await blocked
