"""Elementwise operations of a layer as Triton kernels, with half of the memory traffic of torch's.

They run in place, on NVIDIA GPUs on which `elementwise.select` found equal values. This module
imports Triton, which every CUDA build of torch installs.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# ruff: noqa: N803, PLR0917

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_HEADS = 8
"""Heads of a token per program."""
_BLOCK = 1024
"""Elements of a row per program."""
_OPTIONS = {"enable_fp_fusion": True}  # a * b + c in one instruction; Triton 3.9 warns without it


@triton.jit
def _rotate_kernel(
    x, cos, sin, row_stride, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, HALF)
    c = tl.load(cos + token * HALF + i).to(tl.float32)[None, :]
    s = tl.load(sin + token * HALF + i).to(tl.float32)[None, :]
    pointers = x + token * row_stride + head[:, None] * (2 * HALF) + i[None, :]
    mask = (head < HEADS)[:, None] & (i < HALF)[None, :]
    first = tl.load(pointers, mask=mask).to(tl.float32)
    second = tl.load(pointers + HALF, mask=mask).to(tl.float32)
    tl.store(pointers, (first * c - second * s).to(x.dtype.element_ty), mask=mask)
    tl.store(pointers + HALF, (second * c + first * s).to(x.dtype.element_ty), mask=mask)


@triton.jit
def _gate_kernel(gate_up, inner, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = i < inner
    pointers = gate_up + token * (2 * inner) + i
    gate = tl.load(pointers, mask=mask).to(tl.float32)
    up = tl.load(pointers + inner, mask=mask).to(tl.float32)
    value = gate / (1 + tl.exp(-gate)) * up
    tl.store(pointers, value.to(gate_up.dtype.element_ty), mask=mask)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, _: object = None) -> Tensor:
    """Rotate x as `elementwise.rotate` does, in place; half a head must be a power of two."""
    tokens, heads, head_dim = x.shape
    grid = (tokens, triton.cdiv(heads, _HEADS))
    _rotate_kernel[grid](
        x, cos, sin, x.stride(0), heads, head_dim // 2, _HEADS, num_warps=1, **_OPTIONS
    )
    return x


def gate(gate_up: Tensor) -> Tensor:
    """Gate as `elementwise.gate` does."""
    tokens, inner = len(gate_up), gate_up.shape[1] // 2
    _gate_kernel[(tokens, triton.cdiv(inner, _BLOCK))](gate_up, inner, _BLOCK, **_OPTIONS)
    return gate_up[:, :inner]
