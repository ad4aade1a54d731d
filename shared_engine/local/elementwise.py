"""Elementwise operations of a layer, with torch's operators or fused Triton kernels.

With torch's operators, which each read and write memory, they take half of a step on a GPU
(estimated).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_engine.errors import first_line
from shared_engine.local.config import LayersConfig
from shared_engine.local.device_errors import is_fatal

_TOLERANCE = 0.02
"""Maximum difference between a fused kernel and torch's operators, which round more often; relative
to 1 + |value|."""


Allocate = Callable[..., Tensor]
"""(*shape) -> an uninitialized tensor in reused memory. On a CPU, newly allocated memory would take
longer than the operation, because the system clears it."""


class Elementwise(NamedTuple):
    """The two operations that have a fused kernel. Both may overwrite their input."""

    rotate: Callable[[Tensor, Tensor, Tensor, Allocate], Tensor]
    gate: Callable[[Tensor], Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, allocate: Allocate) -> Tensor:
    """Apply rotary position embedding to x (T, heads, d).

    It rotates pairs of one element of each half of a head. `cos` and `sin` are (T, d / 2).
    """
    out = allocate(*x.shape)
    cos, sin = cos[:, None], sin[:, None]
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def gate(gate_up: Tensor) -> Tensor:
    """Return SiLU of the first half of each row times the second half, and overwrite the first."""
    first, second = gate_up.chunk(2, dim=-1)
    return F.silu(first, inplace=True).mul_(second)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, allocate: Allocate, allocate_float32: Allocate
) -> Tensor:
    """Normalize each row of x (T, hidden) by its root mean square, computed in float32."""
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    # torch has no fused kernel for a CPU, so these are its operators, in reused memory. They run on
    # whole matrices, because each operator synchronizes the cores, which is slow under load.
    x32 = x if x.dtype == torch.float32 else allocate_float32(*x.shape).copy_(x)
    norm = torch.linalg.vector_norm(x32, dim=-1, keepdim=True)  # (T, 1)
    scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
    if x32 is x:
        return torch.mul(x, scale, out=allocate(*x.shape)).mul_(weight)
    return allocate(*x.shape).copy_(x32.mul_(scale).mul_(weight))


EAGER = Elementwise(rotate, gate)


def select(
    device: torch.device, dtype: torch.dtype, config: LayersConfig
) -> tuple[Elementwise, str]:
    """Return the fused kernels if they work on this device, else torch's, and the reason."""
    if device.type != "cuda":
        return EAGER, "torch's operators"
    half = config.head_dim // 2
    if half & (half - 1):
        return EAGER, f"torch's operators, because half a head, {half}, is not a power of two"
    try:
        from shared_engine.local import fused

        kernels = Elementwise(fused.rotate, fused.gate)
        _check_kernels(kernels, device, dtype, config)
    except Exception as exc:  # from a compiler; torch's operators need none
        if is_fatal(exc):
            raise
        reason = f"Triton's kernels are not usable: {first_line(exc)}"
        return EAGER, f"torch's operators, because {reason}"
    return kernels, "Triton's kernels"


def _check_kernels(
    kernels: Elementwise, device: torch.device, dtype: torch.dtype, config: LayersConfig
) -> None:
    """Run both kernels on a few rows of the model's widths.

    Raises:
        RuntimeError: the values differ from those of torch's operators.
    """
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(device, dtype)

    qk_heads = config.heads + config.kv_heads
    heads = draw(8, qk_heads + config.kv_heads, config.head_dim)
    cos, sin = draw(8, config.head_dim // 2), draw(8, config.head_dim // 2)
    gate_up = draw(8, 2 * config.intermediate_size)
    values = []
    for rotate_, gate_ in (EAGER, kernels):
        qk = rotate_(heads.clone()[:, :qk_heads], cos, sin, heads.new_empty)
        values.append(torch.cat([qk.flatten(), gate_(gate_up.clone()).flatten()]).float())
    difference = ((values[0] - values[1]).abs() / (1 + values[0].abs())).max().item()
    if not difference < _TOLERANCE:
        raise RuntimeError(f"their values differ by {difference:.2g}")
