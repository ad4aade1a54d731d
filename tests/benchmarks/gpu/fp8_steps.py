"""An experiment: steps whose products are in fp8 (e4m3), with a scale for each token and output."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # a CPU scales with torch's operators
    triton = None
else:

    @triton.jit
    def _quantize_kernel(x, out, scales, stride, width, BLOCK: tl.constexpr):  # noqa: N803, PLR0917
        row = tl.program_id(0).to(tl.int64)
        i = tl.arange(0, BLOCK)
        values = tl.load(x + row * stride + i, mask=i < width, other=0.0).to(tl.float32)
        scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-12) / 448
        tl.store(out + row * width + i, (values / scale).to(tl.float8e4nv), mask=i < width)
        tl.store(scales + row, scale)


Scaled = tuple[Tensor, Tensor]
"""Rows in fp8, and the (rows, 1) float32 factors to multiply them with."""


def quantize(x: Tensor) -> Scaled:
    """Scale each row (rows, width) by its largest number."""
    if not x.is_cuda:
        scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 448
        return (x.float() / scale).to(torch.float8_e4m3fn), scale
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(x.shape[1])
    warps = max(4, block // 1024)
    _quantize_kernel[(len(x),)](x, out, scales, x.stride(0), x.shape[1], block, num_warps=warps)
    return out, scales


def multiply(x: Scaled, weight: Scaled, dtype: torch.dtype) -> Tensor:
    """Return x times the transpose of a weight."""
    (x8, x_scale), (weight8, weight_scale) = x, weight
    if not x8.is_cuda:
        return ((x8.float() * x_scale) @ (weight8.float() * weight_scale).T).to(dtype)
    return torch._scaled_mm(
        x8, weight8.T, x_scale, weight_scale.T, out_dtype=dtype, use_fast_accum=True
    )


@contextlib.contextmanager
def use_fp8(encoder: Any) -> Iterator[None]:
    """Let an encoder compute so, without graphs."""
    weights = [
        [quantize(weight) for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
        for layer in encoder._layers.all
    ]

    def forward(x: Tensor, positions: Tensor, layout: Any, buffers: Any, *_: Any) -> Tensor:
        cos, sin = encoder._cos[positions], encoder._sin[positions]
        layers = encoder._layers
        heads, qk_heads = layers.heads, layers.heads + layers.kv_heads

        def normalize(weight: Tensor) -> Tensor:
            return F.rms_norm(x, (x.shape[-1],), weight, layers.eps)

        def product(x: Tensor, weight: Scaled) -> Tensor:
            return multiply(quantize(x), weight, x.dtype)

        for layer, (qkv_weight, o, gate_up, down) in zip(layers.all, weights, strict=True):
            qkv = product(normalize(layer.attention_norm), qkv_weight)
            qkv = qkv.view(len(x), -1, layers.head_dim)
            qk = layers.rotate(qkv[:, :qk_heads], cos, sin, buffers.hidden)
            q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, qk_heads:]
            x.add_(product(layers.attend(q, k, v, layout).flatten(1), o))
            inner = layers.gate(product(normalize(layer.mlp_norm), gate_up))
            x.add_(product(inner, down))
        return normalize(encoder._norm)

    with mock.patch.multiple(encoder, _forward=forward, _graphs=None):
        yield
