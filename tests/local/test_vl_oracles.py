"""The multimodal oracles agree, and the fixtures would show what an engine could get wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from tests.support import vl_oracles
from tests.support.checkpoints import BOS, SHAPES, text_sizes
from tests.support.vl_checkpoints import (
    PARAMETERS_1B,
    TRUE_VL,
    VL_SHAPES,
    VLShape,
    build_vl_checkpoint,
    page,
    tiles,
    vl_file_sizes,
    vl_tokenizer,
)
from tests.support.vl_oracles import Float64, Item, Mistake, Pixels

pytestmark = pytest.mark.slow  # they prove the oracles, not the product

FILE = "model.safetensors"
MISTAKES = get_args(Mistake)
TEXTS: list[Item] = [("hello world", None), ("", None), ("The quick brown fox, " * 10, None)]


def images(shape: VLShape) -> list[Item]:
    """One, two and more tiles, without a text and with one."""
    size = shape.image_size
    alone: list[Item] = [(None, tiles(count, count, size)) for count in (1, 2, 4)]
    return [
        *alone,
        ("a caption", tiles(6, 1, size)),
        ("naïve café — 日本語 " * 5, tiles(7, 3, size)),
    ]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def folder(name: str) -> Path:
        return build_vl_checkpoint(tmp_path_factory.mktemp(name) / name, VL_SHAPES[name])

    return folder


@pytest.fixture(scope="module")
def exact(build) -> Callable[[str], Float64]:
    """The images' vectors as they should be."""

    @cache
    def vectors(name: str) -> Float64:
        return vl_oracles.numpy_float64(build(name), images(VL_SHAPES[name]), "document")

    return vectors


def distance(a: Float64, b: Float64) -> Float64:
    """Return how far each unit row moved."""
    moved: Float64 = np.linalg.norm(a - b, axis=1)
    return moved


@pytest.mark.parametrize("name", VL_SHAPES)
def test_the_oracles_agree(build, name):
    folder, items = build(name), images(VL_SHAPES[name])
    for batch, role in ((TEXTS, "query"), (TEXTS + items, "document")):
        exact = vl_oracles.numpy_float64(folder, batch, role)
        assert exact.shape == (len(batch), VL_SHAPES[name].text.hidden_size)
        assert np.abs(vl_oracles.internvl(folder, batch, role) - exact).max() <= 4e-6
        assert np.abs(np.linalg.norm(exact, axis=1) - 1).max() <= 1e-12
        apart = exact @ exact.T - 2 * np.eye(len(batch))
        assert apart.max() < 0.99  # no two inputs embed alike


@pytest.mark.parametrize(
    ("name", "same"),
    [
        ("flat", "nested"),
        ("no-head", "nested"),
        ("prefixed", "nested"),
        ("sharded", "nested"),
        ("rope-parameters", "nested"),
        ("spare-rows", "nested"),
        ("training-export", "flat-no-head"),
    ],
)
def test_layouts_of_one_model_embed_alike(build, name, same):
    batch = TEXTS + images(VL_SHAPES[name])
    a, b = (vl_oracles.numpy_float64(build(x), batch, "document") for x in (name, same))
    assert (a == b).all()


@pytest.mark.parametrize("mistake", [mistake for mistake in MISTAKES if "GELU" not in mistake])
@pytest.mark.parametrize("name", ["nested", "16-a-tile"])
def test_a_mistake_in_the_model_moves_every_image(build, exact, name, mistake):
    items = images(VL_SHAPES[name])
    other = vl_oracles.numpy_float64(build(name), items, "document", mistake=mistake)
    moved = distance(exact(name), other)
    assert moved.min() > 0.05, moved


@pytest.mark.parametrize("mistake", [mistake for mistake in MISTAKES if "GELU" in mistake])
@pytest.mark.parametrize("name", ["nested", "16-a-tile", "odd-heads"])
def test_the_other_form_of_gelu_changes_vectors(build, exact, name, mistake):
    """They agree to 5e-4, yet vectors move by a hundred times what float32 is wrong by."""
    items = images(VL_SHAPES[name])
    other = vl_oracles.numpy_float64(build(name), items, "document", mistake=mistake)
    moved = distance(exact(name), other)
    assert moved.min() > 5e-4, moved
    assert moved.max() > 1e-3, moved


@pytest.mark.parametrize(
    "change",
    [
        lambda p: p[::-1],
        lambda p: p[[1, 0, *range(2, len(p))]],
        lambda p: p[[*range(1, len(p)), 0]],  # the thumbnail first
        lambda p: p[:-1],  # no thumbnail
        lambda p: np.concatenate([p[:-1], tiles(99, 1, p.shape[1])]),
        lambda p: p.swapaxes(1, 2),
        lambda p: p[:, :, ::-1],
    ],
    ids=["reversed", "swapped", "rotated", "last missing", "last changed", "transposed", "mirror"],
)
def test_other_tiles_move_every_image(build, change: Callable[[Pixels], Pixels]):
    items = [(text, p) for text, p in images(VL_SHAPES["nested"]) if len(p) > 1]
    changed = [(text, change(p)) for text, p in items]
    a, b = (vl_oracles.numpy_float64(build("nested"), x, "document") for x in (items, changed))
    assert distance(a, b).min() > 0.05


