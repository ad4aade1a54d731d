"""The vision tower of Nemotron-3.5-Embed: images of any size in, rows of the model's width out.

Pixtral encodes the patches of all images as one matrix (P, hidden) with the layers of Llama; a
patch attends to all patches of its image and no other. Its position is a row and a column. The
connector joins 2 x 2 patches to one row. Attention does not depend on the order of patches, so the
four patches of a token are neighbours here from the beginning.

Source of the arithmetic: transformers' `modeling_pixtral.py` and `modeling_mistral3.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared_engine.local import attention, elementwise
from shared_engine.local.attention import Layout
from shared_engine.local.checkpoint import Checkpoint
from shared_engine.local.config import PIXTRAL_MEAN, PIXTRAL_STD, PixtralConfig
from shared_engine.local.device import Placement
from shared_engine.local.elementwise import rms_norm
from shared_engine.local.layers import LayerNames, Layers, no_pause
from shared_engine.local.memory import Buffers, to_device
from shared_engine.local.vision import PixtralVision
from shared_engine.local.weights import Weights

if TYPE_CHECKING:
    from shared_engine.images.tiles import Tiles

_NAMES = LayerNames("attention_norm", "attention", "ffn_norm", "feed_forward")
_WARM_SIDE = 32
"""Patches along a side of the image of the warm-up on a GPU."""


class PixtralTower:
    """The tower and connector on one device. Not thread-safe: the encoder's thread owns it."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights, placement: Placement) -> None:
        vision, config = checkpoint.vision, checkpoint.config
        assert isinstance(vision, PixtralVision)
        tower = vision.tower
        self._device, self._dtype = placement.device, placement.dtype
        self._patch, self._count_patches = tower.patch_size, vision.count_patches
        self._buffers = Buffers(placement)
        kernel, _ = attention.select_kernel(placement.device, placement.dtype, tower)
        operators, _ = elementwise.select(placement.device, placement.dtype, tower)
        self._layers = Layers(
            weights,
            "vision_tower.transformer.",
            tower,
            replace(placement, kernel=kernel, elementwise=operators),
            _NAMES,
        )
        hidden, out = tower.hidden_size, config.hidden_size
        patch = weights("vision_tower.patch_conv.weight", hidden, 3, self._patch, self._patch)
        self._embed = patch.flatten(1)  # (hidden, 3 * p * p)
        self._first_norm = weights("vision_tower.ln_pre.weight", hidden)
        at = "multi_modal_projector"
        self._connector_norm = weights(f"{at}.norm.weight", hidden)
        self._connector_eps = config.rms_norm_eps
        merge = weights(f"{at}.patch_merger.merging_layer.weight", hidden, 4 * hidden)
        # Its input is ordered by channel, then by patch; ours by patch, then by channel.
        self._merge = merge.view(hidden, hidden, 4).transpose(1, 2).flatten(1)
        self._up = weights(f"{at}.linear_1.weight", out, hidden)
        self._down = weights(f"{at}.linear_2.weight", out, out)
        most = 2 * math.ceil(vision.longest_edge / vision.token_size)  # patches along a side
        angles = torch.arange(most)[:, None, None] * _frequencies(tower)  # (most, 2, d / 4)
        self._angles = angles.to(placement.device)
        self._mean = (255 * torch.tensor(PIXTRAL_MEAN)).to(placement.device)
        self._std = (255 * torch.tensor(PIXTRAL_STD)).to(placement.device)

    def __call__(self, images: Sequence[Tiles], on_pause: Callable[[], None] = no_pause) -> Tensor:
        """Return the rows of all images in order: (rows, width), one for 2 x 2 patches.

        Rows of an image are ordered from left to right, then from top to bottom.

        Args:
            images: Pixels (1, height, width, 3) of each image.
            on_pause: Called twice in every layer; it may call this tower.
        """
        pixels = [to_device(np.asarray(image)[0], self._device) for image in images]
        patches = torch.cat([self._cut(each) for each in pixels])
        angles = torch.cat([self._angles_of(each) for each in pixels])  # (P, d / 2)
        lengths, count = [self._count_patches(image) for image in images], len(patches)
        if padding := self._layers.count_padding(count):
            # Separate sequences, as in the encoder.
            patches, angles = (F.pad(rows, (0, 0, 0, padding)) for rows in (patches, angles))
            lengths += [1] * padding
        ends = to_device(np.cumsum([0, *lengths]).astype(np.int32), self._device)
        x = F.linear(patches, self._embed)  # (P, hidden)
        float32 = partial(x.new_empty, dtype=torch.float32)
        x = rms_norm(x, self._first_norm, self._layers.eps, x.new_empty, float32)
        rotation = angles.cos().to(self._dtype), angles.sin().to(self._dtype)
        self._layers(x, rotation, Layout(lengths, ends), self._buffers, on_pause=on_pause)
        return self._connect(x)[: count // 4]

    def warm_up(self) -> None:
        """Compute an image."""
        side = self._patch * min(_WARM_SIDE, len(self._angles))
        self([np.zeros((1, side, side, 3), np.uint8)])

    def _cut(self, pixels: Tensor) -> Tensor:
        """Return the normalized pixels of every patch, by channel: (h * w, 3 * p * p)."""
        height, width, _ = pixels.shape
        p = self._patch
        normal = (pixels.float() - self._mean) / self._std
        grid = normal.to(self._dtype).view(height // (2 * p), 2, p, width // (2 * p), 2, p, 3)
        return grid.permute(0, 3, 1, 4, 6, 2, 5).reshape(-1, 3 * p * p)

    def _angles_of(self, pixels: Tensor) -> Tensor:
        """Return the angles of every patch in the same order: (h * w, d / 2).

        The first half are of its row, the second of its column.
        """
        height, width = (side // self._patch for side in pixels.shape[:2])
        rows = self._angles[:height, 0].view(height // 2, 1, 2, 1, -1)
        columns = self._angles[:width, 1].view(1, width // 2, 1, 2, -1)
        shape = (height // 2, width // 2, 2, 2, -1)
        return torch.cat([rows.expand(shape), columns.expand(shape)], dim=-1).flatten(0, 3)

    def _connect(self, features: Tensor) -> Tensor:
        """Join 2 x 2 patches to one row and project it: (P, hidden) to (P / 4, width)."""
        normed = rms_norm(
            features, self._connector_norm, self._connector_eps,
            self._buffers.hidden, self._buffers.float32,
        )  # fmt: skip
        rows = F.linear(normed.view(len(features) // 4, -1), self._merge)
        return F.linear(F.gelu(F.linear(rows, self._up)), self._down)


def _frequencies(tower: PixtralConfig) -> Tensor:
    """Return the frequencies of rows and of columns, (2, d / 4): every second one each."""
    exponents = torch.arange(0, tower.head_dim, 2, dtype=torch.float32) / tower.head_dim
    return (1.0 / tower.rope.theta**exponents).view(-1, 2).T
