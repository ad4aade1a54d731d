"""Attention within each sequence of a packed row: one function, several kernels behind it.

A packed row holds the tokens of several sequences one after another, without padding. Every token
attends to all tokens of its own sequence, before and after it, and to no other.
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
from shared_engine.local.config import ModelConfig
from shared_engine.local.device_errors import is_fatal

_LONG = 1024
"""Tokens from which copying keys and values pays on a CPU: 7 to 15 % of a step, measured."""
_HAS_SPLITS = "num_splits" in str(torch.ops.aten._flash_attention_forward.default._schema)
_ONE_SPLIT = {"num_splits": 1} if _HAS_SPLITS else {}
"""So that the order of a sum, and a vector's last bits, never depend on the step. The operator of
torch before 2.12 has no such option, and one split."""
_CLOSE = 0.05
"""How far a kernel's values may be from one SDPA call per sequence, for numbers of about 1."""


@dataclass(frozen=True)
class Layout:
    """Where the sequences of a packed row begin and end."""

    lengths: list[int]
    """Tokens of each sequence."""
    cu_seqlens: Tensor
    """(S + 1,) int32 on the device: start of each sequence, then the total."""

    @cached_property
    def max_seqlen(self) -> int:
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


def select_kernel(
    device: torch.device, dtype: torch.dtype, config: ModelConfig
) -> tuple[Attention, str]:
    """Return the fastest kernel that computes the model's heads on this device, and why."""
    if device.type != "cuda":
        return per_sequence, "one SDPA call for each sequence length"
    flash = dtype != torch.float32 and torch.cuda.get_device_capability(device) >= (8, 0)
    reasons = [] if flash else ["flash needs bfloat16 or float16 and compute capability 8.0"]
    kernels = {
        varlen: "varlen flash kernel",
        varlen_repeated: "varlen flash kernel, keys and values repeated",
        efficient: "memory-efficient kernel, keys and values repeated",
    }
    for kernel, name in kernels.items():
        if flash or kernel is efficient:
            try:
                _check_kernel(kernel, device, dtype, config)
            except Exception as exc:  # not in this torch, or refused: there is another
                if is_fatal(exc):
                    raise
                reasons.append(f"{kernel.__name__} does not run here: {first_line(exc)}")
            else:
                return kernel, "; ".join([name, *reasons])
    return per_sequence, "; ".join(["one SDPA call for each sequence length", *reasons])


def _check_kernel(
    kernel: Attention, device: torch.device, dtype: torch.dtype, config: ModelConfig
) -> None:
    """Run a kernel on two sequences of the model's heads, laid out as in a step.

    Raises:
        RuntimeError: it gives other values than `per_sequence`.
        Exception: it refuses them, each torch with an error of its own.
    """
    layout = Layout([5, 3], torch.tensor([0, 5, 8], dtype=torch.int32).to(device))
    random = torch.Generator().manual_seed(0)
    heads = [config.heads, config.kv_heads, config.kv_heads]
    qkv = torch.randn(8, sum(heads), config.head_dim, generator=random).to(device, dtype)
    q, k, v = torch.split(qkv, heads, dim=1)
    out, expected = kernel(q, k, v, layout), per_sequence(q, k, v, layout)
    difference = (out.float() - expected.float()).abs().max().item()
    if not difference < _CLOSE:
        raise RuntimeError(f"its values are off by {difference:.2g}")


def per_sequence(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attend with scaled_dot_product_attention, one call for neighbours of equal length."""
    if k.is_cuda:  # there grouped heads have no kernel in float32 but one of T x T intermediates
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

    torch's wrapper, `varlen_attn`, would import all of torch._dynamo: as long as `import torch`.
    """
    ends, longest = layout.cu_seqlens, layout.max_seqlen
    no_dropout, is_causal, returns_mask = 0.0, False, False
    out: Tensor = torch.ops.aten._flash_attention_forward(
        q, k, v, ends, ends, longest, longest, no_dropout, is_causal, returns_mask, **_ONE_SPLIT
    )[0]
    return out


def varlen_repeated(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Do as `varlen` does, for a torch that does not take grouped heads."""
    return varlen(q, _repeat(k, q), _repeat(v, q), layout)


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
    """Return keys or values (T, kv_heads, d) for each of the heads of q: (T, heads, d)."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)
