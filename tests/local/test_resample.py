"""Tiles that a device cuts are those that Pillow cuts, to the last bit."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared_engine import Document, Embedder, Options, PartialResultError, images
from shared_engine.images import tiles as image_tiles
from shared_engine.local import resample
from tests.support.vl_checkpoints import build_vl_checkpoint, page

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)
SHAPES = [
    ((1275, 1650), (512, 512)),
    ((1275, 1650), (1024, 1536)),
    ((512, 700), (512, 512)),  # one pass
    ((512, 512), (512, 512)),  # none
    ((60, 100), (512, 512)),  # larger
    ((400, 2000), (512, 64)),  # larger and smaller; columns first since Pillow 13
    ((2000, 300), (256, 512)),
    ((1, 1), (64, 64)),
    ((3000, 1), (64, 64)),
    *[
        (tuple(RANDOM.integers(1, 1200, 2).tolist()), tuple(RANDOM.integers(1, 900, 2).tolist()))
        for _ in range(40)
    ],
]


def noise(width: int, height: int) -> Image.Image:
    """Every value from 0 to 255, so that sums overshoot at both ends."""
    return Image.fromarray(RANDOM.integers(0, 256, (height, width, 3), dtype=np.uint8))


def file(picture: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(("sides", "wanted"), SHAPES, ids=str)
def test_a_resize_is_pillows(sides, wanted):
    picture = noise(*sides)
    part = (0.0, 0.0, sides[0] - 0.3 * min(sides[0], 2), sides[1] - 0.7 * min(sides[1], 1))
    for box in ((0.0, 0.0, *sides), part):
        expected = np.asarray(picture.resize(wanted, Image.Resampling.BICUBIC, box))
        ours = resample.resize(torch.tensor(np.array(picture)).double(), box, *wanted)
        assert np.array_equal(ours.numpy(), expected)


@pytest.mark.parametrize("max_tiles", [1, 2, 6])
@pytest.mark.parametrize(
    "source",
    [
        file(page(0, 1275, 1650)),
        file(page(1, 1275, 1650), "JPEG"),
        file(page(2, 4000, 3000), "JPEG"),  # decoded at a half
        file(page(3, 300, 2900).convert("L")),
        file(page(4, 90, 60).convert("RGBA"), "TIFF"),
        page(5, 700, 30),
    ],
    ids=["png", "jpeg", "draft", "grey", "alpha", "pil"],
)
def test_the_tiles_of_a_picture_are_those_that_pillow_cuts(source, max_tiles):
    expected = images.cut_tiles(source, max_tiles, 64)
    picture = images.decode_picture(source, max_tiles, 64)
    assert isinstance(picture, images.Picture)
    assert len(picture) == len(expected)
    assert np.array_equal(resample.tiles(picture, 64, CPU).numpy(), expected)


def test_a_very_large_picture_does_not_wait_for_a_device(monkeypatch):
    monkeypatch.setattr(image_tiles, "_LARGEST_PICTURE", 200 * 100)
    assert isinstance(images.decode_picture(page(0, 200, 100), 2, 64), images.Picture)
    cut = images.decode_picture(page(0, 201, 100), 2, 64)
    assert np.array_equal(cut, images.cut_tiles(page(0, 201, 100), 2, 64))


def test_vectors_do_not_tell_who_cut_the_tiles(tmp_path: Path, monkeypatch):
    folder = build_vl_checkpoint(tmp_path / "vl")
    sides = [(200, 100), (60, 170), (31, 97), (640, 480)]
    documents = [Document(image=page(seed, *size)) for seed, size in enumerate(sides)]
    documents += [Document("hello"), Document("a caption", page(9, 100, 100))]
    with Embedder(Options(model=folder, device="cpu", dtype="float32", max_tiles=3)) as embedder:
        expected = embedder.embed(documents)
        monkeypatch.setattr(embedder._backend, "_cuts_on_device", True)
        cut = []
        monkeypatch.setattr(
            resample, "tiles", lambda *given, tiles=resample.tiles: cut.append(1) or tiles(*given)
        )
        monkeypatch.setattr(image_tiles, "_LARGEST_PICTURE", 640 * 479)
        assert np.abs(embedder.embed(documents) - expected).max() <= 1e-6
        assert len(cut) == 4  # the largest came as tiles
        with pytest.raises(PartialResultError) as failed:
            embedder.embed([documents[0], Document(image=b"no image"), documents[4]])
        assert list(failed.value.errors) == [1]
        assert np.abs(failed.value.vectors[[0, 2]] - expected[[0, 4]]).max() <= 1e-6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("max_tiles", [1, 2, 6])
def test_a_gpu_cuts_the_tiles_that_pillow_cuts(max_tiles):
    for sides in ((1275, 1650), (60, 100), (400, 2000)):
        image = noise(*sides)
        picture = images.decode_picture(image, max_tiles)
        cut = resample.tiles(picture, 512, torch.device("cuda")).cpu()
        assert np.array_equal(cut.numpy(), images.cut_tiles(image, max_tiles))
