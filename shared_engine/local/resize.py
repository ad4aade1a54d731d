"""Tiles of an image cut on the device, with Pillow's bicubic filter."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from shared_engine.local.memory import to_device

if TYPE_CHECKING:
    from shared_engine.images.tiles import Picture


def cut_on_device(picture: Picture, size: int, device: torch.device) -> Tensor:
    """Return the tiles of a picture, the thumbnail last: (n, size, size, 3) uint8 on the device.

    They are those of `images.cut_tiles`, but for a level of 255 in a few values per thousand, where
    a sum in float32 falls on the other side of a rounding.
    """
    from shared_engine.images.tiles import arrange_tiles

    pixels = to_device(picture.pixels, device)  # (H, W) or (H, W, 3)
    planes = pixels.view(*pixels.shape[:2], -1).permute(2, 0, 1)[None]  # (1, C, H, W)
    # The kernel of a GPU would copy to this layout and back for each axis.
    planes = planes.to(torch.float32, memory_format=torch.contiguous_format)

    def resize(width: int, height: int) -> Tensor:
        small = _resize(planes, picture.box, width, height)[0].permute(1, 2, 0)
        return small.to(torch.uint8).expand(height, width, 3)  # grey has one channel up to here

    cut: Tensor = arrange_tiles(resize(picture.cols * size, picture.rows * size), size)
    return cut if len(cut) == 1 else torch.cat([cut, resize(size, size)[None]])


def _resize(
    planes: Tensor, box: tuple[float, float, float, float], width: int, height: int
) -> Tensor:
    """Resize what the box shows of planes (1, C, H, W) from 0 to 255 to (1, C, height, width).

    As Pillow does for 8 bits: one axis after the other, and whole numbers in between. The box
    begins in the upper left corner.
    """
    from shared_engine.images.tiles import takes_height_first

    rows, columns = planes.shape[2:]
    shown_width, shown_height = box[2:]

    def resize_axis(x: Tensor, size: list[int], scales: tuple[float, float]) -> Tensor:
        if list(x.shape[2:]) == size:
            return x
        x = torch.ops.aten._upsample_bicubic2d_aa(x, size, False, *scales)
        return x.round_().clamp_(0, 255)

    def narrow(x: Tensor) -> Tensor:
        return resize_axis(x, [x.shape[2], width], (1.0, width / shown_width))

    def shorten(x: Tensor) -> Tensor:
        return resize_axis(x, [height, x.shape[3]], (height / shown_height, 1.0))

    if takes_height_first(columns, rows, width, height):
        return narrow(shorten(planes))
    return shorten(narrow(planes))
