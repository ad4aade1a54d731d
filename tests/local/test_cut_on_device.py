"""Tiles that a device cuts are those that Pillow cuts, to a level of 255 here and there."""

from __future__ import annotations

import threading
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shared_engine import Embedder, EmbeddingInput, Options, PartialResultError, images
from shared_engine.images import tiles as image_tiles
from shared_engine.local import resize, siglip
from tests.support.vl_checkpoints import build_vl_checkpoint, page

CPU = torch.device("cpu")
RANDOM = np.random.default_rng(0)
SHAPES = [
    ((1275, 1650), (512, 512)),
    ((1275, 1650), (1024, 1536)),
    ((512, 700), (512, 512)),  # one pass
    ((512, 512), (512, 512)),  # none
    ((60, 100), (512, 512)),  # larger
    ((400, 2000), (512, 64)),  # larger and smaller; Pillow 13 begins with the height
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


def check_levels(ours: np.ndarray, expected: np.ndarray, share: float = 2e-3) -> None:
    """Values are equal but for a level in a few of a thousand, or two in an enlarged image."""
    assert ours.shape == expected.shape
    assert ours.dtype == expected.dtype == np.uint8
    apart = np.abs(ours.astype(int) - expected)
    assert apart.max() <= 2
    assert (apart == 2).sum() <= 1e-4 * apart.size
    assert (apart > 0).sum() <= max(1, share * apart.size)


@pytest.mark.parametrize(("sides", "wanted"), SHAPES, ids=str)
def test_a_resize_equals_pillow(sides, wanted):
    picture = noise(*sides)
    planes = torch.tensor(np.array(picture)).permute(2, 0, 1)[None].float()
    boxes = [(0.0, 0.0, *map(float, sides))]
    if (
        min(side / want for side, want in zip(sides, wanted, strict=True)) >= 2
    ):  # as of a JPEG's draft
        boxes.append((0.0, 0.0, sides[0] - 0.3, sides[1] - 0.7))
    for box in boxes:
        expected = np.asarray(picture.resize(wanted, Image.Resampling.BICUBIC, box))
        ours = resize._resize(planes, box, *wanted)[0].permute(1, 2, 0).to(torch.uint8)
        check_levels(ours.numpy(), expected, share=5e-3)


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
    assert isinstance(picture, image_tiles.Picture)
    assert len(picture) == len(expected)
    check_levels(resize.cut_on_device(picture, 64, CPU).numpy(), expected)


def test_a_very_large_picture_does_not_wait_for_a_device(monkeypatch):
    monkeypatch.setattr(image_tiles, "_LARGEST_PICTURE", 200 * 100)
    assert isinstance(images.decode_picture(page(0, 200, 100), 2, 64), image_tiles.Picture)
    cut = images.decode_picture(page(0, 201, 100), 2, 64)
    assert np.array_equal(cut, images.cut_tiles(page(0, 201, 100), 2, 64))


@pytest.mark.slow
def test_vectors_do_not_depend_on_where_tiles_are_cut(tmp_path: Path, monkeypatch):
    """Tiles of the true size: what a level in a few values does to a vector is below 1e-4."""
    folder = build_vl_checkpoint(tmp_path / "vl", image_size=512, patch_size=32)
    pages = [page(seed, 1275, 1650) for seed in range(3)]
    pages += [file(page(3, 2550, 3300), "JPEG"), page(4, 300, 2900).convert("L")]
    documents = [EmbeddingInput(image=each) for each in pages]
    documents += [EmbeddingInput("hello"), EmbeddingInput("a caption", page(9, 1000, 1000))]
    with Embedder(Options(model=folder, device="cpu", dtype="float32", max_tiles=6)) as embedder:
        expected = embedder.embed(documents)
        monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)  # pinning needs a GPU
        monkeypatch.setattr(embedder.load(), "_cuts_on_device", True)
        cut = []
        real = siglip.cut_on_device
        monkeypatch.setattr(siglip, "cut_on_device", lambda *given: cut.append(1) or real(*given))
        monkeypatch.setattr(image_tiles, "_LARGEST_PICTURE", 1275 * 1650)
        assert np.abs(embedder.embed(documents) - expected).max() <= 1e-4
        assert len(cut) == 5  # the largest came as tiles
        with pytest.raises(PartialResultError) as failed:
            embedder.embed([documents[0], EmbeddingInput(image=b"no image"), documents[4]])
        assert list(failed.value.errors) == [1]
        assert np.abs(failed.value.vectors[[0, 2]] - expected[[0, 4]]).max() <= 1e-4


