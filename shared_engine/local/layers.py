"""The layers of Llama and of Pixtral: attention within each sequence, then a gated MLP.

Linear layers and norms read the tokens of all sequences as one matrix (T, hidden). T is the number
of tokens of a step, d the size of a head.

Source of the arithmetic: transformers' `modeling_llama.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shared_engine.local.attention import Layout
from shared_engine.local.config import LayersConfig
from shared_engine.local.device import Placement
from shared_engine.local.elementwise import rms_norm
from shared_engine.local.memory import Buffers
from shared_engine.local.packed import PackedGate, pack
from shared_engine.local.weights import Weights

_FEW_ROWS = 256
"""Maximum number of rows that are padded to a multiple of 16 on a CPU in 16 bits; more, to 64."""
_MLP_ROWS = 512
"""Rows of an MLP between two pauses on a CPU; more rows are not faster (measured)."""


def no_pause() -> None:
    """Do nothing; the default of `on_pause`."""


class LayerNames(NamedTuple):
    """Names of the parts of a layer in a checkpoint."""

    attention_norm: str
    attention: str
    mlp_norm: str
    mlp: str


LLAMA = LayerNames("input_layernorm", "self_attn", "post_attention_layernorm", "mlp")


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; projections of the same input share one matrix."""

    attention_norm: Tensor  # (hidden,)
    qkv: Tensor  # ((heads + 2 * kv_heads) * d, hidden)
    o: Tensor  # (hidden, heads * d)
    mlp_norm: Tensor  # (hidden,)
    gate_up: Tensor | PackedGate  # (2 * intermediate, hidden)
    down: Tensor  # (hidden, intermediate)


class Layers:
    """The layers of a model on one device. Not thread-safe: the encoder's thread owns them."""

    def __init__(
        self,
        weights: Weights,
        prefix: str,
        config: LayersConfig,
        placement: Placement,
        names: LayerNames = LLAMA,
    ) -> None:
        """Load the weights, whose names begin with `prefix`."""
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.eps = config.rms_norm_eps
        self.attend = placement.kernel
        self.rotate, self.gate = placement.elementwise
        self.all = [
            _load(weights, f"{prefix}layers.{n}", config, placement.packs_weights, names)
            for n in range(config.layers)
        ]
        self._mlp_rows = placement.max_batch_tokens
        if placement.device.type == "cpu":
            self._mlp_rows = min(self._mlp_rows, _MLP_ROWS)
        self._has_kernels_by_rows = (
            placement.device.type == "cpu" and placement.dtype != torch.float32
        )

    def count_padding(self, rows: int) -> int:
        """Return how many rows must be added to so many rows.

        In 16 bits, oneDNN compiles a kernel for each number of rows. This takes milliseconds, and
        it caches the last 1,024 kernels of 1.4 MB each.
        """
        if not self._has_kernels_by_rows:
            return 0
        return -rows % (16 if rows <= _FEW_ROWS else 64)

    def normalize(self, x: Tensor, weight: Tensor, buffers: Buffers) -> Tensor:
        """Return the RMS norm of each row of x (T, hidden), in `buffers.hidden`."""
        return rms_norm(x, weight, self.eps, buffers.hidden, buffers.float32)

    def __call__(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        layout: Layout,
        buffers: Buffers,
        *,
        on_pause: Callable[[], None] = no_pause,
        scales: Tensor | None = None,
    ) -> None:
        """Overwrite the embeddings x (T, hidden) with the output of the last layer.

        Every layer writes to the same buffers. A tensor in a buffer is valid until the buffer is
        used again. During a pause, no buffer holds a tensor that is read later, so another pass may
        use the buffers.

        Args:
            rotation: Cosines and sines of each token, each (T, d / 2).
            scales: Factors of the queries (T, 1, 1), if any.
        """
        hidden, mlp = buffers.hidden, buffers.mlp
        heads, qk_heads = self.heads, self.heads + self.kv_heads  # values are not rotated
        for layer in self.all:
            on_pause()
            normed = self.normalize(x, layer.attention_norm, buffers)  # in hidden
            qkv = torch.mm(normed, layer.qkv.T, out=mlp(len(x), len(layer.qkv)))
            qkv = qkv.view(len(x), -1, self.head_dim)  # (T, heads + 2 * kv_heads, d), in mlp
            # Overwrites normed, which is not read again; a fused kernel overwrites qkv instead.
            qk = self.rotate(qkv[:, :qk_heads], *rotation, hidden)  # (T, heads + kv_heads, d)
            q, k, v = qk[:, :heads], qk[:, heads:], qkv[:, qk_heads:]
            if scales is not None:
                q *= scales
            attended = self.attend(q, k, v, layout)  # (T, heads, d), newly allocated
            x.addmm_(attended.flatten(1), layer.o.T)
            # In parts of a fixed number of rows, so that a longer text needs no more memory.
            for rows in torch.split(x, self._mlp_rows):
                on_pause()
                normed = self.normalize(rows, layer.mlp_norm, buffers)  # overwrites qk
                if isinstance(layer.gate_up, PackedGate):
                    inner = layer.gate_up(normed)  # (rows, intermediate), newly allocated
                else:
                    gate_up = mlp(len(rows), len(layer.gate_up))  # overwrites qkv
                    torch.mm(normed, layer.gate_up.T, out=gate_up)
                    inner = self.gate(gate_up)  # in its first half
                rows.addmm_(inner, layer.down.T)  # rows are a view of x


def _load(
    weights: Weights, at: str, config: LayersConfig, packs_weights: bool, names: LayerNames
) -> Layer:
    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    attention, mlp = f"{at}.{names.attention}", f"{at}.{names.mlp}"
    gate = weights(f"{mlp}.gate_proj.weight", inner, hidden)
    up = weights(f"{mlp}.up_proj.weight", inner, hidden)
    return Layer(
        attention_norm=weights(f"{at}.{names.attention_norm}.weight", hidden),
        qkv=torch.cat(
            [
                weights(f"{attention}.q_proj.weight", q, hidden),
                weights(f"{attention}.k_proj.weight", kv, hidden),
                weights(f"{attention}.v_proj.weight", kv, hidden),
            ]
        ),
        o=weights(f"{attention}.o_proj.weight", hidden, q),
        mlp_norm=weights(f"{at}.{names.mlp_norm}.weight", hidden),
        gate_up=pack(gate, up) if packs_weights else torch.cat([gate, up]),
        down=weights(f"{mlp}.down_proj.weight", hidden, inner),
    )
