"""Elementwise work of a layer as Triton kernels, in place: half the memory traffic of torch's.

Only an NVIDIA GPU runs these, and only where `elementwise.select` saw them give the same values.
Importing this needs Triton, which every CUDA build of torch brings along.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, PLR0917

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8
"""Heads of a token that one program rotates."""
_BLOCK = 1024
"""Numbers that one program gates."""
_OPTIONS = {"enable_fp_fusion": True}  # a * b + c at once; Triton 3.9 warns where nobody says


@triton.jit
def _rotate_kernel(
    x, cos, sin, row_stride, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, HALF)
    c = tl.load(cos + token * HALF + i).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + i).to(tl.float32)[None, :]
    at = x + token * row_stride + head[:, None] * (2 * HALF) + i[None, :]
    there = (head < HEADS)[:, None] & (i < HALF)[None, :]
    first = tl.load(at, mask=there).to(tl.float32)
    second = tl.load(at + HALF, mask=there).to(tl.float32)
    tl.store(at, (first * c - second * s).to(x.dtype.element_ty), mask=there)
    tl.store(at + HALF, (second * c + first * s).to(x.dtype.element_ty), mask=there)


@triton.jit
def _gate_kernel(gate_up, inner, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    there = i < inner
    at = gate_up + token * (2 * inner) + i
    gate = tl.load(at, mask=there).to(tl.float32)
    up = tl.load(at + inner, mask=there).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(at, value.to(gate_up.dtype.element_ty), mask=there)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, _: object = None) -> Tensor:
    """Do as `elementwise.rotate` does, in place; half a head must be a power of two."""
    tokens, heads, head_dim = x.shape
    grid = (tokens, triton.cdiv(heads, _HEADS))
    _rotate_kernel[grid](
        x, cos, sin, x.stride(0), heads, head_dim // 2, _HEADS, num_warps=1, **_OPTIONS
    )
    return x


def gate(gate_up: Tensor) -> Tensor:
    """Do as `elementwise.gate` does."""
    tokens, inner = len(gate_up), gate_up.shape[1] // 2
    _gate_kernel[(tokens, triton.cdiv(inner, _BLOCK))](gate_up, inner, _BLOCK, **_OPTIONS)
    return gate_up[:, :inner]
