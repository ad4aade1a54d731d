"""What a layer does beside its matrix products and attention, with torch's operators or fused ones.

Half of a step on a GPU is this work if each operator reads and writes memory anew (estimated).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_engine.local.config import ModelConfig

_ROWS = 128
"""Rows that a CPU takes at once, so that what is between two operators stays in its cache."""
_CLOSE = 0.02
"""How far a fused kernel may be from torch's operators, whose steps round one by one."""


class Elementwise(NamedTuple):
    """The two places in a layer where a fused kernel pays; both work in place."""

    rotate_: Callable[[Tensor, Tensor, Tensor], None]
    gate_: Callable[[Tensor], Tensor]


def rotate_(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Apply rotary position embedding to x (T, heads, d), whose halves are the two components.

    `cos` and `sin` are (T, d / 2).
    """
    size = len(x) if x.is_cuda else _ROWS
    for rows, c, s in zip(*(torch.split(each, size) for each in (x, cos, sin)), strict=True):
        first, second = rows.chunk(2, dim=-1)
        before, c, s = first.clone(), c[:, None], s[:, None]  # noqa: PLW2901
        first.mul_(c).addcmul_(second, s, value=-1)
        second.mul_(c).addcmul_(before, s)


def gate_(gate_up: Tensor) -> Tensor:
    """Return SiLU of the first half of each row times the second, in the place of the first."""
    for rows in torch.split(gate_up, len(gate_up) if gate_up.is_cuda else _ROWS):
        gate, up = rows.chunk(2, dim=-1)
        F.silu(gate, inplace=True).mul_(up)
    return gate_up.chunk(2, dim=-1)[0]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the root mean square norm of each row of x (T, hidden), computed in float32."""
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    # torch has no fused kernel for a CPU, and its operators would make four passes over memory.
    out = torch.empty_like(x)
    for rows, to in zip(torch.split(x, _ROWS), torch.split(out, _ROWS), strict=True):
        exact = rows.to(torch.float32, copy=True)
        norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)  # (rows, 1)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
        to.copy_(exact.mul_(scale).mul_(weight))
    return out


EAGER = Elementwise(rotate_, gate_)


def select(
    device: torch.device, dtype: torch.dtype, config: ModelConfig
) -> tuple[Elementwise, str]:
    """Return the fused kernels if they run on this device and agree, else torch's, and why."""
    if device.type != "cuda":
        return EAGER, "torch's operators"
    half = config.head_dim // 2
    if half & (half - 1):
        return EAGER, f"torch's operators, as half a head, {half}, is no power of two"
    try:
        from shared_engine.local import fused

        kernels = Elementwise(fused.rotate_, fused.gate_)
        _check_kernels(kernels, device, dtype, config)
    except Exception as exc:  # a compiler is at work: whatever it raises, the model can do without
        said = str(exc).splitlines() or [""]
        return EAGER, f"torch's operators, as Triton's kernels do not run here: {said[0] or exc!r}"
    return kernels, "Triton's kernels"


def _check_kernels(
    kernels: Elementwise, device: torch.device, dtype: torch.dtype, config: ModelConfig
) -> None:
    """Run both kernels on a few rows of the model's widths.

    Raises:
        RuntimeError: they give other values than torch's operators.
    """
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    rotated = config.heads + config.kv_heads
    heads = draw(8, rotated + config.kv_heads, config.head_dim)
    cos, sin = draw(8, config.head_dim // 2), draw(8, config.head_dim // 2)
    gate_up = draw(8, 2 * config.intermediate_size)
    values = []
    for rotate_, gate_ in (EAGER, kernels):
        turned = heads.clone()
        rotate_(turned[:, :rotated], cos, sin)
        values.append(torch.cat([turned.flatten(), gate_(gate_up.clone()).flatten()]).float())
    difference = ((values[0] - values[1]).abs() / (1 + values[0].abs())).max().item()
    if not difference < _CLOSE:
        raise RuntimeError(f"their values are off by {difference:.2g}")
