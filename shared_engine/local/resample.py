"""Pillow's bicubic resize on a GPU, to the last bit, so that the cores have only to decode.

Pillow resizes images of 8 bits in two passes, of rows and of columns. A result is a sum of pixels
times integers of 22 bits, rounded to 8. In float64 such sums are exact in whatever order, so here
each pass is a few small matrix products, and equal.

Source: `precompute_coeffs`, `normalize_coeffs_8bpc` and `ImagingResampleInner` of Pillow's
Resample.c.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import PIL
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_engine.images.tiles import Picture, arrange_tiles
from shared_engine.local.device import to_device

_BITS = 22
"""Of the fraction of a coefficient, Pillow's PRECISION_BITS."""
_COLUMNS_FIRST = int(PIL.__version__.partition(".")[0]) >= 13
"""Whether Pillow may begin with the columns, which gives other roundings."""
_BLOCK = 32
"""Neighbouring pixels of the result that share a matrix product; they see almost the same ones."""


def tiles(picture: Picture, size: int, device: torch.device) -> Tensor:
    """Return the tiles of a picture, the thumbnail last: (n, size, size, 3) uint8 on the device.

    The values are those of `images.tiles`.
    """
    pixels = to_device(picture.pixels, device)
    pixels = pixels.view(*pixels.shape[:2], -1).double()  # (H, W, 1 or 3)

    def resized(width: int, height: int) -> Tensor:
        return resize(pixels, picture.box, width, height).expand(height, width, 3)

    cut: Tensor = arrange_tiles(resized(picture.cols * size, picture.rows * size), size)
    return cut if len(cut) == 1 else torch.cat([cut, resized(size, size)[None]])


def resize(
    pixels: Tensor, box: tuple[float, float, float, float], width: int, height: int
) -> Tensor:
    """Return the box (left, upper, right, lower) of pixels (H, W, C), from 0 to 255, resized.

    (height, width, C) uint8. `pixels` are float64.
    """
    left, upper, right, lower = box

    def narrowed(pixels: Tensor) -> Tensor:  # to (H, width, C)
        columns = pixels.transpose(0, 1)
        out = _resized(columns.flatten(1), left, right, width)
        return out.view(width, *columns.shape[1:]).transpose(0, 1)

    def shortened(pixels: Tensor) -> Tensor:  # to (height, W, C)
        return _resized(pixels.flatten(1), upper, lower, height).view(height, *pixels.shape[1:])

    lost, lost_height = pixels.shape[1] - width, pixels.shape[0] - height
    if _COLUMNS_FIRST and lost_height > max(0, 2 * lost):
        pixels = narrowed(shortened(pixels))
    else:
        pixels = shortened(narrowed(pixels))
    return pixels.to(torch.uint8)


def _resized(lines: Tensor, start: float, stop: float, count: int) -> Tensor:
    """Resize lines (n, M) between `start` and `stop` to (count, M)."""
    start, stop = float(np.float32(start)), float(np.float32(stop))  # as Pillow takes them
    if (start, stop, count) == (0, len(lines), len(lines)):
        return lines
    sources, matrices = _plan(len(lines), start, stop, count, lines.device)
    sums = torch.bmm(matrices, lines[sources]).flatten(0, 1)[:count]
    return sums.add_(1 << (_BITS - 1)).div_(1 << _BITS).floor_().clamp_(0, 255)


@lru_cache(maxsize=32)
def _plan(
    n: int, start: float, stop: float, count: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the lines that each block of results is made of, (B, L), and how, (B, block, L)."""
    first, coefficients = _coefficients(n, start, stop, count)  # (count,), (count, taps)
    taps = coefficients.shape[1]
    blocks = -(-count // _BLOCK)
    starts = first[::_BLOCK]  # (B,)
    offsets = first - np.repeat(starts, _BLOCK)[:count]  # (count,)
    length = int(offsets.max()) + taps
    matrices = np.zeros((blocks * _BLOCK, length))
    np.put_along_axis(
        matrices[:count], offsets[:, None] + np.arange(taps), coefficients.astype(float), axis=1
    )
    sources = np.minimum(starts[:, None] + np.arange(length), n - 1)  # past the end by a zero
    return (
        to_device(sources, device),
        to_device(matrices.reshape(blocks, _BLOCK, length), device),
    )


def _coefficients(
    n: int, start: float, stop: float, count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return, for each pixel of the result, the first of `n` it is made of, and all its weights.

    (count,) and (count, taps); the weights are multiples of 2 ** -22, and zero where there is none.
    """
    scale = float(np.float32(stop) - np.float32(start)) / count
    stretch = max(scale, 1.0)  # a smaller image sees more pixels, a larger one no fewer than four
    support = 2.0 * stretch
    taps = math.ceil(support) * 2 + 1
    centers = start + (np.arange(count) + 0.5) * scale
    first = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    last = np.minimum((centers + support + 0.5).astype(np.int64), n)
    seen = first[:, None] + np.arange(taps)  # (count, taps)
    weights = _bicubic((seen - centers[:, None] + 0.5) * (1.0 / stretch))
    weights[seen >= last[:, None]] = 0.0
    total = weights.cumsum(axis=1)[:, -1:]  # one after the other: the order decides the last bits
    scaled = weights / total * (1 << _BITS)
    return first, np.trunc(scaled + np.copysign(0.5, scaled)).astype(np.int64)


def _bicubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * -0.5
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
