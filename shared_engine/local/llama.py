"""The bidirectional Llama over packed rows: tokens and tiles in, one mean vector per sequence out.

The decoder stack of Llama 3.2 without its causal mask and without padding: linear layers and norms
see the tokens of all sequences in one row (T, hidden), attention keeps each sequence to itself.
Where a sequence has an image, the rows of the vision tower stand in for its context tokens.
T is the tokens of a step, S its sequences.

Source of the arithmetic: `LlamaBidirectionalModel` of the public checkpoints (mean pooling, no
causal mask) and transformers' `modeling_llama.py`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from shared_engine.errors import first_line
from shared_engine.local.attention import Attention, Layout, varlen, varlen_repeated
from shared_engine.local.checkpoint import Checkpoint
from shared_engine.local.config import Llama3Rope, ModelConfig, Rope
from shared_engine.local.device import Placement
from shared_engine.local.device_errors import is_fatal, is_out_of_memory
from shared_engine.local.elementwise import EAGER, rms_norm
from shared_engine.local.graphs import SIZES, QueryGraphs, check_graphs
from shared_engine.local.memory import Buffers, to_device
from shared_engine.local.packed import PackedGate, pack
from shared_engine.local.pooling import pool
from shared_engine.local.siglip import VisionTower
from shared_engine.local.weights import Weights

if TYPE_CHECKING:
    from shared_engine.images.tiles import Tiles


_WARM_LENGTH = 512
"""Tokens of the texts that a GPU computes while a model is loaded."""
_FEW_ROWS = 256
"""Up to which a step is filled up to 16 rows, and over it to 64, where kernels are made by rows."""


@dataclass(frozen=True)
class LlamaLayer:
    """Weights of one layer; projections that share their input lie in one matrix."""

    attention_norm: Tensor  # (hidden,)
    qkv: Tensor  # ((heads + 2 * kv_heads) * d, hidden)
    o: Tensor  # (hidden, heads * d)
    mlp_norm: Tensor  # (hidden,)
    gate_up: Tensor | PackedGate  # (2 * intermediate, hidden)
    down: Tensor  # (hidden, intermediate)


class PooledOutput:
    """The mean vectors of a step, computed on a CPU, on their way from a GPU."""

    def __init__(self, means: Tensor, order: NDArray[np.intp]) -> None:
        """Take means (S, hidden) float32, of the sequences in this order."""
        self._means, self._order = means, order
        self._arrived: torch.cuda.Event | None = None
        if means.is_cuda:
            pinned = torch.empty(means.shape, dtype=means.dtype, pin_memory=True)
            self._means = pinned.copy_(means, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(means.device))

    def numpy(self) -> NDArray[np.float32]:
        """Wait for them, and return them in the caller's order: (S, hidden)."""
        if self._arrived is not None:
            self._arrived.synchronize()
        out = np.empty(self._means.shape, np.float32)
        out[self._order] = self._means.numpy()
        return out


