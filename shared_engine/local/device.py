"""Where the model runs, decided once and with the reason kept."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared_engine.errors import ConfigurationError
from shared_engine.local import attention
from shared_engine.options import DType

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Placement:
    """Device, number type, attention kernel and step size, each with its why in `reasons`."""

    device: torch.device
    dtype: torch.dtype
    attend: attention.Attention
    tokens_per_step: int
    reasons: str

    @property
    def description(self) -> str:
        """One line for a log or a person."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device}, {dtype}, {self.tokens_per_step} tokens a step ({self.reasons})"


def place(devices: str, dtype: DType, tokens_per_step: int | None) -> list[Placement]:
    """Decide device, dtype, attention kernel and step size for each device, with commas between.

    All get the step of the one with the least memory.

    Raises:
        ConfigurationError: a device that torch does not know or that is not there, or devices that
            would compute in different number types.
    """
    placements = [_place(device, dtype, tokens_per_step) for device in devices.split(",")]
    if len({placement.dtype for placement in placements}) > 1:
        raise ConfigurationError(
            f"device={devices!r} are of different kinds, so a vector would depend on where it "
            "is computed; give dtype=, or devices of one kind"
        )
    step = min(placement.tokens_per_step for placement in placements)
    return [replace(placement, tokens_per_step=step) for placement in placements]


def _place(device: str, dtype: DType, tokens_per_step: int | None) -> Placement:
    chosen, why_device = _device(device.strip())
    number, why_dtype = _dtype(chosen, dtype)
    attend, why_attention = attention.choose(chosen, number)
    step, why_step = (tokens_per_step, "asked for") if tokens_per_step else _step(chosen)
    reasons = (
        f"device: {why_device}; dtype: {why_dtype}; attention: {why_attention}; step: {why_step}"
    )
    return Placement(chosen, number, attend, step, reasons)


def _device(name: str) -> tuple[torch.device, str]:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), "a CUDA GPU is there"
        return torch.device("cpu"), "no CUDA GPU is there"
    try:
        device = torch.device(name)
    except RuntimeError as exc:
        raise ConfigurationError(f"device={name!r} is not one torch knows: {exc}") from exc
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigurationError(
                f"device={name!r}, but this torch ({torch.__version__}) sees no CUDA GPU"
            )
        if device.index is not None and device.index >= torch.cuda.device_count():
            raise ConfigurationError(
                f"device={name!r}, but there are {torch.cuda.device_count()} CUDA GPUs"
            )
        device = torch.device("cuda", device.index or 0)
    return device, "asked for"


def _dtype(device: torch.device, name: DType) -> tuple[torch.dtype, str]:
    if name != "auto":
        return _DTYPES[name], "asked for"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "this GPU multiplies bfloat16"
        return torch.float16, "this GPU does not multiply bfloat16"
    if device.type == "cpu" and torch.cpu._is_amx_tile_supported():
        return torch.bfloat16, "this CPU multiplies bfloat16 (AMX)"
    return torch.float32, "this device does not multiply bfloat16"


def _step(device: torch.device) -> tuple[int, str]:
    if device.type != "cuda":
        return 2_048, "as much as suits the caches of a CPU"
    # Estimated: a data-centre GPU is busy with 16k tokens. A token takes about 0.1 MB of
    # intermediates, and the weights, 1 to 3 GB, are not loaded yet.
    free = torch.cuda.mem_get_info(device)[0] // 2**20
    return max(1_024, min(16_384, free)), f"{free:,} MB are free"


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


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device, without waiting for it where that is a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
