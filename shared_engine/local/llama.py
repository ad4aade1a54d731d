"""The bidirectional Llama encoder: token ids and tiles in, one vector or score per sequence out.

It is the decoder stack of Llama 3.2 without causal mask and padding. Rows of the vision tower
replace the embeddings of an image's context tokens. T is the number of tokens of a step, S the
number of its sequences, d the size of a head.

Source of the arithmetic: `LlamaBidirectionalModel` of the public checkpoints (mean pooling, no
causal mask), `LlamaBidirectionalForSequenceClassification` of the rerankers (mean times one row of
weights, divided by the temperature), and transformers' `modeling_llama.py`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from shared_engine.errors import first_line
from shared_engine.local.attention import Layout, varlen
from shared_engine.local.checkpoint import Checkpoint
from shared_engine.local.config import Llama3Rope, Rope, YarnRope
from shared_engine.local.device import Placement
from shared_engine.local.device_errors import is_fatal, is_out_of_memory
from shared_engine.local.elementwise import EAGER
from shared_engine.local.graphs import SIZES, QueryGraphs, check_graphs
from shared_engine.local.layers import Layers, no_pause
from shared_engine.local.memory import Buffers, to_device
from shared_engine.local.pixtral import PixtralTower
from shared_engine.local.pooling import pool
from shared_engine.local.siglip import VisionTower
from shared_engine.local.vision import PixtralVision
from shared_engine.local.vision_cache import KeyedImage, VisionCache
from shared_engine.local.weights import Weights

if TYPE_CHECKING:
    from shared_engine.images.tiles import Tiles


_WARM_LENGTH = 512
"""Tokens of each text of the warm-up on a GPU."""


class PooledOutput:
    """The vectors or scores of a step; from a GPU, they are copied asynchronously."""

    def __init__(self, means: Tensor, order: NDArray[np.intp]) -> None:
        """Start the copy to the host.

        Args:
            means: (S, hidden) float32, or (S, 1) of a reranker.
            order: Row of each mean in the caller's order.
        """
        self._means, self._order = means, order
        self._arrived: torch.cuda.Event | None = None
        if means.is_cuda:
            pinned = torch.empty(means.shape, dtype=means.dtype, pin_memory=True)
            self._means = pinned.copy_(means, non_blocking=True)
            self._arrived = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._arrived.record(torch.cuda.current_stream(means.device))

    def numpy(self) -> NDArray[np.float32]:
        """Wait for the means and return them in the caller's order: (S, hidden) float32."""
        if self._arrived is not None:
            self._arrived.synchronize()
        out = np.empty(self._means.shape, np.float32)
        out[self._order] = self._means.numpy()
        return out


