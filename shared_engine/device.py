"""Where the model runs, decided once and with the reason kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared_engine import attention
from shared_engine.errors import ConfigurationError
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

    Raises:
        ConfigurationError: a device that torch does not know or that is not there, or devices that
            would compute in different number types.
    """
    placements = [_place(device, dtype, tokens_per_step) for device in devices.split(",")]
    first = placements[0]
    for other in placements[1:]:
        if (other.dtype, other.tokens_per_step) != (first.dtype, first.tokens_per_step):
            raise ConfigurationError(
                f"device={devices!r} are of different kinds, so a vector would depend on where it "
                "is computed; give dtype= and tokens_per_step=, or devices of one kind"
            )
    return placements


def _place(device: str, dtype: DType, tokens_per_step: int | None) -> Placement:
    chosen, why_device = _device(device.strip())
    number, why_dtype = _dtype(chosen, dtype)
    attend, why_attention = attention.choose(chosen, number)
    # Measured: a CPU's caches suit 2k tokens; estimated: a data-centre GPU is full at 16k.
    step = tokens_per_step or (16_384 if chosen.type == "cuda" else 2_048)
    reasons = f"device: {why_device}; dtype: {why_dtype}; attention: {why_attention}"
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


def to_device(array: NDArray[Any], device: torch.device) -> torch.Tensor:
    """Copy an array to the device, without waiting for it where that is a GPU."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
