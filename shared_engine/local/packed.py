"""MLP weights in the memory layout of oneDNN's bfloat16 kernels, converted once at load.

Otherwise every product converts its weight, which takes a quarter of the time of an MLP.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_engine.errors import first_line


@dataclass(frozen=True)
class PackedGate:
    """The gate and up weights of an MLP, each (intermediate, hidden), in a layout of oneDNN."""

    gate: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return SiLU(x gate^T) * (x up^T) for x (T, hidden): (T, intermediate)."""
        return F.silu(_multiply(x, self.gate), inplace=True).mul_(_multiply(x, self.up))


def pack(gate: Tensor, up: Tensor) -> PackedGate:
    """Return a converted copy of both weights."""
    gate, up = (torch.ops.mkldnn._reorder_linear_weight(weight) for weight in (gate, up))
    return PackedGate(gate, up)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def select(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether to pack weights, which is faster in bfloat16 only, and the reason."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False, "not packed"
    random = torch.Generator().manual_seed(0)
    x, gate, up = torch.randn(3, 16, 16, generator=random).to(dtype)
    try:
        difference = (pack(gate, up)(x) - F.silu(x @ gate.T) * (x @ up.T)).abs().max().item()
    except (AttributeError, RuntimeError) as exc:  # torch without oneDNN, or with another version
        return False, f"not packed, because oneDNN does not support it: {first_line(exc)}"
    if not difference < 1:  # of values around 20, after four roundings
        return False, f"not packed, because packed weights change values by {difference:.2g}"
    return True, "packed for oneDNN"