def test_a_gray_level_changes_vectors(build):
    """A pixel value in 255 at one place moves the vector by more than float32 does."""
    (_, pixels), *_ = items = images(VL_SHAPES["nested"])[:1]
    other = pixels.copy()
    other[0, 5, 9, 1] ^= 1
    a, b = (
        vl_oracles.numpy_float64(build("nested"), x, "document") for x in (items, [("", other)])
    )
    assert distance(a, b).max() > 1e-4


def test_the_epsilon_of_the_tower_changes_vectors(tmp_path):
    shape = VL_SHAPES["large-eps"]
    folder = build_vl_checkpoint(tmp_path / "eps", shape)
    exact = vl_oracles.numpy_float64(folder, images(shape), "document")
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-6
    path.write_text(json.dumps(config))
    other = vl_oracles.numpy_float64(folder, images(shape), "document")
    assert distance(exact, other).min() > 0.05


def test_the_reference_chain_is_two_by_two_space_to_depth():
    """Also the one that the installed transformers has."""
    import torch
    from transformers import InternVLModel

    x = np.random.default_rng(0).normal(size=(3, 8, 8, 5 * 4))
    ours = vl_oracles.pixel_shuffle(x)
    cells = [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]
    assert (ours == np.concatenate(cells, axis=-1)).all()
    assert (ours == InternVLModel.pixel_shuffle(None, torch.tensor(x)).numpy()).all()
    assert not (ours == vl_oracles.pixel_shuffle(x, version="v1")).all()


def test_prompts(build):
    config = json.loads((build("nested") / "config.json").read_text())
    assert vl_oracles.prompt(config, ("a b", None), "query") == "query: a b"
    assert vl_oracles.prompt(config, ("", None), "document") == "passage: "
    context = "<IMG_CONTEXT>" * 8
    for text in (None, "", "a b"):
        item = (text, tiles(0, 2, 32))
        expected = f"passage: <img>{context}</img> {text or ''}"
        assert vl_oracles.prompt(config, item, "document") == expected
    encoding = vl_tokenizer().encode(expected)
    assert encoding.ids.count(config["img_context_token_id"]) == 8
    assert encoding.tokens[0] == BOS
    assert "".join(encoding.tokens[1:]).replace("Ġ", " ") == expected
    assert encoding.tokens[encoding.tokens.index("</img>") + 1 :][:1] == ["Ġa"]


@pytest.mark.parametrize("name", VL_SHAPES)
def test_the_added_tokens_are_the_tokenizers_last(build, name):
    from tokenizers import Tokenizer

    folder, shape = build(name), VL_SHAPES[name]
    config = json.loads((folder / "config.json").read_text())
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = [made.token_to_id(token) for token in shape.added_tokens]
    assert ids == list(range(512, 522))
    assert config["img_context_token_id"] == made.token_to_id("<IMG_CONTEXT>")
    assert config["llm_config"]["vocab_size"] >= 522
    assert config["llm_config"]["architectures"] == ["LlamaBidirectionalModel"]


def test_the_true_shape_has_the_published_size():
    language, vision, connector = (
        sum(math.prod(size) for name, size in vl_file_sizes(TRUE_VL).items() if name.startswith(x))
        for x in ("language_model.", "vision_model.vision_model.", "mlp1.")
    )
    assert (language, vision, connector) == (1_235_834_880, 428_772_800, 13_644_800)
    assert language + vision + connector == TRUE_VL.parameters == PARAMETERS_1B
    assert language == sum(map(math.prod, text_sizes(TRUE_VL.text).values()))
    assert TRUE_VL.tokens_per_tile == 256


def test_a_text_model_and_the_language_part_share_their_values(build, tmp_path):
    """The same seed gives the text of "nested" and of the text fixture the same layers."""
    from safetensors.numpy import load_file

    from tests.support.checkpoints import build_checkpoint

    text = load_file(build_checkpoint(tmp_path / "t", SHAPES["gqa"], dtype="float32") / FILE)
    both = load_file(build("flat-no-head") / FILE)
    assert all(
        (both[f"language_model.{name}"] == values).all()
        for name, values in text.items()
        if name != "embed_tokens.weight"
    )


def test_pages_and_tiles_repeat():
    first, again, other = (page(seed, 300, 200) for seed in (1, 1, 2))
    assert first.size == (300, 200)
    assert first.mode == "RGB"
    assert first.tobytes() == again.tobytes() != other.tobytes()
    pixels = tiles(1, 3, 32)
    assert pixels.shape == (3, 32, 32, 3)
    assert pixels.dtype == np.uint8
    assert not (pixels[0] == pixels[1]).all()
