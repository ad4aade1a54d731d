"""The mean of each sequence's hidden states, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from shared_engine.local.attention import Layout

_GROUP = 1_024
"""Maximum number of sequences of one product. With 16,384 tokens, its mask needs 34 MB."""


def pool(hidden: Tensor, layout: Layout, count: int) -> Tensor:
    """Return the means of the first `count` sequences of hidden states (T, width): (count, width).

    A CPU averages one sequence after the other. A GPU would launch a kernel for each, so it uses
    matrix products.
    """
    if hidden.is_cuda:
        ends = [*range(_GROUP, count, _GROUP), count]
        starts = [0, *ends[:-1]]
        boundaries = [layout.cu_seqlens[a : b + 1] for a, b in zip(starts, ends, strict=True)]
        return torch.cat([mean_by_product(hidden, each) for each in boundaries])
    lengths = layout.lengths[:count]
    sequences = torch.split(hidden[: sum(lengths)], lengths)
    return torch.stack([rows.mean(0, dtype=torch.float32) for rows in sequences])


def mean_by_product(hidden: Tensor, cu_seqlens: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the means of S sequences by one matrix product: (S, width) float32.

    The mean of an empty sequence is 0. In float16, the mean of a sequence with NaN or infinity is
    NaN.

    Args:
        hidden: Hidden states, (T, width).
        cu_seqlens: Boundaries of the sequences, (S + 1,). They are read on the device, so a CUDA
            graph can replay the call with other boundaries.
        out: Tensor for the result.
    """
    rows = torch.arange(len(hidden), dtype=torch.int32, device=hidden.device)
    starts, ends = cu_seqlens[:-1, None], cu_seqlens[1:, None]
    is_inside = hidden.new_empty(len(starts), len(rows))  # (S, T)
    torch.logical_and(rows >= starts, rows < ends, out=is_inside)
    if hidden.dtype != torch.float16:
        sums = _multiply_in_float32(is_inside, hidden)
    else:  # may hold infinity, and 0 * infinity would be NaN in every sequence
        totals = hidden.sum(dim=1, keepdim=True, dtype=torch.float32)  # (T, 1)
        is_invalid = totals - totals != 0  # NaN or infinite
        sums = _multiply_in_float32(is_inside, hidden.masked_fill(is_invalid, 0))
        sums.masked_fill_(torch.mm(is_inside, is_invalid.to(is_inside.dtype)) > 0, torch.nan)
    return torch.div(sums, (ends - starts).clamp_(min=1), out=out)


def _multiply_in_float32(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())
