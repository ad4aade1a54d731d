"""What a layer does beside its matrix products and attention, with torch's operators or fused ones.

Half of a step on a GPU is this work if each operator reads and writes memory anew (estimated).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_engine.errors import first_line
from shared_engine.local.config import ModelConfig
from shared_engine.local.device_errors import is_fatal

_CLOSE = 0.02
"""How far a fused kernel may be from torch's operators, whose steps round one by one."""


Allocate = Callable[..., Tensor]
"""(*shape) -> a tensor to write to, whose memory is used again. Fresh memory would cost a CPU more
than the work, as the system clears it page by page."""


class Elementwise(NamedTuple):
    """The two places in a layer where a fused kernel pays. What is given may be written over."""

    rotate: Callable[[Tensor, Tensor, Tensor, Allocate], Tensor]
    gate: Callable[[Tensor], Tensor]


def rotate(x: Tensor, cos: Tensor, sin: Tensor, allocate: Allocate) -> Tensor:
    """Return x (T, heads, d), whose halves are two components, turned by rotary embedding.

    `cos` and `sin` are (T, d / 2).
    """
    out = allocate(*x.shape)
    cos, sin = cos[:, None], sin[:, None]
    (first, second), (out_first, out_second) = x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def gate(gate_up: Tensor) -> Tensor:
    """Return SiLU of the first half of each row times the second, in the place of the first."""
    first, second = gate_up.chunk(2, dim=-1)
    return F.silu(first, inplace=True).mul_(second)


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, allocate: Allocate, allocate_float32: Allocate
) -> Tensor:
    """Return the root mean square norm of each row of x (T, hidden), computed in float32."""
    if x.is_cuda:
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    # torch has no fused kernel for a CPU: what its operators would do in fresh memory. Whole
    # matrices, as each operator costs a rendezvous of the cores, long where they are busy.
    exact = x if x.dtype == torch.float32 else allocate_float32(*x.shape).copy_(x)
    norm = torch.linalg.vector_norm(exact, dim=-1, keepdim=True)  # (T, 1)
    scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(eps))
    if exact is x:
        return torch.mul(x, scale, out=allocate(*x.shape)).mul_(weight)
    return allocate(*x.shape).copy_(exact.mul_(scale).mul_(weight))


EAGER = Elementwise(rotate, gate)


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

        kernels = Elementwise(fused.rotate, fused.gate)
        _check_kernels(kernels, device, dtype, config)
    except Exception as exc:  # a compiler is at work: whatever it raises, the model can do without
        if is_fatal(exc):
            raise
        said = first_line(exc)
        return EAGER, f"torch's operators, as Triton's kernels do not run here: {said}"
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
        turned = rotate_(heads.clone()[:, :rotated], cos, sin, heads.new_empty)
        values.append(torch.cat([turned.flatten(), gate_(gate_up.clone()).flatten()]).float())
    difference = ((values[0] - values[1]).abs() / (1 + values[0].abs())).max().item()
    if not difference < _CLOSE:
        raise RuntimeError(f"their values are off by {difference:.2g}")
