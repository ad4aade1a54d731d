"""Images for a NIM: what is sent, in which batches, how much is held, and what fails."""

from __future__ import annotations

import asyncio
import base64
import gc
import io
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from shared_engine import (
    Embedder,
    EmbeddingInput,
    EngineError,
    ImageError,
    ImageTooLargeError,
    InputTooLongError,
    InputTypeError,
    InvalidRequestError,
    Options,
    PartialResultError,
    RequestTimeoutError,
    UnsupportedDimensionsError,
    UnsupportedModalityError,
    images,
)
from shared_engine.endpoints import HOSTED
from shared_engine.nim import batches as nim_batches
from tests.support.faulty_nim import FAULTS, FaultyNim
from tests.support.nim import Nim, vector

VL = "nvidia/llama-nemotron-embed-vl-1b-v2"
TEXT_ONLY = "nvidia/llama-nemotron-embed-1b-v2"
UNKNOWN = "nvidia/m"
Answer = tuple[int, dict[str, str], bytes]


def picture(seed: int = 0, side: int = 8) -> Image.Image:
    """Return noise, which no PNG makes smaller than 3 bytes a pixel."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return Image.fromarray(pixels)


def png(seed: int = 0, side: int = 8) -> bytes:
    return saved(picture(seed, side), "PNG")


def saved(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


def url(content: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(content).decode()


def documents(n: int, side: int = 8) -> list[EmbeddingInput]:
    """Return texts, images and pairs in turn."""
    makers: list[Callable[[int], EmbeddingInput]] = [
        lambda i: EmbeddingInput(f"text {i}"),
        lambda i: EmbeddingInput(image=png(i, side)),
        lambda i: EmbeddingInput(f"page {i}", png(i, side)),
    ]
    return [makers[i % 3](i) for i in range(n)]


def wire(document: EmbeddingInput) -> str:
    """Return what a document of `documents` is on the wire."""
    parts = [document.text, document.image and url(document.image)]
    return "\n".join(part for part in parts if part)


def expected(items: list[EmbeddingInput]) -> NDArray[np.float32]:
    return np.stack([vector(wire(item)) for item in items])


@contextmanager
def connected(
    answer: Callable[[dict[str, Any]], Answer | None] | None = None,
    rates: dict[str, float] | None = None,
    latency: float = 0.0,
    **options: Any,
) -> Iterator[tuple[FaultyNim, Embedder]]:
    """Run a server and an engine that calls it."""
    options = {"model": UNKNOWN, "max_retries": 0, **options}
    nim = FaultyNim(rates or {}, latency, answer=answer)
    nim.models = [{"id": options["model"]}]
    with nim, Embedder(Options(base_url=nim.url, **options)) as engine:
        yield nim, engine


def refused(status: int, words: str, **more: object) -> Answer:
    return status, {}, json.dumps({"error": words, **more}).encode()


# What is sent


@pytest.mark.parametrize("model", [VL, UNKNOWN])
def test_each_modality_has_its_format_and_all_are_passages(model: str) -> None:
    items = documents(9)
    with connected(model=model) as (nim, engine):
        np.testing.assert_allclose(engine.embed(items), expected(items), atol=1e-6)
        sent = {seen.body["modality"]: seen.body for seen in nim.embedded}
    assert {kind: body["input"] for kind, body in sent.items()} == {
        "text": ["text 0", "text 3", "text 6"],
        "image": [url(png(i)) for i in (1, 4, 7)],
        "text_image": [f"page {i}\n{url(png(i))}" for i in (2, 5, 8)],
    }
    assert {body["input_type"] for body in sent.values()} == {"passage"}


@pytest.mark.parametrize("text", [None, "", " ", "\n\t "])
def test_a_blank_text_with_an_image_is_an_image(text: str | None) -> None:
    with connected() as (nim, engine):
        engine.embed([EmbeddingInput(text, png())])
        assert (nim.embedded[0].body["modality"], nim.embedded[0].body["input"]) == (
            "image",
            [url(png())],
        )


@pytest.mark.parametrize("model", [VL, UNKNOWN])
def test_a_text_that_looks_like_an_image_is_sent_as_text(model: str) -> None:
    texts = [
        url(png()),
        f"a cat\n{url(png())}",
        f"<p>hello</p> <img src='{url(png())}'/>",
        "file:///etc/passwd",
        "http://169.254.169.254/latest/meta-data",
    ]
    with connected(model=model) as (nim, engine):
        np.testing.assert_allclose(
            engine.embed(texts), np.stack([vector(text) for text in texts]), atol=1e-6
        )
        engine.embed(texts, "query")
        assert {seen.body["modality"] for seen in nim.embedded} == {"text"}
        assert [seen.body["input"] for seen in nim.embedded] == [texts, texts]


def test_a_text_model_gets_no_modality_and_refuses_images() -> None:
    with connected(model=TEXT_ONLY) as (nim, engine):
        engine.embed(["a"])
        assert "modality" not in nim.embedded[0].body
        with pytest.raises(UnsupportedModalityError) as caught:
            engine.embed(["a", EmbeddingInput(image=png())])
        assert caught.value.index == 1
        assert len(nim.embedded) == 1


def test_modality_is_left_out_for_texts_if_the_server_forbids_it() -> None:
    def strict(body: dict[str, Any]) -> Answer | None:
        detail = {"type": "extra_forbidden", "loc": ["body", "modality"], "msg": "Not permitted"}
        return refused(400, "", detail=detail) if "modality" in body else None

    with connected(strict, concurrency=1) as (nim, engine):
        for _ in range(2):
            np.testing.assert_allclose(engine.embed(["a"]), [vector("a")], atol=1e-6)
        assert ["modality" in seen.body for seen in nim.embedded] == [True, False, False]
        with pytest.raises(InvalidRequestError, match="Not permitted"):
            engine.embed([EmbeddingInput(image=png())])


def test_an_image_is_not_a_query() -> None:
    with connected() as (nim, engine):
        with pytest.raises(UnsupportedModalityError) as caught:
            engine.embed(["a", EmbeddingInput(image=png())], "query")
        assert caught.value.index == 1
        assert nim.embedded == []


def test_any_source_becomes_a_data_url_and_no_file_name_is_sent(tmp_path: Path) -> None:
    path = tmp_path / "a secret name.png"
    path.write_bytes(png())
    sources = [path, str(path), path.as_uri(), path.open("rb"), png(), url(png())]
    sources += [picture(), saved(picture(), "WEBP"), saved(picture().convert("L"), "GIF")]
    with connected() as (nim, engine):
        engine.embed([EmbeddingInput(image=source) for source in sources])
        sources[3].close()
        (body,) = [seen.body for seen in nim.embedded]
        assert set(body["input"][:6]) == {url(png())}
        for sent in body["input"]:
            assert sent.startswith("data:image/png;base64,iVBORw0KGgo")
        assert "secret" not in str(body)
        assert str(tmp_path) not in str(body)


@pytest.mark.parametrize("allow_image_urls", [False, True])
def test_images_are_fetched_only_if_allowed(
    allow_image_urls: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []

    def fetched(image: object, urls: bool = False, limit: int | None = None) -> str:
        seen.append(urls)
        return url(png())

    with connected(allow_image_urls=allow_image_urls) as (nim, engine):
        with pytest.raises(ImageError):  # a loopback address is not the public internet
            engine.embed([EmbeddingInput(image=f"{nim.url}/cat.png")])
        assert [request.path for request in nim.seen] == ["/v1/models", "/v1/metadata"]
        monkeypatch.setattr(images, "encode_data_url", fetched)
        engine.embed([EmbeddingInput(image="https://example.org/cat.png")])
    assert seen == [allow_image_urls]


@pytest.mark.parametrize(
    ("base_url", "given", "most"),
    [
        (HOSTED, {}, 180_000),
        (HOSTED, {"max_image_characters": 50_000}, 50_000),
        ("http://nim", {"max_image_characters": 50_000}, 50_000),
        ("http://nim", {}, None),
    ],
)
def test_images_are_reduced_to_the_servers_limit(
    base_url: str, given: dict[str, Any], most: int | None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "shared_engine")
    small, large = png(0), png(1, 700)  # 2 MB in base64
    server = Nim(models=(VL,))
    options = {"model": VL, "base_url": base_url, "api_key": "k"}
    items = [
        EmbeddingInput(image=small),
        EmbeddingInput(image=large),
        EmbeddingInput("page", large),
    ]
    with server.embedder(**options, **given) as engine:
        engine.embed(items)
        engine.embed(items)
    sent = [item.rpartition("\n")[2] for body in server.bodies for item in body["input"]]
    assert len(sent) == 6
    assert sent.count(url(small)) == 2
    if most is None:
        assert sent.count(url(large)) == 4
    else:
        assert all(len(one) <= most for one in sent)
        assert all(len(one) > most / 4 for one in sent if one != url(small))
    assert caplog.text.count("are reduced") == (most is not None)


# Bounds


def test_batches_are_bounded_by_bytes_and_by_count() -> None:
    items = [EmbeddingInput(image=png(i, 256)) for i in range(20)]  # 263 kB in base64 each
    items.append(EmbeddingInput(image=png(20, 1000)))  # 4 MB: alone, as no batch can be smaller
    items += [EmbeddingInput(image=png(i)) for i in range(30)]
    with connected(max_batch_size=10) as (nim, engine):
        np.testing.assert_allclose(engine.embed(items), expected(items), atol=1e-6)
        batches = [seen.body["input"] for seen in nim.embedded]
    sizes = [sum(map(len, batch)) for batch in batches]
    assert [size for size in sizes if size > 2_000_000] == [len(wire(items[20]))]
    assert sorted(map(len, batches)) == [1, 6, 7, 7, 10, 10, 10]


def test_a_few_large_images_are_sent_in_parallel() -> None:
    items = [EmbeddingInput(image=png(i, 512)) for i in range(20)]  # a megabyte each
    with connected(latency=0.2) as (nim, engine):
        engine.embed(items)
        assert nim.most_in_flight > 5


@pytest.mark.parametrize("status", [413, 422])
def test_a_batch_that_is_too_large_is_halved_and_the_size_learned(status: int) -> None:
    refusals: list[int] = []

    def small(body: dict[str, Any]) -> Answer | None:
        if len("".join(body["input"])) <= 300_000:
            return None
        refusals.append(len(body["input"]))
        return refused(status, "reduce the payload or image size")

    items = documents(60, 128)  # 66 kB in base64 each
    with connected(small, concurrency=1) as (nim, engine):
        np.testing.assert_allclose(engine.embed(items), expected(items), atol=1e-6)
        before = len(refusals)
        assert 0 < before <= 8
        assert set(nim.answered.values()) == {1}
        engine.embed(items)
        assert len(refusals) == before


@pytest.mark.parametrize("has_index", [False, True])
def test_images_that_are_too_large_alone_fail_alone_and_leave_the_batches_full(
    has_index: bool,
) -> None:
    def answer(body: dict[str, Any]) -> Answer | None:
        for index, item in enumerate(body["input"]):
            if item in many_pixels:
                more = {"index": index} if has_index else {}
                return refused(413, "reduce the payload or image size", **more)
        return None

    items = [EmbeddingInput(image=png(i, 32)) for i in range(300)]
    many_pixels = {wire(item) for item in items[17::50]}  # and no more bytes than the others
    with connected(answer, concurrency=1, max_batch_size=20) as (nim, engine):
        with pytest.raises(PartialResultError) as caught:
            engine.embed(items)
        large = [i for i in range(300) if i % 50 == 17]
        assert {row: (type(error), error.index) for row, error in caught.value.errors.items()} == {
            row: (ImageTooLargeError, row) for row in large
        }
        good = [row for row in range(300) if row not in large]
        np.testing.assert_allclose(
            caught.value.vectors[good], expected([items[row] for row in good]), atol=1e-6
        )
        assert len(nim.embedded) < 80, "one large image made every later batch small"
        with pytest.raises(ImageTooLargeError, match="reduce the payload"):
            engine.embed([items[17]])


def test_encoded_images_in_memory_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = 0
    most = 0
    lock = threading.Lock()
    encode_data_url = images.encode_data_url

    def counted(image: object, urls: bool = False, limit: int | None = None) -> str:
        nonlocal encoded, most
        out = encode_data_url(image, urls, limit)
        with lock:
            encoded += 1
            most = max(most, encoded - sum(nim.answered.values()))
        return out

    monkeypatch.setattr(images, "encode_data_url", counted)
    content = [png(i) for i in range(2000)]
    with connected(latency=0.01, concurrency=4, max_batch_size=10) as (nim, engine):
        engine.embed([EmbeddingInput(image=one) for one in content])
        assert encoded == 2000
        # 2 x 4 workers, the batch that is built, and inputs ahead; answers are counted late.
        assert most <= 13 * 10 + nim_batches.INPUTS_AHEAD
        monkeypatch.setattr(nim_batches, "MOST_HELD", 15 * len(url(content[0])))
        nim.answered.clear()
        nim.latency = 0.1
        encoded = most = 0
        engine.embed([EmbeddingInput(image=one) for one in content[:300]])
        assert encoded == 300
        assert most <= 40 + nim_batches.INPUTS_AHEAD


def test_a_slow_image_does_not_delay_other_callers(monkeypatch: pytest.MonkeyPatch) -> None:
    started, go_on = threading.Event(), threading.Event()

    def slow(image: object, urls: bool = False, limit: int | None = None) -> str:
        started.set()
        assert go_on.wait(30)
        return url(png())

    monkeypatch.setattr(images, "encode_data_url", slow)
    with connected() as (_, engine):
        result: list[Any] = []
        work = threading.Thread(
            target=lambda: result.append(engine.embed([EmbeddingInput(image=png())]))
        )
        work.start()
        assert started.wait(10)
        begun = time.monotonic()
        for _ in range(20):
            engine.embed(["a question"], "query")
        assert time.monotonic() - begun < 5
        assert result == []
        go_on.set()
        work.join(10)
        np.testing.assert_allclose(result[0], [vector(url(png()))], atol=1e-6)


@pytest.mark.parametrize("how", ["cancel", "deadline", "refusal"])
def test_nothing_more_is_encoded_for_a_call_that_ended(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    others = set(threading.enumerate())  # of tests before, whose engines may still be there
    encoded: list[object] = []

    def counted(image: object, urls: bool = False, limit: int | None = None) -> str:
        encoded.append(image)
        time.sleep(0.02)
        if image in broken:
            raise ImageError("is broken")
        return url(png())

    monkeypatch.setattr(images, "encode_data_url", counted)
    content = [png(i) for i in range(3)]
    broken = {content[2]}
    items = [EmbeddingInput(image=content[i % 3]) for i in range(3000)]
    answer = (lambda _: refused(401, "no")) if how == "refusal" else None

    async def cancelled() -> None:
        task = asyncio.create_task(engine.aembed(items))
        while not encoded:  # noqa: ASYNC110 - they are encoded in other threads
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    deadline = 0.3 if how == "deadline" else None
    with connected(answer, deadline=deadline, max_batch_size=5) as (_, engine):
        if how == "cancel":
            asyncio.run(cancelled())
        else:
            with pytest.raises(PartialResultError) as caught:
                engine.embed(items)
            kinds = {type(error) for error in caught.value.errors.values()}
            assert ImageError in kinds
            assert len(kinds) == 2
        before = len(encoded)
        assert before < 1000
        time.sleep(0.3)
        assert len(encoded) <= before + 2  # those that had just begun
        if how != "refusal":
            assert engine.embed(["a"]).shape == (1, 16)
    begun = set(threading.enumerate()) - others
    assert "nemoretriever-nim" not in {thread.name for thread in begun}


def test_a_failed_image_of_an_ended_call_is_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(image: object, urls: bool = False, limit: int | None = None) -> str:
        if image == first:
            assert go_on.wait(30)  # the others have failed and nobody has retrieved their errors
        raise ImageError("is broken")

    monkeypatch.setattr(images, "encode_data_url", failing)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    go_on, first = threading.Event(), png(0)
    with connected(deadline=0.2) as (_, engine):
        with pytest.raises(RequestTimeoutError):
            engine.embed([EmbeddingInput(image=png(i)) for i in range(9)])
        go_on.set()
    gc.collect()
    assert caplog.text == ""


# What goes wrong


def test_an_image_that_cannot_be_read_fails_alone() -> None:
    items = documents(120)
    broken = {
        7: EmbeddingInput(image=b"no image"),
        50: EmbeddingInput("a caption", png(50)[:-30]),
        51: EmbeddingInput(image="/no/such/file.png"),
        118: EmbeddingInput(image="data:image/png;base64,AAAA"),
    }
    given = [broken.get(i, item) for i, item in enumerate(items)]
    with connected(max_batch_size=10) as (nim, engine):
        with pytest.raises(PartialResultError) as caught:
            engine.embed(given)
        assert {row: (type(error), error.index) for row, error in caught.value.errors.items()} == {
            row: (ImageError, row) for row in broken
        }
        good = [row for row in range(120) if row not in broken]
        np.testing.assert_allclose(caught.value.vectors[good], expected(items)[good], atol=1e-6)
        assert np.isnan(caught.value.vectors[list(broken)]).all()
        before = len(nim.embedded)
        with pytest.raises(ImageError):
            engine.embed([broken[7]])
        with pytest.raises(PartialResultError) as caught:
            engine.embed([broken[7], broken[118]])
        assert sorted(caught.value.errors) == [0, 1]
        with pytest.raises(InputTypeError) as wrong:
            engine.embed([*items, EmbeddingInput(image=object())])
        assert wrong.value.index == 120
        assert len(nim.embedded) == before


def test_an_unexpected_error_of_an_image_is_an_engine_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    encode_data_url = images.encode_data_url

    def failing(image: object, urls: bool = False, limit: int | None = None) -> str:
        if image == png(3):
            raise MemoryError("no memory")
        return encode_data_url(image, urls, limit)

    monkeypatch.setattr(images, "encode_data_url", failing)
    items = [EmbeddingInput(image=png(i)) for i in range(9)]
    with connected() as (_, engine), pytest.raises(PartialResultError) as caught:
        engine.embed(items)
    assert {row: type(error) for row, error in caught.value.errors.items()} == {3: EngineError}
    assert isinstance(caught.value.errors[3].__cause__, MemoryError)


def test_an_input_over_the_token_limit_is_named() -> None:
    def answer(body: dict[str, Any]) -> Answer | None:
        if any("long" in item for item in body["input"]):
            return refused(400, "Input length 3000 exceeds maximum allowed token size 2048")
        return None

    items = documents(60)
    items[20] = EmbeddingInput("long " * 100, png(20))
    with connected(answer) as (_, engine), pytest.raises(PartialResultError) as caught:
        engine.embed(items)
    ((row, error),) = caught.value.errors.items()
    assert isinstance(error, InputTooLongError)
    assert (row, error.index, error.tokens, error.limit) == (20, 20, 3000, 2048)


def test_an_image_that_the_server_cannot_read_fails_alone() -> None:
    bad = [url(png(i)) for i in (4, 13, 40)]

    def answer(body: dict[str, Any]) -> Answer | None:
        if any(item in bad for item in body["input"]):
            return refused(400, "cannot identify image file")
        return None

    items = [EmbeddingInput(image=png(i)) for i in range(60)]
    with connected(answer, max_batch_size=16) as (nim, engine):
        with pytest.raises(PartialResultError) as caught:
            engine.embed(items)
        kinds = {row: type(error) for row, error in caught.value.errors.items()}
        assert kinds == dict.fromkeys((4, 13, 40), InvalidRequestError)
        good = [row for row in range(60) if row not in kinds]
        np.testing.assert_allclose(caught.value.vectors[good], expected(items)[good], atol=1e-6)
        assert set(nim.answered.values()) == {1}


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("this model does not do images", InvalidRequestError),
        ("dimensions must be positive", UnsupportedDimensionsError),
    ],
)
def test_a_refusal_of_all_images_ends_the_call(words: str, kind: type[Exception]) -> None:
    items = [EmbeddingInput(image=png(i)) for i in range(500)]
    with connected(lambda _: refused(400, words), concurrency=2) as (nim, engine):
        with pytest.raises(kind):
            engine.embed(items)
        assert len(nim.embedded) < 300


def test_an_input_that_the_server_names_is_sent_once_more_alone() -> None:
    def answer(body: dict[str, Any]) -> Answer | None:
        for index, item in enumerate(body["input"]):
            if item == url(png(30)):
                return refused(400, "the image is broken", index=index)
        return None

    items = [EmbeddingInput(image=png(i)) for i in range(50)]
    with connected(answer) as (nim, engine):
        with pytest.raises(PartialResultError) as caught:
            engine.embed(items)
        assert list(caught.value.errors) == [30]
        assert [len(seen.body["input"]) for seen in nim.embedded] == [50, 1, 49]


def test_every_row_arrives_correctly_and_once_through_every_fault() -> None:
    rates = dict.fromkeys(FAULTS, 0.04)
    items = documents(1500)
    with connected(rates=rates, latency=0.005, max_retries=5, max_batch_size=10) as (nim, engine):
        out = engine.embed(items)  # the same test with texts is asynchronous
        assert set(nim.happened) == set(FAULTS), "a fault never happened"
        np.testing.assert_allclose(out, expected(items), atol=1e-6)
        assert set(nim.answered.values()) == {1}
        assert len(nim.answered) == len(items)


def test_vectors_are_kept_at_the_deadline() -> None:
    items = documents(300)
    with connected(latency=0.1, deadline=1.0, concurrency=2, max_batch_size=10) as (_, engine):
        with pytest.raises(PartialResultError) as caught:
            engine.embed(items)
        failed = caught.value.errors
        assert {type(error) for error in failed.values()} == {RequestTimeoutError}
        good = [row for row in range(300) if row not in failed]
        assert good
        np.testing.assert_allclose(caught.value.vectors[good], expected(items)[good], atol=1e-6)
