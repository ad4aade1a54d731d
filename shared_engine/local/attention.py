"""Attention within each sequence of a packed row: one function, two kernels behind it.

A packed row holds the tokens of several sequences one after another, without padding. Every token
attends to all tokens of its own sequence, before and after it, and to no other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_LONG = 1024
"""Tokens from which copying keys and values pays on a CPU: 7 to 15 % of a step, measured."""


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed row begin and end."""

    lengths: list[int]
    """Tokens of each sequence."""
    boundaries: Tensor
    """(S + 1,) int32 on the device: start of each sequence, then the total ("cu_seqlens")."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def runs(self) -> list[tuple[int, int, int]]:
        """Neighbours of equal length as (first token, sequences, tokens of each)."""
        out, start = [], 0
        for length, group in groupby(self.lengths):
            count = len(list(group))
            out.append((start, count, length))
            start += count * length
        return out


Attention = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]
"""(q (T, heads, d), k and v (T, kv_heads, d), layout) -> (T, heads, d)."""


def choose(device: torch.device, dtype: torch.dtype) -> tuple[Attention, str]:
    """Return the fastest kernel that this device, dtype and torch have, and why it is that one."""
    if device.type != "cuda":
        return per_sequence, "one SDPA call for each sequence length"
    if dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0):
        return per_sequence, "flash kernels need bfloat16 or float16 and compute capability 8.0"
    try:
        _try_varlen(device, dtype)
    except ImportError:
        return per_sequence, f"torch {torch.__version__} has no varlen_attn; 2.10 has"
    except RuntimeError as exc:  # a torch without flash kernels, or without one for this GPU
        return per_sequence, f"varlen_attn does not run here: {exc}"
    return varlen, "varlen flash kernel"


def _try_varlen(device: torch.device, dtype: torch.dtype) -> None:
    one = torch.zeros(1, 1, 64, dtype=dtype, device=device)
    varlen(one, one, one, Layout([1], torch.tensor([0, 1], dtype=torch.int32, device=device)))


def per_sequence(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attend with scaled_dot_product_attention, one call for neighbours of equal length."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)  # (T, heads, d)
    for start, count, length in layout.runs():
        span = slice(start, start + count * length)
        q_, k_, v_ = (x[span].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if length >= _LONG:
            k_, v_ = k_.contiguous(), v_.contiguous()
        attended = F.scaled_dot_product_attention(q_, k_, v_, enable_gqa=True)
        out[span].view(count, length, *q.shape[1:]).copy_(attended.transpose(1, 2))
    return out


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attend with the variable-length flash kernel of torch >= 2.10 (CUDA, 16-bit types)."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = layout.boundaries, layout.longest
    options: dict[str, Any] = {}
    if _NEW_VARLEN:
        # One split: the order of a sum, and so a vector's last bits, never depends on the step.
        options = {"enable_gqa": True, "num_splits": 1}
    else:
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    out = varlen_attn(q, k, v, cu, cu, longest, longest, **options)
    assert isinstance(out, Tensor)  # it is a pair only where auxiliary outputs are asked for
    return out


_NEW_VARLEN = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 12)
