"""The vision tower: tiles of images in, rows of the language model's width out.

SigLIP 2 encodes tiles of one size; a patch attends to all patches of its tile and no other. The
connector joins 2 x 2 patches of the normalized output to one row, and applies two linear layers.
N is the number of tiles of a forward pass, P of patches of a tile, g of patches along its side,
p the side of a patch in pixels.

Source of the arithmetic: `LlamaNemotronVLModel` of the public checkpoint, after NVIDIA-NeMo/
Automodel `llama_nemotron_vl/model.py`, and transformers' `modeling_siglip.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from shared_engine.local.checkpoint import Checkpoint
from shared_engine.local.device import Placement
from shared_engine.local.layers import no_pause
from shared_engine.local.memory import Buffer, to_device
from shared_engine.local.resize import cut_on_device
from shared_engine.local.vision import TiledVision
from shared_engine.local.weights import Weights

if TYPE_CHECKING:
    from shared_engine.images.tiles import Tiles

_CONNECTOR_EPS = 1e-5
_MAX_TILES = 8
"""Maximum number of tiles of a forward pass. For each number of tiles, cuDNN plans attention, which
takes 23 to 440 ms (published figures). More than 8 tiles do not use a GPU better (estimated)."""


@dataclass(frozen=True)
class Affine:
    """Weight and bias of a linear layer or a norm."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True)
class SiglipLayer:
    """Weights of one layer; the projections of q, k and v share one matrix."""

    attention_norm: Affine  # (hidden,)
    qkv: Affine  # (3 * hidden, hidden)
    out: Affine  # (hidden, hidden)
    mlp_norm: Affine  # (hidden,)
    up: Affine  # (intermediate, hidden)
    down: Affine  # (hidden, intermediate)