class Encoder:
    """A loaded model on one device. Not thread-safe: one worker thread owns it.

    `on_pause` may call the encoder again: during a pause, no buffer holds data that is read later.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement, vocabulary: int = 0) -> None:
        """Load the weights and warm up a GPU.

        Args:
            vocabulary: Number of token ids. If it exceeds the embedding table, the table is padded
                with zeros.

        Raises:
            CheckpointError: a weight file is missing, or a tensor is missing, unexpected or of
                another shape.
        """
        config = checkpoint.config
        self.device = placement.device
        self.runs_ahead = placement.device.type == "cuda"
        """Whether a call returns before its step is computed, so that the next can be queued."""
        weights = Weights(checkpoint, placement)
        prefix = "" if checkpoint.vision is None else "language_model."
        table = weights(f"{prefix}embed_tokens.weight", config.vocab_size, config.hidden_size)
        self._layers = Layers(weights, prefix, config, placement)
        self._norm = weights(f"{prefix}norm.weight", config.hidden_size)
        missing = vocabulary - len(table)
        self._embedding = F.pad(table, (0, 0, 0, missing)) if missing > 0 else table
        self._vision: VisionTower | PixtralTower | None = None
        if checkpoint.vision is not None:
            tower = PixtralTower if isinstance(checkpoint.vision, PixtralVision) else VisionTower
            self._vision = tower(checkpoint, weights, placement)
            self._context_token = checkpoint.vision.context_token
            self._vision_cache = VisionCache(checkpoint.vision)
        self._scoring, self._head = checkpoint.scoring, None
        if self._scoring is not None:
            # float32: around 20, logits in bfloat16 are 0.125 apart.
            self._head = weights("score.weight", 1, config.hidden_size, dtype=torch.float32)
        weights.check_nothing_left()
        self._cos, self._sin = _rotary_tables(
            config.rope, config.head_dim, checkpoint.longest, placement
        )
        self._unscaled, self._query_scales = _query_scales(
            config.rope, checkpoint.longest, placement
        )
        self._max_batch_tokens = placement.max_batch_tokens
        self._buffers = Buffers(placement)
        self._graph_buffers = Buffers(placement)  # CUDA graphs hold its addresses
        self._graphs: QueryGraphs | None = None
        self.description = placement.description
        """Device, dtype, kernels and step size, with reasons, in one line."""
        if placement.device.type == "cuda":
            heads = config.heads + config.kv_heads
            qkv = (heads + config.kv_heads) * config.head_dim
            tokens = self._max_batch_tokens
            self._buffers.mlp.reserve(tokens, max(qkv, 2 * config.intermediate_size))
            if placement.elementwise == EAGER:  # EAGER does not rotate in place
                self._buffers.hidden.reserve(tokens, heads * config.head_dim)
            self._graphs, why = self._record_graphs(placement)
            placement = replace(placement, reasons=f"{placement.reasons}; queries: {why}")
            self.description = placement.description
            self._warm_up()

    @torch.inference_mode()
    def _record_graphs(self, placement: Placement) -> tuple[QueryGraphs | None, str]:
        """Return CUDA graphs for small steps of queries, or None, and the reason."""
        if placement.kernel is not varlen:
            return None, "no CUDA graphs, because attention does not use the varlen kernel"

        def forward(ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
            x = F.embedding(ids, self._embedding)
            return self._forward(x, positions, layout, self._graph_buffers)

        vocabulary, width = self._embedding.shape
        try:
            graphs = QueryGraphs(forward, width, self.device)
            check_graphs(graphs, self._compute, vocabulary, len(self._cos))
        except Exception as exc:  # steps without graphs are slower and equally correct
            if is_fatal(exc):
                raise
            return None, f"no CUDA graphs: {first_line(exc)}"
        return graphs, f"CUDA graphs for up to {SIZES[-1]} tokens"

    @torch.inference_mode()
    def _warm_up(self) -> None:
        """Compute a full step and every number of tiles, so that no request waits for kernels."""
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
        tiles: Sequence[Tiles | KeyedImage | None] = (),
        on_pause: Callable[[], None] = no_pause,
    ) -> PooledOutput:
        """Compute the mean of the last hidden states of every sequence, or its score.

        A GPU computes asynchronously, and `PooledOutput.numpy` waits for it. A mean includes all
        tokens of its sequence, also prefix and special tokens. It is not cut or normalized. It does
        not depend on the other sequences, except for rounding on a GPU, where the order of a sum
        depends on the number of rows.

        Args:
            sequences: Token ids of each sequence.
            tiles: The image of each sequence, or None for a text.
            on_pause: Called several times in every layer; it may call this encoder.
        """
        # Neighbours of equal length share an attention call on a CPU.
        order = np.argsort([len(ids) for ids in sequences], kind="stable")
        sequences = [sequences[i] for i in order]
        images = [tiles[i] for i in order if tiles[i] is not None] if tiles else []
        means = self._graphs(sequences) if self._graphs and not images else None
        if means is None:
            means = self._compute(sequences, images, on_pause)
        if self._scoring is not None and self._head is not None:
            means = F.linear(means, self._head) / self._scoring.temperature  # (S, 1)
        return PooledOutput(means, order)

    def _compute(
        self,
        sequences: Sequence[NDArray[np.int32]],
        images: Sequence[Tiles | KeyedImage] = (),
        on_pause: Callable[[], None] = no_pause,
    ) -> Tensor:
        """Return the means of sequences and their images, if any: (S, hidden) float32."""
        count, tokens = len(sequences), sum(map(len, sequences))
        if padding := self._layers.count_padding(tokens):
            # Separate sequences, so no other token attends to them.
            sequences = [*sequences, *[np.zeros(1, np.int32)] * padding]
        lengths = [len(ids) for ids in sequences]
        cu_seqlens = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=cu_seqlens[1:])
        starts = np.repeat(cu_seqlens[:-1], lengths)
        positions = to_device(np.arange(len(starts), dtype=np.int32) - starts, self.device)
        layout = Layout(lengths, to_device(cu_seqlens, self.device))
        ids = np.concatenate(sequences)
        x = F.embedding(to_device(ids, self.device), self._embedding)  # (T, hidden)
        if images and self._vision:
            image_rows = np.flatnonzero(ids[:tokens] == self._context_token)
            encode = partial(self._vision, on_pause=on_pause)
            x[to_device(image_rows, self.device)] = self._vision_cache(images, encode)
        hidden = self._forward(x, positions, layout, self._buffers, on_pause)  # (T, hidden)
        return pool(hidden, layout, count)

    def _forward(
        self,
        x: Tensor,
        positions: Tensor,
        layout: Layout,
        buffers: Buffers,
        on_pause: Callable[[], None] = no_pause,
    ) -> Tensor:
        """Return the last hidden states (T, hidden) of embeddings x (T, hidden), and overwrite x.

        The result is in a buffer; see `Layers`.
        """
        scales = None
        if max(layout.lengths) > self._unscaled:
            scales = self._query_scales[positions, None, None]  # (T, 1, 1)
        rotation = self._cos[positions], self._sin[positions]
        self._layers(x, rotation, layout, buffers, on_pause=on_pause, scales=scales)
        return self._layers.normalize(x, self._norm, buffers)


def _rotary_tables(
    rope: Rope | Llama3Rope | YarnRope, head_dim: int, max_tokens: int, placement: Placement
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for every position, each (max_tokens, d / 2).

    "llama3" and "yarn" divide low frequencies by `factor`, keep high ones, and interpolate between
    them. Computed in float32 as in transformers, so that vectors of long texts equal its vectors.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    factor = 1.0
    if not isinstance(rope, Rope):
        kept = _kept_frequencies(rope, frequencies)  # 0: divided, 1: kept
        frequencies = (1 - kept) * frequencies / rope.factor + kept * frequencies
    if isinstance(rope, YarnRope):
        factor = _yarn_magnitude(rope)
    angles = torch.arange(max_tokens, dtype=torch.float32)[:, None] * frequencies
    return (
        (angles.cos() * factor).to(placement.device, placement.dtype),
        (angles.sin() * factor).to(placement.device, placement.dtype),
    )


def _kept_frequencies(rope: Llama3Rope | YarnRope, frequencies: Tensor) -> Tensor:
    """Return how much of each frequency (d / 2,) is kept, from 0 to 1."""
    original = rope.original_max_position_embeddings
    if isinstance(rope, Llama3Rope):
        low, high = rope.low_freq_factor, rope.high_freq_factor
        return ((original * frequencies / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    count = len(frequencies)

    def find_index(rotations: float) -> float:
        """Return the index of the frequency with so many rotations in the original length."""
        return count * math.log(original / (rotations * 2 * math.pi)) / math.log(rope.theta)

    first = max(math.floor(find_index(rope.beta_fast)), 0)
    last = min(math.ceil(find_index(rope.beta_slow)), 2 * count - 1)
    ramp = (torch.arange(count, dtype=torch.float32) - first) / (last - first or 0.001)
    return 1 - ramp.clamp(0, 1)


def _yarn_magnitude(rope: YarnRope) -> float:
    """Return the factor of cosines and sines."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.mscale and rope.mscale_all_dim:
        return scale(rope.mscale) / scale(rope.mscale_all_dim)
    return scale(1.0)


def _query_scales(
    rope: Rope | Llama3Rope | YarnRope, max_tokens: int, placement: Placement
) -> tuple[int, Tensor]:
    """Return the length up to which queries have no scale, and the scale for every position.

    Source: `get_llama_4_attn_scale` of transformers' `modeling_ministral3.py`.
    """
    if not isinstance(rope, YarnRope) or not rope.llama_4_scaling_beta:
        return sys.maxsize, torch.empty(0)
    blocks = torch.arange(max_tokens) // rope.original_max_position_embeddings
    scales = 1 + rope.llama_4_scaling_beta * torch.log(1.0 + blocks)
    return rope.original_max_position_embeddings, scales.to(placement.device, placement.dtype)
