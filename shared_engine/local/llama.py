"""The bidirectional Llama over packed rows: tokens and tiles in, one mean vector a sequence out.

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
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from shared_engine.local.attention import Attention, Layout
from shared_engine.local.checkpoint import Checkpoint
from shared_engine.local.config import Llama3Rope, ModelConfig, Rope
from shared_engine.local.device import Buffer, Placement, to_device
from shared_engine.local.siglip import VisionTower
from shared_engine.local.weights import Weights

if TYPE_CHECKING:
    from shared_engine.images.tiles import Tiles


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; projections that share their input lie in one matrix."""

    attention_norm: Tensor  # (hidden,)
    qkv: Tensor  # ((heads + 2 * kv_heads) * d, hidden)
    o: Tensor  # (hidden, heads * d)
    mlp_norm: Tensor  # (hidden,)
    gate_up: Tensor  # (2 * intermediate, hidden)
    down: Tensor  # (hidden, intermediate)


class Means:
    """The mean vectors of a step: a CPU has computed them, a GPU has been told to."""

    def __init__(self, means: Tensor, order: NDArray[np.intp]) -> None:
        """Take means (S, hidden) float32, of the sequences in this order."""
        self._means, self._order = means, order
        self._arrived: torch.cuda.Event | None = None
        if means.is_cuda:
            pinned = torch.empty(means.shape, dtype=means.dtype, pin_memory=True)
            self._means = pinned.copy_(means, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(means.device))

    def array(self) -> NDArray[np.float32]:
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
        self._attend: Attention = placement.attend
        self._heads, self._kv_heads = config.heads, config.kv_heads
        self._head_dim, self._eps = config.head_dim, config.rms_norm_eps
        weights = Weights(checkpoint, placement)
        prefix = "" if checkpoint.vision is None else "language_model."
        table, self._layers, self._norm = _load(weights, prefix, config)
        missing = vocabulary - len(table)
        self._embedding = F.pad(table, (0, 0, 0, missing)) if missing > 0 else table
        self._vision = checkpoint.vision and VisionTower(checkpoint, weights, placement)
        weights.check_nothing_left()
        self._cos, self._sin = _rotary_tables(
            config.rope, self._head_dim, checkpoint.longest, placement
        )
        self._tokens_per_step = placement.tokens_per_step
        self._narrow, self._wide = Buffer(placement), Buffer(placement)

    @torch.inference_mode()
    def __call__(
        self,
        sequences: Sequence[NDArray[np.int32]],
        tiles: Sequence[Tiles | None] = (),
    ) -> Means:
        """Start to compute the mean of the last hidden states of every sequence.

        `tiles` are the images of the sequences, or None for a text. The means are neither cut nor
        scaled. Each is over all tokens of its sequence, prefix and special tokens included, and
        does not depend on the other sequences.
        """
        # Neighbours of equal length share an attention call on a CPU.
        order = np.argsort([len(ids) for ids in sequences], kind="stable")
        sequences = [sequences[i] for i in order]
        lengths = [len(ids) for ids in sequences]
        boundaries = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=boundaries[1:])
        positions = np.arange(boundaries[-1], dtype=np.int32) - np.repeat(boundaries[:-1], lengths)
        layout = Layout(lengths, to_device(boundaries, self.device))
        ids = np.concatenate(sequences)
        x = F.embedding(to_device(ids, self.device), self._embedding)  # (T, hidden)
        images = [tiles[i] for i in order if tiles[i] is not None] if tiles else []
        if images and self._vision:
            places = np.flatnonzero(ids == self._vision.context_token)
            x[to_device(places, self.device)] = self._vision(images)
        hidden = self._forward(x, to_device(positions, self.device), layout)  # (T, hidden)
        return Means(self._means(hidden.float(), lengths), order)

    def _forward(self, x: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        cos, sin = self._cos[positions], self._sin[positions]  # (T, 1, d / 2)
        tokens = len(x)
        rotated = self._heads + self._kv_heads  # queries and keys are rotated, values are not
        for layer in self._layers:
            normed = self._rms_norm(x, layer.attention_norm)
            qkv = torch.mm(normed, layer.qkv.T, out=self._wide(tokens, len(layer.qkv)))
            heads = qkv.view(tokens, -1, self._head_dim)  # (T, heads + 2 * kv_heads, d)
            turned = self._narrow(tokens, rotated, self._head_dim)  # (T, heads + kv_heads, d)
            _rotate(heads[:, :rotated], cos, sin, out=turned)
            q, k, v = turned[:, : self._heads], turned[:, self._heads :], heads[:, rotated:]
            attended = self._attend(q, k, v, layout)  # (T, heads, d)
            x.addmm_(attended.flatten(1), layer.o.T)
            for rows in torch.split(x, self._tokens_per_step):  # a longer text takes no more memory
                normed = self._rms_norm(rows, layer.mlp_norm)
                wide = self._wide(len(rows), len(layer.gate_up))
                inner = _gated(torch.mm(normed, layer.gate_up.T, out=wide))
                rows.addmm_(inner, layer.down.T)
        return self._rms_norm(x, self._norm)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the norm of x (T, hidden), on a CPU in the narrow buffer."""
        if x.is_cuda:
            return F.rms_norm(x, (x.shape[-1],), weight, self._eps)
        # torch has no fused kernel for a CPU: two passes over memory instead of its four.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (T, 1)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(self._eps))
        return torch.mul(x, scale, out=self._narrow(*x.shape)).mul_(weight)

    def _means(self, hidden: Tensor, lengths: list[int]) -> Tensor:
        """Return the mean of each sequence's rows, (S, hidden)."""
        if hidden.is_cuda:
            counts = to_device(np.asarray(lengths, np.int64), self.device)  # (S,)
            return torch.segment_reduce(hidden, "mean", lengths=counts, unsafe=True)
        # Takes a CPU a third of the time.
        return torch.stack([rows.mean(0) for rows in torch.split(hidden, lengths)])


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, out: Tensor) -> None:
    """Apply rotary position embedding to x (T, heads, d), whose halves are the two components."""
    first, second = x.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)


def _gated(gate_up: Tensor) -> Tensor:
    """Return SiLU of the first half of each row times the second, in the place of the first."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate, inplace=True).mul_(up)


def _rotary_tables(
    rope: Rope | Llama3Rope, head_dim: int, max_tokens: int, placement: Placement
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for every position, each (max_tokens, 1, d / 2).

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
    angles = torch.arange(max_tokens, dtype=torch.float32)[:, None, None] * frequencies
    return (
        angles.cos().to(placement.device, placement.dtype),
        angles.sin().to(placement.device, placement.dtype),
    )


def _load(weights: Weights, prefix: str, config: ModelConfig) -> tuple[Tensor, list[Layer], Tensor]:
    """Return the table of embeddings, the layers and the last norm."""

    def take(name: str, *shape: int) -> Tensor:
        return weights(prefix + name, *shape)

    hidden, inner = config.hidden_size, config.intermediate_size
    q, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
    embedding = take("embed_tokens.weight", config.vocab_size, hidden)
    layers = []
    for n in range(config.layers):
        at, mlp = f"layers.{n}.self_attn", f"layers.{n}.mlp"
        layers.append(
            Layer(
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
                gate_up=torch.cat(
                    [
                        take(f"{mlp}.gate_proj.weight", inner, hidden),
                        take(f"{mlp}.up_proj.weight", inner, hidden),
                    ]
                ),
                down=take(f"{mlp}.down_proj.weight", hidden, inner),
            )
        )
    return embedding, layers, take("norm.weight", hidden)
