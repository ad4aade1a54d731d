"""Images over real sockets, from clients of all kinds to a multimodal checkpoint and back."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from shared_engine import (
    Embedder,
    EmbeddingInput,
    ImageTooLargeError,
    InputTooLongError,
    InvalidRequestError,
    Options,
    PartialResultError,
)
from shared_engine.cli.main import main
from shared_engine.images import sources
from shared_engine.server.limits import ServerLimits
from tests.support.checkpoints import SHAPES, build_checkpoint
from tests.support.faulty_nim import FaultyNim
from tests.support.servers import NAME, Running, check_probes_during, running, vectors
from tests.support.vl_checkpoints import build_vl_checkpoint, page

TEXT = "How do I return a product?"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def vl_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vl_checkpoint(tmp_path_factory.mktemp("vl") / "tiny-vl")


@pytest.fixture(scope="module")
def options(vl_checkpoint: Path) -> Options:
    return Options(model=str(vl_checkpoint), device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def served(options: Options) -> Iterator[Running]:
    with running(options) as here:
        yield here


def saved(image: Image.Image, kind: str = "PNG", **how: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file.getvalue()


PNG = saved(page(1, 90, 60))
JPEG = saved(page(2, 50, 120), "JPEG")


def url(content: bytes, kind: str = "png") -> str:
    return f"data:image/{kind};base64," + base64.b64encode(content).decode()


URL = url(PNG)
SHORT = url(saved(Image.new("RGB", (2, 2))))  # few tokens, where it is taken for a text


def assert_close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(got, wanted, atol=TOLERANCE, rtol=0)


def here(served: Running, *items: str | EmbeddingInput, role: Any = "document") -> NDArray[Any]:
    """Return what the engine gives without HTTP."""
    with Embedder(served.options) as embedder:
        return embedder.embed(items, role)


def violated(response: httpx.Response) -> list[Any]:
    """Return the place of a violation."""
    assert response.status_code == 400, response.text
    assert response.json()["type"] == "request_validation_error"
    return response.json()["detail"]["loc"][1:]


# --- here and there ------------------------------------------------------------------------------

KINDS: dict[str, list[str | EmbeddingInput]] = {
    "text": [TEXT, "", "Der Versand kostet 4,90 €."],
    "image": [
        EmbeddingInput(image=PNG),
        EmbeddingInput(image=JPEG),
        EmbeddingInput(image=page(3, 40, 40)),
    ],
    "pair": [
        EmbeddingInput("a page", PNG),
        EmbeddingInput("zwei\nZeilen ", JPEG),
        EmbeddingInput(" lead", PNG),
    ],
    "blank": [EmbeddingInput("", PNG), EmbeddingInput(" \n", PNG), EmbeddingInput(image=PNG)],
    "formats": [
        EmbeddingInput(image=saved(page(4, 70, 80), "WEBP", lossless=True)),
        EmbeddingInput(image=page(5, 30, 30).convert("L")),
        EmbeddingInput(image=saved(page(6, 64, 32).convert("P"), "GIF")),
        EmbeddingInput(image=saved(page(7, 64, 32).convert("RGBA"), "TIFF")),
        EmbeddingInput(image=url(JPEG, "jpeg")),
    ],
    "traps": [
        SHORT,
        f"a cat\n{SHORT}",
        f"<img src='{SHORT}'/>",
        EmbeddingInput(f"the URL {SHORT}", JPEG),
        EmbeddingInput(f"a line\n{SHORT}", JPEG),
        EmbeddingInput("<img src='", PNG),
        EmbeddingInput("a tag <img src='x'/>", PNG),
        EmbeddingInput("file:///etc/passwd", PNG),
    ],
}
KINDS["mixed"] = [KINDS[name][i] for i in range(3) for name in ("pair", "text", "image", "traps")]


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_local_and_served_vectors_are_equal(served: Running, kind: str, is_async: bool) -> None:
    items = KINDS[kind]
    with Embedder(Options(model=NAME, base_url=served.url, max_batch_size=2)) as there:
        got = asyncio.run(there.aembed(items)) if is_async else there.embed(items)
        assert_close(got, here(served, *items))
        texts = [item for item in items if isinstance(item, str)]
        if texts:
            assert_close(there.embed(texts, "query"), here(served, *texts, role="query"))


def test_different_inputs_have_different_vectors(served: Running) -> None:
    items = [item for name in ("text", "image", "pair") for item in KINDS[name]]
    got = here(served, *items)
    assert np.unique(got.round(4), axis=0).shape == got.shape


def test_check_compares_images_too(
    served: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    at = ["--base-url", served.url, "--dtype", "float32", "--device", "cpu"]
    assert main(["check", "--model", served.options.model, *at]) == 0
    assert re.search(r"^image: cosine 1\.0", capsys.readouterr().out, re.MULTILINE)
    other = build_vl_checkpoint(tmp_path / "other", seed=1)
    assert main(["check", "--model", str(other), *at]) == 1
    text_only = build_checkpoint(tmp_path / "text", SHAPES["sentence-transformers"])
    capsys.readouterr()
    assert main(["check", "--model", str(text_only), *at]) == 0  # the same weights, without eyes
    assert "image:" not in capsys.readouterr().out


# --- what it takes -------------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["image", ["image"], ["image", "image"], ...])
@pytest.mark.parametrize("input_type", ["passage", "", ...])
def test_images_alone(served: Running, modality: Any, input_type: Any) -> None:
    response = served.post(input=[URL, url(JPEG)], modality=modality, input_type=input_type)
    assert_close(
        vectors(response), here(served, EmbeddingInput(image=PNG), EmbeddingInput(image=JPEG))
    )


@pytest.mark.parametrize("modality", ["text_image", ["text_image"], ...])
@pytest.mark.parametrize(
    "form",
    [
        "{text}\n{url}",
        "{text} {url}",
        "{text} <img src='{url}'/>",
        "{text}\n<img src='{url}' />",
        '{text}<img src="{url}"/>',
        '{text} <img  src="{url}">',
        "{text} {url}\n",
    ],
)
def test_forms_of_a_text_with_an_image(served: Running, form: str, modality: Any) -> None:
    given = form.format(text="a page", url=URL)
    got = vectors(served.post(input=given, modality=modality))
    assert_close(got, here(served, EmbeddingInput("a page", PNG)))


@pytest.mark.parametrize("form", ["<img src='{}'/>", '<img src="{}">', "\n{}", " <img src='{}'/>"])
def test_forms_of_an_image(served: Running, form: str) -> None:
    for modality in ("image", ...):
        got = vectors(served.post(input=form.format(URL), modality=modality))
        assert_close(got, here(served, EmbeddingInput(image=PNG)))


def test_a_mixed_batch_with_and_without_modalities(served: Running) -> None:
    given = [TEXT, URL, f"a page\n{URL}", "file:///etc/passwd"]
    wanted = here(served, TEXT, EmbeddingInput(image=PNG), EmbeddingInput("a page", PNG), given[3])
    kinds = ["text", "image", "text_image", "text"]
    for modality in (kinds, ...):
        assert_close(vectors(served.post(input=given, modality=modality)), wanted)
    reverse = served.post(input=given[::-1], modality=kinds[::-1], encoding_format="base64")
    rows = [
        np.frombuffer(base64.b64decode(row["embedding"]), "<f4") for row in reverse.json()["data"]
    ]
    assert_close(rows, wanted[::-1])


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "x-whatever", "svg+xml"])
def test_the_bytes_decide_the_format(served: Running, kind: str) -> None:
    got = vectors(served.post(input=url(JPEG, kind), modality="image"))
    assert_close(got, here(served, EmbeddingInput(image=JPEG)))


def test_modality_text_keeps_a_data_url_as_text(served: Running) -> None:
    given = [SHORT, f"a cat\n{SHORT}", f"<img src='{SHORT}'/>"]
    for modality in ("text", ["text"], ["text"] * 3):
        assert_close(vectors(served.post(input=given, modality=modality)), here(served, *given))
        got = vectors(served.post(input=given, modality=modality, input_type="query"))
        assert_close(got, here(served, *given, role="query"))


@pytest.mark.parametrize(
    "form",
    [
        "{}) and more",
        "{} is a data URL",
        "{}\n\nThe text of a page.",
        "![a cat]({})",
        "[{}]",
        "a cat:{}",
        "<p><img src='{}'/></p>",
        "<img src='{}' alt='a cat'/>",
        "<img src='{}\"/>",
        "{}.",
        "{0} {0} {0}!",
        "{0},{0}",
    ],
)
def test_a_data_url_within_a_text_stays_text(served: Running, form: str) -> None:
    texts = [form.format(SHORT), form.format("data:image/png;base64,iVBORw0KGgo=")]
    assert_close(vectors(served.post(input=[TEXT, *texts])), here(served, TEXT, *texts))
    got = vectors(served.post(input=texts, input_type="query"))
    assert_close(got, here(served, *texts, role="query"))


def test_a_text_model_embeds_data_urls_as_text(tmp_path: Path) -> None:
    folder = build_checkpoint(tmp_path / "tiny", SHAPES["sentence-transformers"])
    given = [SHORT, f"a cat\n{SHORT}"]
    with running(Options(model=str(folder), device="cpu", dtype="float32")) as text_only:
        assert_close(vectors(text_only.post(input=given)), text_only.expected(given))
        assert violated(text_only.post(input=given, modality="image")) == ["modality"]
        assert text_only.client.get("/metadata").json()["modalities"] == ["text"]
        with Embedder(Options(model=NAME, base_url=text_only.url)) as there:
            assert_close(there.embed(given), text_only.expected(given))
            with pytest.raises(InvalidRequestError, match="Input should be 'text'"):
                there.embed([EmbeddingInput(image=PNG)] * 3)


# --- what it refuses -----------------------------------------------------------------------------


@pytest.mark.parametrize("modality", ["image", "text_image"])
def test_paths_and_urls_of_a_client_are_never_opened(
    options: Options, tmp_path: Path, modality: str
) -> None:
    path = tmp_path / "there.png"
    path.write_bytes(PNG)
    fetching = options.model_copy(update={"allow_image_urls": True})
    with FaultyNim() as outside, running(fetching) as here:
        for given in (
            "file:///etc/passwd",
            "/etc/passwd",
            str(path),
            path.as_uri(),
            f"data:image/png;file={path}",
            "http://169.254.169.254/latest/meta-data",
            f"{outside.url}/cat.png",
            f"<img src='{outside.url}/cat.png'/>",
            base64.b64encode(PNG).decode(),
            "data:text/plain;base64,AAAA",
            f"{URL} and more",
            f"data:image/png,{path.as_uri()}",
            f"data:image/png;base64,{outside.url}",
            "",
        ):
            for text in ("", "a caption\n"):
                response = here.post(input=[URL, text + given], modality=["image", modality])
                assert violated(response) == ["input", 1], given
                assert "data:image/png;base64" in response.json()["detail"]["msg"]
        assert outside.seen == []


def test_modality_must_match_the_input(served: Running) -> None:
    said = "Text part must be non-empty for text_image modality"
    for blank in ("", "\n", "  \n\n", " "):
        response = served.post(input=[f"a\n{URL}", blank + URL], modality="text_image")
        assert response.status_code == 400
        assert (response.json()["message"], response.json()["index"]) == (said, 1)
    response = served.post(input=[URL, f"a page\n{URL}"], modality="image")
    assert violated(response) == ["input", 1]
    assert violated(served.post(input=[f"a page{URL}"], modality="text_image")) == ["input", 0]


def test_an_image_as_query_is_refused(served: Running) -> None:
    for modality in ("image", ...):
        response = served.post(input=[URL], modality=modality, input_type="query")
        assert violated(response) == ["input_type"]
    response = served.post(model=NAME + "-query", input=[TEXT, f"a\n{URL}"], input_type=...)
    assert violated(response) == ["input_type"]
    response = served.post(input=[TEXT, URL], input_type=...)
    assert "'input_type' parameter is required" in response.json()["message"]
    got = vectors(served.post(model=NAME + "-passage", input=[TEXT, URL], input_type=...))
    assert_close(got, here(served, TEXT, EmbeddingInput(image=PNG)))


@pytest.mark.parametrize("modality", ["video", ["image", "video"], ["image"] * 3, [], [1]])
def test_invalid_modalities_are_refused(served: Running, modality: Any) -> None:
    assert violated(served.post(input=[URL, URL], modality=modality))[0] == "modality"


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of few bytes and many pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    head = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((1 + width // 8) * 64), 9)
    parts = chunk(b"IHDR", head), chunk(b"IDAT", pixels), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(
    ("content", "status"),
    [
        (PNG[:-40], 400),
        (PNG[:30], 400),
        (JPEG[:100], 400),
        (b"", 400),
        (b"no image at all", 400),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 400),
        (bomb(65_000, 65_000), 413),
        (bomb(16_385, 16), 413),
    ],
)
def test_an_error_has_the_index_of_a_broken_image(
    served: Running, content: bytes, status: int
) -> None:
    for bad in (url(content), f"a page\n{url(content)}"):
        response = served.post(input=[TEXT, URL, bad, URL], modality=...)
        assert response.status_code == status, response.text
        assert response.json()["index"] == 2
        assert "input 2" in response.json()["message"]
    assert served.post(input=[URL], modality="image").status_code == 200


@pytest.mark.parametrize("payload", ["!!!", "AAA", "iVBORw0KGgo", "%", "AAAA AAAA", "é", "\x00"])
def test_invalid_base64_is_refused(served: Running, payload: str) -> None:
    response = served.post(input=[URL, "data:image/png;base64," + payload], modality="image")
    assert response.status_code == 400
    assert "Traceback" not in response.text


def test_limits_of_images(options: Options) -> None:
    assert ServerLimits().max_image_bytes == sources.MAX_BYTES
    assert 4 * ServerLimits().max_image_bytes // 3 + 100_000 < ServerLimits().max_body_bytes
    limits = ServerLimits(max_image_bytes=len(PNG))
    large = EmbeddingInput(image=saved(page(8, 300, 300)))
    with running(options, limits=limits) as here:
        response = here.post(input=[URL, url(large.image)], modality="image")
        assert (response.status_code, response.json()["index"]) == (413, 1)
        items = [large if i == 5 else EmbeddingInput(f"page {i}", PNG) for i in range(12)]
        with Embedder(Options(model=NAME, base_url=here.url)) as there:
            with pytest.raises(PartialResultError) as caught:
                there.embed(items)
            with pytest.raises(ImageTooLargeError):
                there.embed([large])
    ((row, error),) = caught.value.errors.items()
    assert isinstance(error, ImageTooLargeError)
    assert (row, error.index) == (5, 5)
    good = [row for row in range(12) if row != 5]
    with Embedder(options) as embedder:
        wanted = embedder.embed([items[row] for row in good])
    assert_close(caught.value.vectors[good], wanted)


def test_our_client_learns_the_body_limit_of_a_server(options: Options) -> None:
    items = [EmbeddingInput(image=saved(page(i, 100, 100))) for i in range(40)]
    most = 12 * len(items[0].image)
    with (
        running(options, limits=ServerLimits(max_body_bytes=most)) as here,
        Embedder(Options(model=NAME, base_url=here.url)) as there,
        Embedder(options) as local,
    ):
        assert_close(there.embed(items), local.embed(items))
        before = here.metric('nemoretriever_requests_total{path="/v1/embeddings",status="413"}')
        assert before > 0
        there.embed(items)
        assert (
            here.metric('nemoretriever_requests_total{path="/v1/embeddings",status="413"}')
            == before
        )


def test_too_many_tokens(served: Running) -> None:
    long = "word " * 6000
    response = served.post(input=[URL, f"{long}\n{URL}"], modality=["image", "text_image"])
    assert response.status_code == 400
    words = r"Input length \d+ exceeds maximum allowed token size \d+"
    assert re.fullmatch(words, response.json()["message"])
    assert response.json()["index"] == 1
    items = [TEXT, EmbeddingInput(long, PNG), EmbeddingInput(image=PNG)]
    there = Embedder(Options(model=NAME, base_url=served.url))
    with there, pytest.raises(PartialResultError) as caught:
        there.embed(items)
    assert {row: type(error) for row, error in caught.value.errors.items()} == {
        1: InputTooLongError
    }
    cut = served.post(input=f"{long}\n{URL}", modality="text_image", truncate="END")
    with Embedder(served.options.model_copy(update={"truncate": "END"})) as embedder:
        assert_close(vectors(cut), embedder.embed([EmbeddingInput(long, PNG)]))


# --- many at once --------------------------------------------------------------------------------


def test_probes_are_answered_while_large_images_are_read(served: Running) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), np.uint8)
    large = url(saved(Image.fromarray(noise)))  # 10 MB
    check_probes_during(lambda: served.post(input=[large] * 4, modality="image"), served)


def test_bodies_are_held_until_they_are_answered(options: Options) -> None:
    image = url(saved(page(9, 200, 200)))
    with running(options, limits=ServerLimits(max_body_bytes=len(image) + 1000)) as here:
        with ThreadPoolExecutor(40) as pool:
            sent = [pool.submit(here.post, input=image, modality="image") for _ in range(40)]
            statuses = {answer.result().status_code for answer in sent}
        assert statuses <= {200, 429}
        assert 200 in statuses
        for _ in range(20):  # nothing is counted as held for ever
            assert here.post(input=image, modality="image").status_code == 200


def test_metrics_and_metadata(options: Options) -> None:
    with running(options) as here:
        here.post(input=[TEXT, URL, URL, f"a page\n{URL}"])
        here.post(input=[URL, "data:image/png;base64,AAAA"], modality="image")
        name = 'nemoretriever_inputs_by_modality_total{modality="%s"}'
        counts = {kind: here.metric(name % kind) for kind in ("text", "image", "text_image")}
        assert counts == {"text": 1, "image": 2, "text_image": 1}
        assert here.metric('nemoretriever_errors_total{kind="image"}') == 1
        assert here.client.get("/metadata").json()["modalities"] == ["image", "text", "text_image"]


# --- other people's clients ----------------------------------------------------------------------


@pytest.mark.parametrize("input_type", ["passage", ""])  # the card of the first model has ""
def test_openai_client_sends_the_cards_sample(served: Running, input_type: str) -> None:
    openai = pytest.importorskip("openai")
    more = {"modality": ["image"], "input_type": input_type, "truncate": "NONE"}
    with openai.OpenAI(base_url=served.url, api_key="any", max_retries=0) as client:
        response = client.embeddings.create(
            input=[f"data:image/png,{base64.b64encode(PNG).decode()}"],
            model=NAME,
            encoding_format="float",
            extra_body=more,
        )
        assert_close([response.data[0].embedding], here(served, EmbeddingInput(image=PNG)))
        inferred = client.embeddings.create(input=[TEXT, URL], model=NAME + "-passage")
        got = [item.embedding for item in inferred.data]
        assert_close(got, here(served, TEXT, EmbeddingInput(image=PNG)))


def test_langchain_nvidia_sends_the_cards_sample(served: Running) -> None:
    module = pytest.importorskip("langchain_nvidia_ai_endpoints")
    client = module.NVIDIAEmbeddings(base_url=served.url, model=NAME, truncate="NONE")
    assert_close(client.embed_documents([URL]), here(served, EmbeddingInput(image=PNG)))


# --- anything at all -----------------------------------------------------------------------------

_fuzz = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
_FILES = [PNG, JPEG, saved(page(10, 20, 20), "WEBP"), saved(page(11, 9, 9).convert("P"), "GIF")]


@st.composite
def mutated(draw: st.DrawFn) -> str:
    """Draw the data URL of a file that was cut, or whose bytes were changed."""
    content = bytearray(draw(st.sampled_from(_FILES)))
    for at, value in draw(
        st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), max_size=8)
    ):
        content[at] = value
    del content[draw(st.integers(0, len(content))) :]
    return url(bytes(content), draw(st.sampled_from(["png", "jpeg", "webp", "", "x;y=1"])))


_pieces = st.one_of(
    st.text(max_size=10),
    st.sampled_from(
        [URL, "data:image/png;base64,", "data:", " ", "\n", "<img src='", '<img src="', "'/>", '">']
    ),
    mutated(),
)
_inputs = st.lists(st.lists(_pieces, max_size=4).map("".join), min_size=1, max_size=3)
_kind = st.sampled_from(["text", "image", "text_image"])


@pytest.mark.slow
@_fuzz
@given(
    _inputs,
    st.none() | _kind | st.lists(_kind, max_size=3),
    st.sampled_from(["passage", "query", ""]),
)
def test_any_image_gets_a_response(
    served: Running, inputs: list[str], modality: Any, input_type: str
) -> None:
    body = {"model": NAME, "input": inputs, "input_type": input_type, "truncate": "END"}
    body |= {"modality": modality} if modality is not None else {}
    content = json.dumps(body).encode()
    response = served.client.post(
        "/embeddings", content=content, headers={"Content-Type": "application/json"}
    )
    event(f"status {response.status_code}")
    assert response.status_code in (200, 400, 413), response.text
    if response.status_code == 200:
        assert len(response.json()["data"]) == len(inputs)
