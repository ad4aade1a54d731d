"""The widest weights of a layer as oneDNN's bfloat16 kernels read them, laid out once at load.

A plain matrix is laid out anew in every product: for those of an MLP, a quarter of the time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_engine.errors import first_line


@dataclass(frozen=True)
class PackedGate:
    """The weights that an MLP begins with, each (intermediate, hidden), readable by oneDNN only."""

    gate: Tensor
    up: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return SiLU of x (T, hidden) times the one, times x times the other: (T, inner)."""
        return F.silu(_multiply(x, self.gate), inplace=True).mul_(_multiply(x, self.up))


def pack(gate: Tensor, up: Tensor) -> PackedGate:
    """Lay both weights out; they may go then."""
    gate, up = (torch.ops.mkldnn._reorder_linear_weight(weight) for weight in (gate, up))
    return PackedGate(gate, up)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return out


def select(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether weights are to be packed, which pays in bfloat16 only, and why."""
    if device.type != "cpu" or dtype != torch.bfloat16:
        return False, "as they are"
    random = torch.Generator().manual_seed(0)
    x, gate, up = torch.randn(3, 16, 16, generator=random).to(dtype)
    try:
        difference = (pack(gate, up)(x) - F.silu(x @ gate.T) * (x @ up.T)).abs().max().item()
    except (AttributeError, RuntimeError) as exc:  # another oneDNN, or none
        return False, f"as they are, as oneDNN does not pack them: {first_line(exc)}"
    if not difference < 1:  # of values around 20, after four roundings
        return False, f"as they are, as packed ones are off by {difference:.2g}"
    return True, "packed for oneDNN"
