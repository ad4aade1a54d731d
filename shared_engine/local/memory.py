"""Memory of a device: buffers that are used again, and copies that do not wait."""

from __future__ import annotations

import contextlib
import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared_engine.local.device import Placement

if TYPE_CHECKING:
    from shared_engine.images.tiles import Tiles


class Buffer:
    """Memory for an intermediate of a layer, written again in the next layer and the next step.

    Fresh memory would be cleared by the system page by page: 8 % of a step on a CPU.
    """

    def __init__(self, placement: Placement) -> None:
        """Take none yet."""
        self._empty = torch.empty(0, dtype=placement.dtype, device=placement.device)
        self._memory = self._empty

    def __call__(self, *shape: int) -> torch.Tensor:
        """Return an uninitialised tensor; the one before is overwritten."""
        size = math.prod(shape)
        if size > len(self._memory):
            self._memory = self._empty  # never the old and the new at once
            self._memory = self._empty.new_empty(size)
        return self._memory[:size].view(shape)

    def reserve(self, *shape: int) -> None:
        """Take the memory of such a tensor now, if there is enough.

        Else it grows with the largest step so far, and leaves holes too small for the next.
        """
        with contextlib.suppress(torch.OutOfMemoryError):
            self(*shape)


class Buffers:
    """The memory of a model's intermediates, on a device."""

    def __init__(self, placement: Placement) -> None:
        """Take none yet."""
        self.hidden, self.mlp = Buffer(placement), Buffer(placement)
        self.float32 = Buffer(replace(placement, dtype=torch.float32))


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device, without waiting for it where that is a GPU."""
    return pin(array, device).to(device, non_blocking=device.type == "cuda")


def pin(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array as a tensor in memory that a copy to this device does not wait for."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def pin_image(image: Tiles) -> Tiles:
    """Copy an image to memory that a copy to a GPU does not wait for; `pin` leaves it there."""

    def pinned(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return torch.from_numpy(np.ascontiguousarray(pixels)).pin_memory().numpy()

    if isinstance(image, np.ndarray):
        return pinned(image)
    return replace(image, pixels=pinned(image.pixels))


def release_gpu_memory(*, of_cublas: bool) -> None:
    """Give memory that torch keeps and nobody uses back to the system, for other processes.

    With `of_cublas` also the workspaces of matrix products, 32 MB for each stream and thread of an
    H100: no engine of this process may be computing, as torch takes them away from running threads.
    """
    # Private, and missing in a torch without CUDA, which tests have.
    clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)
    if of_cublas and clear is not None:
        clear()
    torch.cuda.empty_cache()
