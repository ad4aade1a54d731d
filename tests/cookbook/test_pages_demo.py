"""The options of `make pages`, and the stand-in that it runs where there is no public model."""

from __future__ import annotations

import doctest
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import demo
import handbook
import numpy as np
import pytest
import rag
import relevance
import sections
from pages import access, app, files, passages
from pages.__main__ import main
from pages.model import DEFAULT
from PIL import Image
from safetensors import safe_open

from cookbook.standin import build_multimodal
from shared_engine import Embedder, EmbeddingInput, Options
from shared_engine.images.pages import open_pages


def turn(picture: Image.Image) -> Image.Image:
    return picture.rotate(2, Image.Resampling.BICUBIC, fillcolor="white")


def crop(picture: Image.Image) -> Image.Image:
    width, height = picture.size
    return picture.crop((width // 50, height // 50, width * 49 // 50, height * 49 // 50))


ALTERATIONS = (Image.Image.copy, turn, crop)  # of a smaller picture


@pytest.fixture(scope="module")
def multimodal(standin: Path) -> Path:
    """The stand-in for images, built around the one for texts."""
    return build_multimodal()


def test_a_key_of_the_environment_sends_nothing_to_the_catalogue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NVIDIA_API_KEY", "nvapi-1")
    monkeypatch.delenv("NVIDIA_BASE_URL", raising=False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    default = replace(DEFAULT, build=lambda: tmp_path)
    assert demo.choose_model(None, default)[0] == {"model": str(tmp_path)}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--max-tiles", "13"], "--max-tiles: invalid choice: 13"),
        (["--limit", "0"], "--limit: expected a number of 1 or more, got '0'"),
    ],
)
def test_an_option_out_of_range_is_an_error(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(args)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", [access, app, demo, files, passages, rag, relevance, sections])
def test_its_examples_hold(module: ModuleType) -> None:
    found = doctest.testmod(module)
    assert found.attempted
    assert not found.failed


def test_the_standin_for_images_is_laid_out_as_the_public_one_and_says_what_it_is(
    multimodal: Path, tmp_path: Path
) -> None:
    again = build_multimodal(tmp_path / "again")
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (again / name).read_bytes() == (multimodal / name).read_bytes()
    with safe_open(again / "model.safetensors", "pt") as file:
        names = list(file.keys())
    for name in (
        "vision_model.vision_model.embeddings.patch_embedding.weight",
        "mlp1.3.weight",
        "language_model.layers.0.self_attn.q_proj.weight",
    ):
        assert name in names
    assert "random" in json.loads((again / "config.json").read_text())["stand_in"]
    assert "random" in (again / "README.md").read_text()
    with Embedder(Options(model=str(multimodal), device="cpu")) as embedder:
        assert "random-vision-standin" in embedder.description

    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="holds something else"):
        build_multimodal(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "source", ["handbook", pytest.param("nvidia-pages", marks=pytest.mark.data("nvidia-pages"))]
)
def test_the_standin_finds_every_page_by_an_altered_picture_of_it(
    multimodal: Path, tmp_path: Path, data: Path, source: str
) -> None:
    if source == "handbook":
        handbook.write(tmp_path)
    pictures, altered = [], []
    for path in sorted((tmp_path if source == "handbook" else data / source).rglob("*.pdf")):
        with open_pages(path) as pages:
            for index in range(len(pages)):
                picture = pages.read(index, "picture").picture
                alter = ALTERATIONS[len(altered) % len(ALTERATIONS)]
                altered.append(alter(picture.reduce(2)))
                pictures.append(picture)
    assert len(pictures) >= 10
    with Embedder(Options(model=str(multimodal), device="cpu")) as embedder:
        stored = embedder.embed([EmbeddingInput(image=picture) for picture in pictures])
        scores = embedder.embed([EmbeddingInput(image=picture) for picture in altered]) @ stored.T
    own = scores.diagonal().copy()
    np.fill_diagonal(scores, -1)
    assert (own - scores.max(axis=1)).min() > 0.005
