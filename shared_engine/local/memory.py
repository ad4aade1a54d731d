"""Memory of a device: reusable buffers and asynchronous copies."""

from __future__ import annotations

import contextlib
import math
import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared_engine.local.device import Placement

if TYPE_CHECKING:
    from shared_engine.images.tiles import Tiles


recording = threading.Lock()
"""Held while a CUDA graph is recorded. In this time, no other graph may be recorded in the process,
and torch's cache of no GPU may be emptied."""


class Buffer:
    """Memory for an intermediate result, reused in every layer and step.

    The system would clear newly allocated memory, which takes 8 % of a step on a CPU.
    """

    def __init__(self, placement: Placement) -> None:
        """Create an empty buffer."""
        self._empty = torch.empty(0, dtype=placement.dtype, device=placement.device)
        self._memory = self._empty

    def __call__(self, *shape: int) -> torch.Tensor:
        """Return an uninitialized tensor of this shape; it overwrites the previous one."""
        size = math.prod(shape)
        if size > len(self._memory):
            self._memory = self._empty  # free the old memory first
            self._memory = self._empty.new_empty(size)
        return self._memory[:size].view(shape)

    def reserve(self, *shape: int) -> None:
        """Allocate memory for a tensor of this shape, if enough is free.

        Without it, the buffer grows step by step and fragments the memory.
        """
        with contextlib.suppress(torch.OutOfMemoryError):
            self(*shape)


class Buffers:
    """The buffers of a language model on one device."""

    def __init__(self, placement: Placement) -> None:
        """Create empty buffers."""
        self.hidden, self.mlp = Buffer(placement), Buffer(placement)
        self.float32 = Buffer(replace(placement, dtype=torch.float32))


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device; a copy to a GPU is asynchronous."""
    return pin(array, device).to(device, non_blocking=device.type == "cuda")


def pin(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Return an array as a CPU tensor, in pinned memory for a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.pin_memory() if device.type == "cuda" else tensor


def pin_image(image: Tiles) -> Tiles:
    """Copy an image to pinned memory, which `pin` then does not copy again."""

    def pinned(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return torch.from_numpy(np.ascontiguousarray(pixels)).pin_memory().numpy()

    if isinstance(image, np.ndarray):
        return pinned(image)
    return replace(image, pixels=pinned(image.pixels))


def release_gpu_memory() -> None:
    """Return unused memory of torch to the GPU, for other libraries and processes."""
    with recording, contextlib.suppress(RuntimeError):  # torch refuses after a failed recording
        torch.cuda.empty_cache()