def test_vectors_do_not_depend_on_the_passes_of_the_tower(tmp_path: Path, monkeypatch):
    """A pass has at most 8 tiles: cuDNN plans attention for each number of tiles."""
    folder = build_vl_checkpoint(tmp_path / "vl")
    documents = [EmbeddingInput(image=page(seed, 90, 40 + 30 * seed)) for seed in range(5)]
    expected = None
    passes: list[int] = []
    features = siglip.VisionTower._features

    def counted(
        self: siglip.VisionTower, patches: torch.Tensor, on_pause: Callable[[], None]
    ) -> torch.Tensor:
        passes.append(len(patches))
        return features(self, patches, on_pause)

    monkeypatch.setattr(siglip.VisionTower, "_features", counted)
    for max_batch_tokens, most in ((8, 1), (24, 3), (32, 4), (8192, 8)):
        passes.clear()
        options = Options(model=folder, max_tiles=6, max_batch_tokens=max_batch_tokens)
        with Embedder(options) as embedder:
            got = embedder.embed(documents)
        expected = got if expected is None else expected
        assert np.abs(got - expected).max() <= 1e-6
        assert max(passes) <= most
    passes.clear()
    with Embedder(Options(model=folder, max_batch_tokens=8192)) as embedder:
        embedder.wait_until_ready()
        tower = embedder.load()._encoders[0]._vision
        with torch.inference_mode():
            tower([np.zeros((20, 32, 32, 3), np.uint8)])
    assert passes == [8, 8, 4]


def test_images_are_pinned_by_the_threads_that_prepare_them(tmp_path: Path, monkeypatch):
    """A step of pages has 44 MB, which would cost the one thread that computes 4 to 9 ms."""
    pinned: list[tuple[str, tuple[int, ...]]] = []

    def pin_memory(x: torch.Tensor) -> torch.Tensor:
        pinned.append((threading.current_thread().name, tuple(x.shape)))
        return x.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(image_tiles, "_LARGEST_PICTURE", 300 * 300)
    options = Options(model=build_vl_checkpoint(tmp_path / "vl"), max_tiles=2, device="cpu")
    documents = [EmbeddingInput(image=noise(side, side)) for side in (300, 310)]
    with Embedder(options) as embedder:
        expected = embedder.embed(documents)
        assert pinned == []
        monkeypatch.setattr(embedder.load(), "_cuts_on_device", True)
        assert np.abs(embedder.embed(documents) - expected).max() <= 1e-4
    assert all(name.startswith("nemoretriever-prepare-") for name, _ in pinned)
    assert (300, 300, 3) in [shape for _, shape in pinned]
    assert len(pinned) == 2  # the larger one as tiles


def test_a_resize_is_given_planes_that_a_gpus_kernel_need_not_copy(monkeypatch):
    given: list[bool] = []
    resize_axes = torch.ops.aten._upsample_bicubic2d_aa

    def watched(x: torch.Tensor, *rest: object) -> torch.Tensor:
        given.append(x.is_contiguous())
        return resize_axes(x, *rest)

    monkeypatch.setattr(torch.ops.aten, "_upsample_bicubic2d_aa", watched)
    resize.cut_on_device(images.decode_picture(noise(300, 400), 6), 64, CPU)
    assert given == [True] * 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("max_tiles", [1, 2, 6])
def test_a_gpu_cuts_the_tiles_that_pillow_cuts(max_tiles):
    for sides in ((1275, 1650), (60, 100), (400, 2000)):
        image = noise(*sides)
        picture = images.decode_picture(image, max_tiles)
        cut = resize.cut_on_device(picture, 512, torch.device("cuda")).cpu()
        check_levels(cut.numpy(), images.cut_tiles(image, max_tiles))
