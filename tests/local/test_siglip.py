"""Vectors of images, alone and with a text, are right, whatever stands beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared_engine import (
    CheckpointError,
    Embedder,
    EmbeddingInput,
    ImageTooLargeError,
    InputTooLongError,
    InputTypeError,
    Options,
    PartialResultError,
    UnsupportedModalityError,
)
from shared_engine.documents import pair_with_images, wrap_images
from shared_engine.images.tiles import cut_tiles
from tests.support.vl_checkpoints import (
    VL_SHAPES,
    VLShape,
    build_vl_checkpoint,
    page,
    true_shape_vl,
)
from tests.support.vl_oracles import Item, internvl, numpy_float64

TEXTS = ["hello world", "", "naïve café — 日本語のテキスト", "a longer text, " * 20]
SIZES = [(32, 32), (200, 100), (60, 170), (31, 97), (640, 480)]
Sizes = list[tuple[int, int]]


@pytest.fixture(scope="module", params=list(VL_SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = str(request.param)
    return build_vl_checkpoint(tmp_path_factory.mktemp(name) / name, VL_SHAPES[name])


@pytest.fixture
def embedder(folder: Path) -> Iterator[Embedder]:
    with Embedder(Options(model=folder, device="cpu", dtype="float32", max_tiles=3)) as made:
        yield made


@pytest.fixture(scope="module")
def vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vl_checkpoint(tmp_path_factory.mktemp("vl") / "vl")


def mixed(size: int, max_tiles: int) -> tuple[list[EmbeddingInput], list[Item]]:
    """Texts, images and pairs of both, as the engine and as the oracles take them."""
    documents, items = [EmbeddingInput(text) for text in TEXTS], [(text, None) for text in TEXTS]
    for seed, (width, height) in enumerate(SIZES):
        image = page(seed, width, height)
        for text in (None, TEXTS[seed % len(TEXTS)]):
            documents.append(EmbeddingInput(text, image))
            items.append((text, cut_tiles(image, max_tiles, size)))
    return documents, items


@pytest.mark.parametrize(
    "oracle",
    [
        pytest.param(numpy_float64, id="numpy_float64"),
        pytest.param(internvl, id="internvl", marks=pytest.mark.slow),
    ],
)
def test_vectors_equal_independent_implementations(embedder, folder, oracle):
    documents, items = mixed(VL_SHAPES[folder.name].image_size, max_tiles=3)
    assert np.abs(embedder.embed(documents) - oracle(folder, items, "document")).max() <= 1e-5
    queries = embedder.embed(TEXTS, "query")
    assert np.abs(queries - oracle(folder, items[: len(TEXTS)], "query")).max() <= 1e-5


def test_layouts_of_one_model_embed_alike(tmp_path):
    image = EmbeddingInput(image=page(1, 90, 40))
    vectors = [
        Embedder(Options(model=build_vl_checkpoint(tmp_path / name, VL_SHAPES[name]))).embed(
            [image]
        )
        for name in ("nested", "flat", "no-head", "prefixed", "sharded")
    ]
    assert all(np.array_equal(vectors[0], other) for other in vectors[1:])


def test_a_vector_does_not_depend_on_neighbours(vl):
    documents, _ = mixed(32, 2)
    alone = Embedder(Options(model=vl))
    expected = np.concatenate([alone.embed([document]) for document in documents])
    order = np.random.default_rng(0).permutation(len(documents))
    for max_batch_tokens in (1, 40, 200, 8192):
        embedder = Embedder(Options(model=vl, max_batch_tokens=max_batch_tokens))
        got = embedder.embed([documents[i] for i in order])
        assert np.abs(got - expected[order]).max() <= 1e-6


def test_max_tiles_is_an_option_and_part_of_the_cache_key(vl):
    image = page(0, 640, 480)
    item = [(None, cut_tiles(image, 6, 32))]
    assert item[0][1].shape == (7, 32, 32, 3)
    six, default = Embedder(Options(model=vl, max_tiles=6)), Embedder(Options(model=vl))
    got = six.embed([EmbeddingInput(image=image)])
    assert np.abs(got - numpy_float64(vl, item, "document")).max() <= 1e-5
    assert np.abs(got - default.embed([EmbeddingInput(image=image)])).max() > 1e-3
    assert six.cache_key("document") != default.cache_key("document")


def test_the_processor_config_sets_the_number_of_tiles(tmp_path):
    folder = build_vl_checkpoint(tmp_path / "vl", VL_SHAPES["processor-config"])
    assert "at most 4 tiles" in Embedder(Options(model=folder)).description


@pytest.mark.parametrize("name", ["<IMG_CONTEXT>", "<img>", "</img>", "<image>"])
def test_an_image_token_in_a_text_is_a_word(vl, name):
    """It shifts no image and is not lost."""
    embedder = Embedder(Options(model=vl))
    image, text = page(0, 64, 64), f"see {name} here"
    vectors = embedder.embed(
        [
            EmbeddingInput(image=image),
            EmbeddingInput(text),
            EmbeddingInput(text, image),
            EmbeddingInput("see  here", image),
            EmbeddingInput(image=image),
            EmbeddingInput("see  here"),
        ]
    )
    assert np.abs(vectors[0] - vectors[4]).max() <= 1e-6
    assert np.abs(vectors[2] - vectors[3]).max() > 1e-3
    assert np.abs(vectors[1] - vectors[5]).max() > 1e-3
    assert (
        np.abs(embedder.embed([text], "query") - embedder.embed(["see  here"], "query")).max()
        > 1e-3
    )


def test_a_special_token_is_the_same_with_and_without_an_image(vl):
    item: Item = ("a literal <|end_of_text|> inside", cut_tiles(page(0, 64, 64), 2, 32))
    got = Embedder(Options(model=vl)).embed([EmbeddingInput(item[0], page(0, 64, 64))])
    assert np.abs(got - numpy_float64(vl, [item], "document")).max() <= 1e-5


@pytest.mark.parametrize("truncate", ["END", "START"])
def test_only_the_text_of_a_pair_is_cut(vl, truncate):
    """What is left is an image with a part of the text: no token of the image is lost."""
    words = [f"word{i}" for i in range(60)]
    image = EmbeddingInput(image=page(0, 200, 100))
    limited = Embedder(Options(model=vl, max_tokens=40, truncate=truncate))
    both, alone, other = limited.embed(
        [
            EmbeddingInput(" ".join(words), image.image),
            image,
            EmbeddingInput(" ".join(words), page(3, 200, 100)),
        ]
    )
    assert np.abs(both - alone).max() > 1e-3
    assert np.abs(both - other).max() > 1e-3
    kept = {"END": slice(None, 20), "START": slice(-20, None)}[truncate]
    changed = words.copy()
    changed[{"END": -1, "START": 0}[truncate]] = "another"
    cut = limited.embed([EmbeddingInput(" ".join(words), image.image)])  # alone, as the other
    assert np.array_equal(limited.embed([EmbeddingInput(" ".join(changed), image.image)]), cut)
    changed = words[kept] and [*words]
    changed[{"END": 0, "START": -1}[truncate]] = "another"
    assert (
        np.abs(limited.embed([EmbeddingInput(" ".join(changed), image.image)])[0] - both).max()
        > 1e-4
    )


def test_tokens_of_an_image_are_never_cut(vl):
    embedder = Embedder(Options(model=vl, max_tokens=20, max_tiles=6, truncate="END"))
    with pytest.raises(ImageTooLargeError, match=r"input 0 has an image of .* limit is 20"):
        embedder.embed([EmbeddingInput(image=page(0, 640, 480))])


def test_a_pair_over_the_limit_fails_alone(vl):
    embedder = Embedder(Options(model=vl, max_tokens=60))
    image = page(0, 32, 32)
    documents = [
        EmbeddingInput(image=image),
        EmbeddingInput("word " * 80, image),
        EmbeddingInput("short"),
    ]
    with pytest.raises(PartialResultError) as caught:
        embedder.embed(documents)
    error = caught.value.errors[1]
    assert isinstance(error, InputTooLongError)
    assert (error.index, error.limit) == (1, 60)
    rest = embedder.embed([documents[0], documents[2]])
    assert np.abs(caught.value.vectors[[0, 2]] - rest).max() <= 1e-6
    assert np.isnan(caught.value.vectors[1]).all()


def test_a_broken_image_fails_alone(vl):
    embedder = Embedder(Options(model=vl))
    documents = [
        EmbeddingInput(image=page(0, 50, 50)),
        EmbeddingInput(image=b"no image"),
        EmbeddingInput("text"),
    ]
    with pytest.raises(PartialResultError, match=r"1 of 3 inputs failed.*input 1") as caught:
        embedder.embed(documents)
    assert list(caught.value.errors) == [1]
    rest = embedder.embed([documents[0], documents[2]])
    assert np.abs(caught.value.vectors[[0, 2]] - rest).max() <= 1e-6


def test_many_images_come_in_the_callers_order(vl):
    documents = [EmbeddingInput(image=page(i % 7, 40 + i, 90 - i)) for i in range(60)]
    embedder = Embedder(Options(model=vl, max_batch_tokens=300))
    got = embedder.embed(documents)
    for row in (0, 13, 31, 59):
        assert np.abs(got[row] - embedder.embed([documents[row]])[0]).max() <= 1e-6


def test_an_image_is_no_query(vl, checkpoint):
    image = EmbeddingInput(image=page(0, 32, 32))
    with pytest.raises(UnsupportedModalityError, match=r'input 1 has an image.*role="document"'):
        Embedder(Options(model=vl)).embed([EmbeddingInput("text"), image], "query")
    with pytest.raises(UnsupportedModalityError, match=r"input 0 .*'image'.*only text"):
        Embedder(Options(model=checkpoint)).embed([image])
    with pytest.raises(InputTypeError, match="input 1"):
        Embedder(Options(model=vl)).embed(["text", EmbeddingInput(image=42)])


@pytest.mark.parametrize(
    "one", ["page.png", b"bytes", Path("page.png"), BytesIO(b"bytes"), page(0, 9, 9), 42]
)
def test_one_image_is_no_list_of_images(one):
    with pytest.raises(InputTypeError, match="expected a list of images"):
        wrap_images(one)


def test_pairs_need_as_many_texts_as_images():
    with pytest.raises(InputTypeError, match="got 1 texts and 2 images"):
        pair_with_images(["a"], ["a.png", "b.png"])
    with pytest.raises(InputTypeError, match="expected a list"):
        pair_with_images("a", ["a.png"])


@torch.inference_mode()
def test_the_tower_may_be_called_in_its_own_pauses(vl):
    random = np.random.default_rng(1)
    images = [random.integers(0, 256, (n, 32, 32, 3)).astype(np.uint8) for n in (3, 5)]
    with Embedder(Options(model=vl)) as embedder:
        tower = embedder.load()._encoders[0]._vision
    expected = [tower([image]) for image in images]
    inner: list[torch.Tensor] = []
    assert torch.equal(tower(images[:1], lambda: inner.append(tower(images[1:]))), expected[0])
    assert len(inner) == 6  # two in each of three layers
    assert all(torch.equal(each, expected[1]) for each in inner)


def test_texts_never_touch_the_tower(vl, monkeypatch):
    embedder = Embedder(Options(model=vl))
    before = embedder.embed(TEXTS)
    monkeypatch.setattr(
        "shared_engine.local.siglip.VisionTower.__call__", lambda *_: pytest.fail("the tower ran")
    )
    assert np.array_equal(embedder.embed(TEXTS), before)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"config": {"select_layer": -2}}, "select_layer is -2; expected -1"),
        ({"config": {"ps_version": "v1"}}, "ps_version is 'v1'; expected 'v2'"),
        ({"config": {"downsample_ratio": 1.0}}, "downsample_ratio"),
        ({"config": {"pooling": "last"}}, "pooling is 'last'; expected 'avg'"),
        ({"config": {"force_image_size": 448}}, "force_image_size is 448; expected 32"),
        ({"config": {"img_context_token_id": 7}}, "<IMG_CONTEXT>"),
        ({"config": {"llm_config": None}}, "llm_config is None; expected an object"),
        ({"config": {"max_input_tiles": 40}}, "max_input_tiles is 40; expected 1 to 12"),
        ({"config": {"use_thumbnail": False}}, "use_thumbnail is False; expected True"),
        ({"vision_config": {"model_type": "clip"}}, "vision_config.model_type is 'clip'"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config.hidden_act"),
        ({"vision_config": {"num_attention_heads": 5}}, "divisor of hidden_size"),
        ({"vision_config": {"num_hidden_layers": 4}}, "has no tensor"),
        ({"vision_config": {"num_hidden_layers": 2}}, "does not describe"),
    ],
)
def test_another_model_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = build_vl_checkpoint(tmp_path / "vl", VLShape(), **change)
    with pytest.raises(CheckpointError, match=said):
        Embedder(Options(model=folder)).embed(["text"])


def test_a_named_model_must_match_the_catalogue(vl, checkpoint):
    name = "nvidia/llama-3.2-nemoretriever-1b-vlm-embed-v1"
    with pytest.raises(
        CheckpointError, match="describes no vision tower, unlike nvidia/llama-nemotron-embed-vl"
    ):
        Embedder(Options(model=name, checkpoint=str(checkpoint))).embed(["text"])
    with pytest.raises(CheckpointError, match="hidden_size is 64; expected 2048"):
        Embedder(Options(model=name, checkpoint=str(vl))).embed(["text"])


def test_a_tokenizer_may_have_more_entries_than_the_table(tmp_path):
    """Their embeddings are zeros, as in NVIDIA's own library."""
    folder = build_vl_checkpoint(tmp_path / "vl")
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    extra = {**content["added_tokens"][-1], "content": "<extra>"}
    extra["id"] += 1
    content["added_tokens"].append(extra)
    path.write_text(json.dumps(content))
    embedder = Embedder(Options(model=folder))
    assert np.isfinite(embedder.embed(["an <extra> token"])).all()


