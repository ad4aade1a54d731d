"""A cache of encoded images, which do not depend on the query that a reranker scores them for."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from shared_engine.images.tiles import Tiles
    from shared_engine.local.vision import VisionConfig


@dataclass(eq=False)
class KeyedImage:
    """An image whose rows are kept."""

    tiles: Tiles
    key: bytes = field(init=False)
    """A digest of all that the vision tower reads of the image."""

    def __post_init__(self) -> None:
        tiles = self.tiles
        if isinstance(tiles, np.ndarray):
            pixels, grid = tiles, None
        else:
            pixels, grid = tiles.pixels, (tiles.box, tiles.cols, tiles.rows)
        digest = hashlib.blake2b(repr((pixels.shape, grid)).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        self.key = digest.digest()


class VisionCache:
    """Rows of images by key, the least recently used dropped first. Not thread-safe."""

    def __init__(self, vision: VisionConfig) -> None:
        self._most_bytes = vision.cache_bytes
        self._count_patches = vision.count_patches
        self._rows: OrderedDict[bytes, Tensor] = OrderedDict()
        self._size = 0

    def __call__(
        self,
        images: Sequence[Tiles | KeyedImage],
        encode: Callable[[Sequence[Tiles]], Tensor],
    ) -> Tensor:
        """Return the rows of all images, and encode the images that the cache does not have.

        Args:
            encode: The vision tower: from images to their rows, one for 2 x 2 patches.
        """
        keys = [image.key if isinstance(image, KeyedImage) else None for image in images]
        found = [self._rows.get(key) if key else None for key in keys]
        missing = [image for image, rows in zip(images, found, strict=True) if rows is None]
        tiles = [image.tiles if isinstance(image, KeyedImage) else image for image in missing]
        sizes = [self._count_patches(image) // 4 for image in tiles]
        encoded = iter(torch.split(encode(tiles), sizes) if tiles else ())
        out = [next(encoded) if rows is None else rows for rows in found]
        for key, rows in zip(keys, out, strict=True):
            if key:
                self._keep(key, rows)
        return torch.cat(out)

    def _keep(self, key: bytes, rows: Tensor) -> None:
        if key in self._rows:
            self._rows.move_to_end(key)
        elif rows.nbytes <= self._most_bytes:
            self._rows[key] = rows.clone()  # not a view, which keeps the rows of a whole step
            self._size += rows.nbytes
        while self._size > self._most_bytes:
            _, dropped = self._rows.popitem(last=False)
            self._size -= dropped.nbytes