class Encoder:
    """A loaded model on one device. Calls are not concurrent: its worker thread owns it."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement, vocabulary: int = 0) -> None:
        """Load the weights; a `vocabulary` larger than the table of embeddings gets zeros.

        Raises:
            CheckpointError: a weight file or tensor is missing, unknown or of another shape.
        """
        config = checkpoint.config
        self.device = placement.device
        self.runs_ahead = placement.device.type == "cuda"
        """Whether a step goes on after it was started, so that the next can be started."""
        self._attend: Attention = placement.kernel
        self._heads, self._kv_heads = config.heads, config.kv_heads
        self._head_dim, self._eps = config.head_dim, config.rms_norm_eps
        weights = Weights(checkpoint, placement)
        prefix = "" if checkpoint.vision is None else "language_model."
        table, self._layers, self._norm = _load(weights, prefix, config, placement.packs_weights)
        missing = vocabulary - len(table)
        self._embedding = F.pad(table, (0, 0, 0, missing)) if missing > 0 else table
        self._vision = checkpoint.vision and VisionTower(checkpoint, weights, placement)
        weights.check_nothing_left()
        self._cos, self._sin = _rotary_tables(
            config.rope, self._head_dim, checkpoint.longest, placement
        )
        self._max_batch_tokens = placement.max_batch_tokens
        self._rotate, self._gate = placement.elementwise
        self._buffers = Buffers(placement)
        self._graph_buffers = Buffers(placement)  # whose addresses graphs know
        self._has_kernels_by_rows = self.device.type == "cpu" and placement.dtype != torch.float32
        self._graphs: QueryGraphs | None = None
        self.description = placement.description
        """What it computes with and why, in one line."""
        if placement.device.type == "cuda":
            layer = self._layers[0]
            self._buffers.mlp.reserve(
                self._max_batch_tokens, max(len(layer.qkv), 2 * config.intermediate_size)
            )
            if placement.elementwise == EAGER:  # which rotates from one place to another
                rotated = (self._heads + self._kv_heads) * self._head_dim
                self._buffers.hidden.reserve(
                    max(self._max_batch_tokens, checkpoint.longest), rotated
                )
            self._graphs, why = self._record_graphs(placement)
            placement = replace(placement, reasons=f"{placement.reasons}; queries: {why}")
            self.description = placement.description
            self._warm_up()

    @torch.inference_mode()
    def _record_graphs(self, placement: Placement) -> tuple[QueryGraphs | None, str]:
        """Return graphs for the steps of searches, if they give the same values, and why not."""
        if placement.kernel not in (varlen, varlen_repeated):
            return None, "no CUDA graphs, as attention is no varlen kernel"

        def forward(ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
            x = F.embedding(ids, self._embedding)
            return self._forward(x, positions, layout, self._graph_buffers)

        vocabulary, width = self._embedding.shape
        try:
            graphs = QueryGraphs(forward, width, self.device)
            check_graphs(graphs, self._compute, vocabulary, len(self._cos))
        except Exception as exc:  # a search is slower without, and as right
            if is_fatal(exc):
                raise
            return None, f"no CUDA graphs: {first_line(exc)}"
        return graphs, f"CUDA graphs for up to {SIZES[-1]} tokens"

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Compute a full step and every number of tiles, so that a GPU has loaded its kernels.

        Else the first requests would wait for that.
        """
        length = min(_WARM_LENGTH, len(self._cos))
        try:
            self._compute([np.zeros(length, np.int32)] * max(1, self._max_batch_tokens // length))
            if self._vision:
                self._vision.warm_up()
        except Exception as exc:
            if not is_out_of_memory(exc):  # requests halve their steps
                raise

    @torch.inference_mode()
    def __call__(
        self,
        sequences: Sequence[NDArray[np.int32]],
        tiles: Sequence[Tiles | None] = (),
    ) -> PooledOutput:
        """Start to compute the mean of the last hidden states of every sequence.

        `tiles` are the images of the sequences, or None for a text. The means are neither cut nor
        scaled. Each is over all tokens of its sequence, prefix and special tokens included. It does
        not depend on the other sequences; on a GPU, whose matrix products are summed in an order
        that depends on how many rows they have, to rounding.
        """
        # Neighbours of equal length share an attention call on a CPU.
        order = np.argsort([len(ids) for ids in sequences], kind="stable")
        sequences = [sequences[i] for i in order]
        images = [tiles[i] for i in order if tiles[i] is not None] if tiles else []
        means = self._graphs(sequences) if self._graphs and not images else None
        if means is None:
            means = self._compute(sequences, images)
        return PooledOutput(means, order)

    def _compute(
        self, sequences: Sequence[NDArray[np.int32]], images: Sequence[Tiles] = ()
    ) -> Tensor:
        """Return the means of sequences, with the images in their order: (S, hidden) float32."""
        count, tokens = len(sequences), sum(map(len, sequences))
        if padding := -tokens % self._multiple(tokens):
            sequences = [*sequences, *[np.zeros(1, np.int32)] * padding]  # nobody attends to them
        lengths = [len(ids) for ids in sequences]
        cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        starts = np.repeat(cu_seqlens[:-1], lengths)
        positions = to_device(np.arange(len(starts), dtype=np.int32) - starts, self.device)
        layout = Layout(lengths, to_device(cu_seqlens, self.device))
        ids = np.concatenate(sequences)
        x = F.embedding(to_device(ids, self.device), self._embedding)  # (T, hidden)
        if images and self._vision:
            places = np.flatnonzero(ids[:tokens] == self._vision.context_token)
            x[to_device(places, self.device)] = self._vision(images)
        hidden = self._forward(x, positions, layout, self._buffers)  # (T, hidden)
        return pool(hidden, layout, count)

    def _multiple(self, tokens: int) -> int:
        """Return what the rows of a step are to be a multiple of.

        oneDNN makes a kernel for every number of rows that it sees, which takes it milliseconds,
        and keeps the last 1,024 of them, 1.4 MB each.
        """
        if not self._has_kernels_by_rows:
            return 1
        return 16 if tokens <= _FEW_ROWS else 64

    def _forward(self, x: Tensor, positions: Tensor, layout: Layout, buffers: Buffers) -> Tensor:
        """Return the last hidden states of embeddings x (T, hidden), which they overwrite.

        Every layer writes to the same buffers. What `hidden` and `mlp` return is valid until they
        are called again, and so is the result of this.
        """
        hidden, mlp = buffers.hidden, buffers.mlp

        def normalize(x: Tensor, weight: Tensor) -> Tensor:
            return rms_norm(x, weight, self._eps, hidden, buffers.float32)

        cos, sin = self._cos[positions], self._sin[positions]  # (T, d / 2)
        heads, rotated = self._heads, self._heads + self._kv_heads  # values are not rotated
        for layer in self._layers:
            normed = normalize(x, layer.attention_norm)  # in hidden
            qkv = torch.mm(normed, layer.qkv.T, out=mlp(len(x), len(layer.qkv)))
            qkv = qkv.view(len(x), -1, self._head_dim)  # (T, heads + 2 * kv_heads, d), in mlp
            # Over normed, which is not read again; or over qkv, where a fused kernel rotates.
            turned = self._rotate(qkv[:, :rotated], cos, sin, hidden)
            q, k, v = turned[:, :heads], turned[:, heads:], qkv[:, rotated:]
            attended = self._attend(q, k, v, layout)  # (T, heads, d), in memory of its own
            x.addmm_(attended.flatten(1), layer.o.T)
            # In parts of a step, so that a longer text takes no more memory.
            for rows in torch.split(x, self._max_batch_tokens):
                normed = normalize(rows, layer.mlp_norm)  # over turned, which is not read again
                if isinstance(layer.gate_up, PackedGate):
                    inner = layer.gate_up(normed)  # (T, intermediate), in memory of its own
                else:
                    gate_up = mlp(len(rows), len(layer.gate_up))  # over qkv, not read again
                    torch.mm(normed, layer.gate_up.T, out=gate_up)
                    inner = self._gate(gate_up)  # over its first half
                rows.addmm_(inner, layer.down.T)  # rows are of x
        return normalize(x, self._norm)


def _rotary_tables(
    rope: Rope | Llama3Rope, head_dim: int, max_tokens: int, placement: Placement
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for every position, each (max_tokens, d / 2).

    "llama3" stretches the slow frequencies: those whose wavelength exceeds the original context
    are divided by `factor`, the fast ones kept, those between interpolated. Computed in float32 as
    transformers does, so that long texts agree with it to the last bits.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if isinstance(rope, Llama3Rope):
        low, high = rope.low_freq_factor, rope.high_freq_factor
        turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: kept
        frequencies = (1 - kept) * frequencies / rope.factor + kept * frequencies
    angles = torch.arange(max_tokens, dtype=torch.float32)[:, None] * frequencies
    return (
        angles.cos().to(placement.device, placement.dtype),
        angles.sin().to(placement.device, placement.dtype),
    )


def _load(
    weights: Weights, prefix: str, config: ModelConfig, packs_weights: bool
) -> tuple[Tensor, list[LlamaLayer], Tensor]:
    """Return the table of embeddings, the layers and the last norm."""

    def take(name: str, *shape: int) -> Tensor:
        return weights(prefix + name, *shape)

    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    embedding = take("embed_tokens.weight", config.vocab_size, hidden)
    layers = []
    for n in range(config.layers):
        at, mlp = f"layers.{n}.self_attn", f"layers.{n}.mlp"
        gate = take(f"{mlp}.gate_proj.weight", inner, hidden)
        up = take(f"{mlp}.up_proj.weight", inner, hidden)
        layers.append(
            LlamaLayer(
                attention_norm=take(f"layers.{n}.input_layernorm.weight", hidden),
                qkv=torch.cat(
                    [
                        take(f"{at}.q_proj.weight", q, hidden),
                        take(f"{at}.k_proj.weight", kv, hidden),
                        take(f"{at}.v_proj.weight", kv, hidden),
                    ]
                ),
                o=take(f"{at}.o_proj.weight", hidden, q),
                mlp_norm=take(f"layers.{n}.post_attention_layernorm.weight", hidden),
                gate_up=pack(gate, up) if packs_weights else torch.cat([gate, up]),
                down=take(f"{mlp}.down_proj.weight", hidden, inner),
            )
        )
    return embedding, layers, take("norm.weight", hidden)
