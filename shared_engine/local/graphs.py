"""Steps of a few tokens as CUDA graphs: a search waits for one launch instead of a hundred.

A graph replays kernels with the shapes and addresses that they were recorded with, so a step goes
into a bucket: its tokens, then a last sequence of padding, which nobody attends to or averages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from shared_engine.local.attention import Layout
from shared_engine.local.memory import pin
from shared_engine.local.pooling import mean_by_product

SIZES = (16, 32, 64, 128)
"""Tokens of the buckets."""
_SEQUENCES = 8
"""The most of a step: a search has one, and several callers may share a step."""
_CLOSE = 0.02
"""How far a replay may be from the same step without a graph, per unit of its largest number."""

Forward = Callable[[Tensor, Tensor, Layout], Tensor]
"""(ids (T,), positions (T,), layout) -> hidden states (T, hidden)."""
Record = Callable[[Callable[[], None]], Callable[[], Any]]
"""From a function of tensors that stay where they are to one that does the same again."""


class QueryGraphs:
    """A bucket of each size, recorded once. Calls are not concurrent."""

    def __init__(
        self, forward: Forward, width: int, device: torch.device, record: Record | None = None
    ) -> None:
        """Record `forward`, which gives hidden states of that width.

        The caller keeps all tensors that `forward` reads and writes beside its arguments: a graph
        knows their addresses only. It does not keep `forward`, which may refer to what has it.
        """
        record = record or _make_recorder(device)
        self._device = device
        # The largest first: the others take its memory.
        self._buckets = {
            size: _Bucket(size, forward, width, device, record) for size in reversed(SIZES)
        }

    def __call__(self, sequences: Sequence[NDArray[np.int32]]) -> Tensor | None:
        """Return the means of a step (S, width), valid until the next; None if it fits no bucket.

        They are over the hidden states of each sequence, in float32.
        """
        lengths = [len(ids) for ids in sequences]
        tokens = sum(lengths)
        size = next((size for size in SIZES if size >= tokens), None)
        if size is None or len(lengths) > _SEQUENCES:
            return None
        inputs = np.zeros(2 * size + _SEQUENCES + 2, np.int32)
        ids, positions, cu_seqlens = np.split(inputs, [size, 2 * size])
        ids[:tokens] = np.concatenate(sequences)
        positions[:tokens] = np.concatenate([np.arange(length) for length in lengths])
        cu_seqlens[1:-1] = tokens  # sequences that are not there are empty
        cu_seqlens[1 : len(lengths) + 1] = np.cumsum(lengths)
        cu_seqlens[-1] = size
        bucket = self._buckets[size]
        bucket.inputs.copy_(pin(inputs, self._device), non_blocking=True)
        bucket.replay()
        return bucket.means[: len(lengths)]


class _Bucket:
    """Tensors that stay where they are, and a recording that computes one from the other."""

    def __init__(
        self, size: int, forward: Forward, width: int, device: torch.device, record: Record
    ) -> None:
        self.inputs = torch.zeros(2 * size + _SEQUENCES + 2, dtype=torch.int32, device=device)
        self.means = torch.empty(_SEQUENCES, width, dtype=torch.float32, device=device)
        ids, positions, cu_seqlens = torch.split(self.inputs, [size, size, _SEQUENCES + 2])
        layout = Layout([size], cu_seqlens)  # the kernel reads the boundaries when it runs

        def step() -> None:
            hidden = forward(ids, positions, layout)  # (T, width)
            mean_by_product(hidden, cu_seqlens[:-1], out=self.means)

        self.replay = record(step)


def _make_recorder(device: torch.device) -> Record:
    """Return what records steps as CUDA graphs that share memory.

    A pool of memory serves one stream. Each model has a stream of its own, because the graphs write
    to the cuBLAS workspace of their stream, where the recording of another model would interfere.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return partial(_capture, device, stream, torch.cuda.graph_pool_handle())


def _capture(
    device: torch.device, stream: torch.cuda.Stream, pool: Any, step: Callable[[], None]
) -> Callable[[], Any]:
    """Record a step as a CUDA graph, while other threads may use the device."""
    with torch.cuda.device(device):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # what libraries and Triton make once is no part of the graph
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            step()
    return graph.replay


def check_graphs(
    graphs: QueryGraphs, compute: Callable[..., Tensor], vocabulary: int, longest: int
) -> None:
    """Compare replays of every bucket with the same steps computed without a graph.

    Raises:
        RuntimeError: they differ.
    """
    random = np.random.default_rng(0)
    for size in (*SIZES, *SIZES):  # again, over what the others left
        lengths = [min(length, longest) for length in (size - 5, 3)]
        sequences = [random.integers(0, vocabulary, n).astype(np.int32) for n in lengths]
        means = graphs(sequences)
        assert means is not None
        expected = compute(sequences)
        difference = ((means - expected).abs().max() / expected.abs().max()).item()
        if not difference < _CLOSE:
            raise RuntimeError(f"their values are off by {difference:.2g}")
