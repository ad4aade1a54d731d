"""Bidirectional attention within each sequence of a step, by one of several kernels.

The tokens of all sequences are concatenated without padding. Each token attends to all tokens of
its sequence, and to no token of another sequence. T is the number of tokens of a step, S the number
of its sequences, d the size of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor

from shared_engine.errors import first_line
from shared_engine.local.config import LayersConfig
from shared_engine.local.device_errors import is_fatal

_LONG = 1024
"""Tokens from which a CPU is faster with contiguous keys and values, by 7 to 15 % (measured)."""
_TOLERANCE = 0.05
"""Maximum difference between a kernel and one SDPA call per sequence, for values of about 1."""


@dataclass(frozen=True)
class Layout:
    """Boundaries of the sequences of a step."""

    lengths: list[int]
    """Tokens of each sequence."""
    cu_seqlens: Tensor
    """(S + 1,) int32 on the device: the start of each sequence, then the total."""

    @cached_property
    def max_seqlen(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lengths)

    def runs(self) -> list[tuple[int, int, int]]:
        """Return runs of sequences of equal length as (first token, sequences, tokens of each)."""
        out, start = [], 0
        for length, group in groupby(self.lengths):
            count = len(list(group))
            out.append((start, count, length))
            start += count * length
        return out


Attention = Callable[[Tensor, Tensor, Tensor, Layout], Tensor]
"""(q (T, heads, d), k and v (T, kv_heads, d), layout) -> (T, heads, d)."""


def select_kernel(
    device: torch.device, dtype: torch.dtype, config: LayersConfig
) -> tuple[Attention, str]:
    """Return the fastest kernel that supports the model's heads on this device, and the reason."""
    if device.type != "cuda":
        return per_sequence, "one SDPA call per sequence length"
    flash = dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0)
    reasons = [] if flash else ["flash needs bfloat16 or float16 and compute capability 8.0"]
    kernels = {
        varlen: "varlen flash kernel",
        efficient: "memory-efficient kernel, keys and values repeated",
    }
    for kernel, name in kernels.items():
        if flash or kernel is efficient:
            try:
                _check_kernel(kernel, device, dtype, config)
            except Exception as exc:  # missing in this torch or unsupported: try the next
                if is_fatal(exc):
                    raise
                reasons.append(f"{kernel.__name__} is not usable: {first_line(exc)}")
            else:
                return kernel, "; ".join([name, *reasons])
    return per_sequence, "; ".join(["one SDPA call per sequence length", *reasons])


def _check_kernel(
    kernel: Attention, device: torch.device, dtype: torch.dtype, config: LayersConfig
) -> None:
    """Run a kernel on two sequences with the strides and heads of the model.

    Raises:
        RuntimeError: the values differ from those of `per_sequence`.
        Exception: the kernel does not support them; the type depends on the version of torch.
    """
    layout = Layout([5, 3], torch.tensor([0, 5, 8], dtype=torch.int32).to(device))
    random = torch.Generator().manual_seed(0)
    heads = [config.heads, config.kv_heads, config.kv_heads]
    qkv = torch.randn(8, sum(heads), config.head_dim, generator=random).to(device, dtype)
    q, k, v = torch.split(qkv, heads, dim=1)
    out, expected = kernel(q, k, v, layout), per_sequence(q, k, v, layout)
    difference = (out.float() - expected.float()).abs().max().item()
    if not difference < _TOLERANCE:
        raise RuntimeError(f"its values differ by {difference:.2g}")


def per_sequence(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attend with scaled_dot_product_attention, one call per run of sequences of equal length."""
    if k.is_cuda:  # in float32, the only kernel for grouped heads stores T x T scores
        k, v = _repeat(k, q), _repeat(v, q)
    grouped = k.shape[1] != q.shape[1]
    pieces = []
    for start, count, length in layout.runs():
        span = slice(start, start + count * length)
        q_, k_, v_ = (x[span].view(count, length, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
        if length >= _LONG:
            k_, v_ = k_.contiguous(), v_.contiguous()
        attended = F.scaled_dot_product_attention(q_, k_, v_, enable_gqa=grouped)
        pieces.append(attended.transpose(1, 2).flatten(0, 1))  # (count * length, heads, d)
    return torch.cat(pieces)


def varlen(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attend with the variable-length flash kernel (CUDA, 16-bit types).

    torch's wrapper, `varlen_attn`, imports torch._dynamo, which takes as long as `import torch`.
    The kernel does not split keys that are not paged, so the order of sums, and the last bits of a
    vector, do not depend on the step.
    """
    ends, longest = layout.cu_seqlens, layout.max_seqlen
    no_dropout, is_causal, returns_mask = 0.0, False, False
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, no_dropout, is_causal, returns_mask
    )[0]
    return out


def efficient(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attend with the memory-efficient kernel (CUDA, any float type, any GPU)."""
    ends, longest = layout.cu_seqlens, layout.max_seqlen
    rows = (x[None] for x in (q, _repeat(k, q), _repeat(v, q)))  # (1, T, heads, d)
    no_bias, no_dropout, no_mask = None, 0.0, 0
    out: Tensor = torch.ops.aten._efficient_attention_forward(
        *rows, no_bias, ends, ends, longest, longest, no_dropout, no_mask
    )[0]
    return out[0]


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """Repeat keys or values (T, kv_heads, d) for each head of q: (T, heads, d)."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