TRUE_SHAPE = """
import re, sys
from pathlib import Path
import numpy as np
from shared_engine import Embedder, EmbeddingInput, Options
from tests.support.vl_checkpoints import page

name = "nvidia/llama-3.2-nemoretriever-1b-vlm-embed-v1"
options = Options(
    model=name, checkpoint=sys.argv[1], device="cpu", dtype="bfloat16", max_tiles=1, dimensions=1024
)
with Embedder(options) as embedder:
    vectors = embedder.embed([EmbeddingInput(image=page(0, 300, 300)), "a text"])
assert vectors.shape == (2, 1024)
assert np.abs(np.linalg.norm(vectors, axis=1) - 1).max() <= 1e-6
assert abs(vectors[0] @ vectors[1]) < 0.99
# Not `ru_maxrss`: after vfork it is at least the peak of the process that started this one.
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


@pytest.mark.true_shape
@pytest.mark.slow
def test_the_true_shape_fits_on_a_cpu(tmp_path):
    """Loads under its own name and embeds an image in bfloat16, far inside 24 GB."""
    folder = true_shape_vl(tmp_path / "vl")  # asserts its 1,678,252,480 parameters
    command = [sys.executable, "-W", "error", "-c", TRUE_SHAPE, str(folder)]
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert int(done.stdout) < 8_000_000  # kB


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gives_the_same_vectors(vl, dtype):
    documents, items = mixed(32, max_tiles=3)
    exact = numpy_float64(vl, items, "document")
    options = Options(model=vl, device="cuda", dtype=dtype, max_tiles=3)
    ours = Embedder(options).embed(documents)
    assert (ours * exact).sum(1).min() >= (0.999 if dtype == "bfloat16" else 0.999999)
