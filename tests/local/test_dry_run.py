"""The whole step of a GPU under torch's fake tensors: no wait, no stray copy, counted launches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch._subclasses import fake_tensor

from shared_engine.images.tiles import Picture
from shared_engine.local import attention, device, elementwise, resize, siglip
from shared_engine.local.checkpoint import Checkpoint
from shared_engine.local.config import PixtralConfig, TowerConfig
from shared_engine.local.llama import Encoder
from shared_engine.local.vision import PixtralVision, TiledVision
from tests.support.configs import config
from tests.support.fake_gpu import CUDA, Log, fake_gpu

TOWER = {"hidden_size": 1152, "intermediate_size": 4304, "image_size": 512, "patch_size": 16}
TOWER |= {"num_hidden_layers": 2, "num_attention_heads": 16}
PIXTRAL = {"hidden_size": 1024, "intermediate_size": 4096}
PIXTRAL |= {"num_hidden_layers": 2, "num_attention_heads": 16}
CONTEXT = 7
PAGE = np.zeros((1650, 1275, 3), np.uint8)
UNIFORM = [512] * 32
MIXED = [16, 40, 90, 120, 200, 512] * 10
LAYERS = 2
"""Of the model and of its tower: a layer is like the next."""


def checkpoint(name: str, with_images: bool = False) -> Checkpoint:
    tower = TowerConfig.model_validate({"model_type": "siglip_vision_model", **TOWER})
    return Checkpoint(
        folder=Path(),
        name="dry",
        config=config(name).model_copy(update={"layers": LAYERS}),
        vision=TiledVision(CONTEXT, tower, 12) if with_images else None,
        prompts={},
        max_tokens=8192,
        max_tokens_with_image=10_240,
        dimensions=(2048,),
    )


def run(
    model: Checkpoint,
    lengths: Sequence[int],
    tiles: Sequence[Picture | None] = (),
    dtype: Any = "auto",
    step: int | None = None,
) -> tuple[Log, device.Placement]:
    """Log one step, after one that makes what is made once."""
    (placement,) = device.select_devices("cuda", dtype, step, model.config)
    encoder = Encoder(model, placement)
    ids = [np.full(length, 100, np.int32) for length in lengths]
    for each, picture in zip(ids, tiles or [None] * len(ids), strict=True):
        if picture is not None:
            each[1 : 1 + 256 * len(picture)] = CONTEXT
    encoder(ids[:1], tiles[:1])
    with Log() as log:
        pooled = encoder(ids, tiles)
    assert pooled._means.shape == (len(lengths), 2048)
    assert pooled._means.dtype == torch.float32
    assert pooled._means.device.type == "cpu"
    pooled._arrived.synchronize()
    assert log.findings == []
    return log, placement


@pytest.mark.parametrize("lengths", [[1], [32], [100, 20, 8]])
def test_a_search_is_one_copy_and_one_graph(lengths):
    with fake_gpu():
        log, _ = run(checkpoint("300M"), lengths)
    size = 16 if sum(lengths) <= 16 else 32 if sum(lengths) <= 32 else 128
    assert log.to_device == [4 * (2 * size + 10)]
    assert log.to_host == [4 * 2048 * len(lengths)]
    assert log.launches <= LAYERS * 9 + 12  # all in the graph


def test_many_sequences_have_a_product_for_each_thousand():
    with fake_gpu():
        log, _ = run(checkpoint("300M"), [2] * 3000)
    assert log.kernels["mm"] == 2 * LAYERS + 3


@pytest.mark.parametrize("lengths", [UNIFORM, MIXED, [200], [8192, 3]])
@pytest.mark.parametrize(("name", "step"), [("300M", None), ("1B", 6_144)])
def test_a_step_of_texts(lengths, name, step):
    layers = LAYERS
    with fake_gpu():
        log, placement = run(checkpoint(name), lengths, step=step)
    assert placement.kernel is attention.varlen
    pieces = -(-sum(lengths) // placement.max_batch_tokens)  # of the MLP, of a longer text
    assert log.kernels["attend"] == log.kernels["rotate_"] == layers
    assert log.kernels["gate_"] == layers * pieces
    assert log.kernels["addmm_"] == layers * (1 + pieces)
    assert log.kernels["mm"] == layers * (1 + pieces) + 1  # and one for the means
    assert log.kernels["rms_norm"] == layers * (1 + pieces) + 1
    rest = 3 + 9  # embeddings, cosines, sines; the means
    assert log.launches <= layers * (5 + 4 * pieces) + 1 + rest
    assert len(log.to_device) == 3  # boundaries, ids and positions
    assert sum(log.to_device) == 4 * (2 * sum(lengths) + len(lengths) + 1)
    assert log.to_host == [4 * 2048 * len(lengths)]


def test_a_step_without_triton_launches_torchs_operators():
    with fake_gpu(fused=False):
        log, placement = run(checkpoint("300M"), UNIFORM)
    assert "Triton's kernels are not usable" in placement.reasons
    assert log.launches <= LAYERS * 16 + 13


@pytest.mark.parametrize(("dtype", "capability"), [("float32", (9, 0)), ("auto", (7, 5))])
def test_a_gpu_without_flash_has_one_attention_per_layer(dtype, capability):
    """T4 and V100, and float32 on any GPU: not one call per length, 774 of them in such a step."""
    with fake_gpu(capability=capability):
        log, placement = run(checkpoint("300M"), MIXED, dtype=dtype)
    assert placement.kernel is attention.efficient
    assert placement.dtype == (torch.float32 if dtype == "float32" else torch.float16)
    assert log.kernels["attend"] == LAYERS
    isolating = 8 if placement.dtype == torch.float16 else 0  # the overflow of one from the others
    assert log.launches <= LAYERS * (9 + 2) + 13 + isolating


@pytest.mark.parametrize(("cols", "rows", "tiles"), [(1, 1, 1), (2, 3, 7)])
def test_a_step_of_pages(cols, rows, tiles):
    """The tower takes 8 tiles in one pass."""
    picture = Picture(PAGE, (0, 0, 1275, 1650), cols, rows)
    with fake_gpu():
        log, _ = run(
            checkpoint("1B", with_images=True), [256 * tiles + 8] * 3, [picture, None, picture]
        )
    passes = -(-2 * tiles // 8)
    assert log.kernels["attend"] == LAYERS * (1 + passes)
    pixels = 2 * PAGE.nbytes
    texts = 4 * (2 * 3 * (256 * tiles + 8) + 4)
    places = 8 * 2 * 256 * tiles
    assert sum(log.to_device) == pixels + texts + places
    assert len(log.to_device) == 2 + 3 + 1
    assert log.to_host == [4 * 2048 * 3]


def test_a_step_of_whole_images_is_one_pass():
    """Pixtral: images of any size share the layers of a pass, and nothing waits for the device."""
    tower = PixtralConfig.model_validate(
        {"model_type": "pixtral", "hidden_act": "silu", "patch_size": 14, **PIXTRAL}
    )
    model = replace(checkpoint("1B"), vision=PixtralVision(CONTEXT, tower, 1540))
    images = [np.zeros((1, 28 * rows, 28 * cols, 3), np.uint8) for rows, cols in [(5, 3), (2, 7)]]
    ids = [np.full(50, 100, np.int32) for _ in range(3)]
    ids[0][1:16], ids[2][1:15] = CONTEXT, CONTEXT
    with fake_gpu():
        (placement,) = device.select_devices("cuda", "auto", None, model.config)
        encoder = Encoder(model, placement)
        tiles = [images[0], None, images[1]]
        encoder(ids, tiles)
        with Log() as log:
            encoder(ids, tiles)._arrived.synchronize()
    assert log.findings == []
    assert log.kernels["attend"] == log.kernels["rotate_"] == log.kernels["gate_"] == 2 * LAYERS
    pixels = sum(image.nbytes for image in images)
    assert sum(log.to_device) == pixels + 4 * 3 + 4 * (2 * 150 + 4) + 8 * (15 + 14)
    assert log.to_host == [4 * 2048 * 3]


def test_a_full_step_holds_a_full_pass_of_pages():
    """8 pages of one tile: each 256 tokens of the image, some of the prompt, and 1024 patches."""
    with fake_gpu():
        (placement,) = device.select_devices("cuda", "auto", None, config("1B"))
    assert placement.max_batch_tokens >= 8 * (256 + 16 + 1024 // 2)


def test_a_model_is_warm_when_it_is_loaded(monkeypatch):
    """A full step, and every number of tiles that a pass may have."""
    computed: dict[str, list[int]] = {"_features": [], "_forward": []}

    def watch(owner: type, name: str) -> None:
        method = getattr(owner, name)

        def watched(self: Any, x: torch.Tensor, *rest: Any) -> torch.Tensor:
            computed[name].append(len(x))
            return method(self, x, *rest)

        monkeypatch.setattr(owner, name, watched)

    watch(siglip.VisionTower, "_features")
    watch(Encoder, "_forward")
    with fake_gpu():
        model = checkpoint("1B", with_images=True)
        (placement,) = device.select_devices("cuda", "auto", None, model.config)
        Encoder(model, placement)
    assert computed["_features"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert max(computed["_forward"]) == placement.max_batch_tokens


def test_loading_survives_a_gpu_without_memory_for_a_full_step(monkeypatch):
    compute = mock.Mock(side_effect=RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"))
    monkeypatch.setattr(Encoder, "_compute", compute)
    with fake_gpu():
        (placement,) = device.select_devices("cuda", "auto", None, config("300M"))
        Encoder(checkpoint("300M"), placement)
        compute.side_effect = RuntimeError("CUDA error: no kernel image is available")
        with pytest.raises(RuntimeError, match="no kernel image"):
            Encoder(checkpoint("300M"), placement)


@pytest.mark.parametrize("names", ["cuda:1", "cuda:0,cuda:1"])
def test_each_gpu_is_the_current_one_while_its_kernels_are_chosen(names):
    """Triton launches on the current GPU, wherever its tensors are."""
    current: list[tuple[str, int]] = []

    def note(_: Any, where: Any, *__: Any) -> None:
        current.append((str(where), torch.cuda.current_device()))

    with (
        fake_gpu(count=2),
        mock.patch.object(attention, "_check_kernel", note),
        mock.patch.object(elementwise, "_check_kernels", note),
    ):
        placements = device.select_devices(names, "auto", None, config("300M"))
        assert torch.cuda.current_device() == 0
    assert [str(placement.device) for placement in placements] == names.split(",")
    assert current == [(name, int(name[-1])) for name in names.split(",") for _ in range(2)]
    assert all("Triton's kernels;" in placement.reasons for placement in placements)


def test_a_torch_with_cuda_and_without_a_driver_is_enough(monkeypatch):
    """As the package index gives to a Linux laptop."""

    def fail(*_: Any) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.")

    monkeypatch.setattr(torch.cuda, "_lazy_init", fail)
    monkeypatch.setattr(fake_tensor, "init_gpu_context", fail)
    with fake_gpu():
        torch.cuda._lazy_init()
        run(checkpoint("300M"), UNIFORM)


def test_a_page_is_cut_on_the_device():
    with fake_gpu(), Log() as log:
        cut = resize.cut_on_device(Picture(PAGE, (0, 0, 1275, 1650), 2, 3), 512, CUDA)
    assert (cut.shape, cut.dtype, cut.device) == ((7, 512, 512, 3), torch.uint8, CUDA)
    assert log.findings == []
    assert log.to_device == [PAGE.nbytes]
    assert log.kernels["_upsample_bicubic2d_aa"] == 4  # two axes, of the tiles and the thumbnail


@pytest.mark.parametrize("fused", [True, False], ids=["Triton", "no Triton"])
def test_steps_of_a_gpu_grow_no_buffer(fused):
    """Whatever grows leaves a hole in the device's memory that the next does not fit."""
    with fake_gpu(fused=fused):
        model = checkpoint("1B", with_images=True)
        (placement,) = device.select_devices("cuda", "auto", None, model.config)
        encoder = Encoder(model, placement)
        buffers = [encoder._buffers.mlp, encoder._buffers.hidden, encoder._vision._buffer]
        before = [buffer._memory for buffer in buffers]
        picture = Picture(PAGE, (0, 0, 1275, 1650), 2, 3)
        for lengths in ([5], [2048] * 3, [placement.max_batch_tokens]):
            encoder([np.full(length, 100, np.int32) for length in lengths])
        ids = np.full(7 * 256 + 8, CONTEXT, np.int32)
        ids[-8:] = 100
        encoder([ids] * 3, [picture] * 3)
        for buffer, memory in zip(buffers, before, strict=True):
            assert buffer._memory is memory


@pytest.mark.parametrize(
    ("fault", "finding"),
    [
        (lambda x: torch.masked_select(x, x), "masked_select waits for the device"),
        (lambda x: x.sum().item(), "_local_scalar_dense waits for the device"),
        (lambda x: x.cpu(), "blocks"),
        (lambda x: x.to("cpu", non_blocking=True), "not pinned"),
        (lambda x: x + torch.ones(4), "add mixes devices"),
        (lambda x: torch.ones(4).to(x.device, non_blocking=True), "not pinned"),
        (lambda x: torch.ones(4).pin_memory().to(x.device), "blocks"),
    ],
)
def test_the_log_finds_synchronizations(fault, finding):
    with fake_gpu(), Log() as log:
        x = torch.empty(4, device=CUDA)
        with contextlib.suppress(Exception):  # fake tensors have no values
            fault(x)
    assert any(finding in each for each in log.findings), log.findings