class VisionTower:
    """The tower and connector on one device. Not thread-safe: the encoder's thread owns it."""

    def __init__(self, checkpoint: Checkpoint, weights: Weights, placement: Placement) -> None:
        vision = checkpoint.vision
        assert isinstance(vision, TiledVision)
        tower = vision.tower
        self._device, self._dtype = placement.device, placement.dtype
        self._patch = tower.patch_size
        self._side = vision.patches_per_side
        self._heads, self._eps = tower.heads, tower.layer_norm_eps
        self._buffer = Buffer(placement)
        # A patch costs about half of a token.
        fitting = 2 * placement.max_batch_tokens // vision.patches_per_tile
        self._tiles_per_pass = max(1, min(_MAX_TILES, fitting))
        if placement.device.type == "cuda":
            patches = vision.patches_per_tile * self._tiles_per_pass
            self._buffer.reserve(patches, max(3 * tower.hidden_size, tower.intermediate_size))
        hidden, inner = tower.hidden_size, tower.intermediate_size
        at = "vision_model.embeddings"
        patch = weights(f"{at}.patch_embedding.weight", hidden, 3, self._patch, self._patch)
        self._embed = Affine(patch.flatten(1), weights(f"{at}.patch_embedding.bias", hidden))
        self._positions = weights(
            f"{at}.position_embedding.weight", vision.patches_per_tile, hidden
        )
        self._layers = [
            _layer(weights, f"vision_model.encoder.layers.{n}", hidden, inner)
            for n in range(tower.layers)
        ]
        self._norm = _read(weights, "vision_model.post_layernorm", hidden)
        out = checkpoint.config.hidden_size
        self._connector_norm = _read(weights, "mlp1.0", 4 * hidden)
        self._connector_up = _read(weights, "mlp1.1", out, 4 * hidden)
        self._connector_down = _read(weights, "mlp1.3", out, out)

    def __call__(self, images: Sequence[Tiles], on_pause: Callable[[], None] = no_pause) -> Tensor:
        """Return the rows of all images in order: (rows, width), P / 4 for each tile.

        Rows of a tile are ordered from left to right, then from top to bottom. Tiles of several
        images share a forward pass.

        Args:
            images: Tiles (n, size, size, 3), or pictures to cut on the device.
            on_pause: Called twice in every layer; it may call this tower.
        """
        tiles = torch.cat([self._tiles(image) for image in images])  # (n, size, size, 3)
        passes = torch.split(tiles, self._tiles_per_pass)
        return torch.cat(
            [self._connect(self._features(self._patches(each), on_pause)) for each in passes]
        )

    def warm_up(self) -> None:
        """Compute a pass of each number of tiles."""
        size = self._side * self._patch
        for count in range(1, self._tiles_per_pass + 1):
            self([np.zeros((count, size, size, 3), np.uint8)])

    def _tiles(self, image: Tiles) -> Tensor:
        if isinstance(image, np.ndarray):
            return to_device(image, self._device)
        return cut_on_device(image, self._side * self._patch, self._device)

    def _patches(self, tiles: Tensor) -> Tensor:
        """Return the pixels of every patch, by channel, from -1 to 1: (N, P, 3 * p * p)."""
        n, g, p = len(tiles), self._side, self._patch
        pixels = tiles.view(n, g, p, g, p, 3)
        patches = pixels.permute(0, 1, 3, 5, 2, 4).reshape(n, g * g, 3 * p * p)
        return patches.float().div_(127.5).sub_(1).to(self._dtype)

    def _features(self, patches: Tensor, on_pause: Callable[[], None]) -> Tensor:
        x = F.linear(patches, self._embed.weight, self._embed.bias) + self._positions
        n, p, hidden = x.shape
        x = x.view(n * p, hidden)
        for layer in self._layers:
            on_pause()  # the buffer holds no data that is read later
            qkv = self._linear(self._normed(x, layer.attention_norm), layer.qkv)
            q, k, v = qkv.view(n, p, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v)  # (N, heads, P, d)
            flat = attended.transpose(1, 2).reshape(x.shape)
            x.addmm_(flat, layer.out.weight.T).add_(layer.out.bias)
            on_pause()
            up = self._linear(self._normed(x, layer.mlp_norm), layer.up)
            torch.ops.aten.gelu_(up, approximate="tanh")
            x.addmm_(up, layer.down.weight.T).add_(layer.down.bias)
        return self._normed(x, self._norm)  # (N * P, hidden)

    def _linear(self, x: Tensor, layer: Affine) -> Tensor:
        """Return x (rows, in) times the weight plus the bias, in the buffer: (rows, out)."""
        out = self._buffer(len(x), len(layer.weight))
        return torch.addmm(layer.bias, x, layer.weight.T, out=out)

    def _connect(self, features: Tensor) -> Tensor:
        """Join 2 x 2 patches to one row and project it: (N * P, hidden) to (N * P / 4, width)."""
        g = self._side
        squares = features.view(-1, g // 2, 2, g // 2, 2, features.shape[1])
        rows = squares.permute(0, 1, 3, 2, 4, 5).reshape(len(features) // 4, -1)  # 4 * hidden wide
        norm = self._connector_norm
        rows = F.layer_norm(rows, norm.weight.shape, norm.weight, norm.bias, _CONNECTOR_EPS)
        rows = F.gelu(F.linear(rows, self._connector_up.weight, self._connector_up.bias))
        return F.linear(rows, self._connector_down.weight, self._connector_down.bias)

    def _normed(self, x: Tensor, norm: Affine) -> Tensor:
        return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, self._eps)


def _layer(weights: Weights, at: str, hidden: int, inner: int) -> SiglipLayer:
    projections = [_read(weights, f"{at}.self_attn.{name}_proj", hidden, hidden) for name in "qkv"]
    return SiglipLayer(
        attention_norm=_read(weights, f"{at}.layer_norm1", hidden),
        qkv=Affine(
            torch.cat([projection.weight for projection in projections]),
            torch.cat([projection.bias for projection in projections]),
        ),
        out=_read(weights, f"{at}.self_attn.out_proj", hidden, hidden),
        mlp_norm=_read(weights, f"{at}.layer_norm2", hidden),
        up=_read(weights, f"{at}.mlp.fc1", inner, hidden),
        down=_read(weights, f"{at}.mlp.fc2", hidden, inner),
    )


def _read(weights: Weights, name: str, *shape: int) -> Affine:
    return Affine(weights(f"{name}.weight", *shape), weights(f"{name}.bias", shape[0]))
