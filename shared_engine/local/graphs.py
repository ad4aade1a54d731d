"""CUDA graphs for small steps of queries: one launch replaces more than a hundred.

A graph replays kernels with the shapes and addresses of its recording, so a step is padded to a
bucket. Its padding is a last sequence, to which no token of another attends and which has no mean.
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
from shared_engine.local.memory import pin, recording
from shared_engine.local.pooling import mean_by_product

SIZES = (16, 32, 64, 128)
"""Number of tokens of each bucket."""
_SEQUENCES = 8
"""Maximum number of sequences of a step; a search has one, and several may share a step."""
_TOLERANCE = 0.2
"""Maximum difference between a replay and the same step without a graph, relative to its largest
absolute value. In bfloat16, sums in another order change values by up to 0.02 in the 300M model and
0.04 in the 1B; one token that another sequence attends to changes them by 1 (measured)."""

Forward = Callable[[Tensor, Tensor, Layout], Tensor]
"""(ids (T,), positions (T,), layout) -> hidden states (T, hidden)."""
Record = Callable[[Callable[[], None]], Callable[[], Any]]
"""From a function that uses tensors at fixed addresses to a function that repeats its kernels."""


class QueryGraphs:
    """One recorded bucket of each size. Not thread-safe."""

    def __init__(self, forward: Forward, width: int, device: torch.device) -> None:
        """Record `forward` in every bucket.

        The caller must keep all other tensors that `forward` reads or writes, because a graph holds
        only their addresses. The graphs hold no reference to `forward`, which avoids a cycle.

        Args:
            width: Width of the hidden states.
        """
        record = _make_recorder(device)
        self._device = device
        # The largest first: the others reuse its memory.
        self._buckets = {
            size: _Bucket(size, forward, width, device, record) for size in reversed(SIZES)
        }

    def __call__(self, sequences: Sequence[NDArray[np.int32]]) -> Tensor | None:
        """Return the mean of each sequence's hidden states, or None if the step fits no bucket.

        The result, (S, width) float32, is valid until the next call.
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
        cu_seqlens[1:-1] = tokens  # the other sequences are empty
        cu_seqlens[1 : len(lengths) + 1] = np.cumsum(lengths)
        cu_seqlens[-1] = size
        bucket = self._buckets[size]
        bucket.inputs.copy_(pin(inputs, self._device), non_blocking=True)
        bucket.replay()
        return bucket.means[: len(lengths)]


class _Bucket:
    """Inputs and outputs at fixed addresses, and a recording that computes the outputs."""

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
    """Return a function that records steps as CUDA graphs, which share a memory pool.

    A memory pool belongs to one stream. Each model has its own stream, because the pool of the
    first model that records on a stream holds its cuBLAS workspace.
    """
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return partial(_capture, device, stream, torch.cuda.graph_pool_handle())


def _capture(
    device: torch.device, stream: torch.cuda.Stream, pool: Any, step: Callable[[], None]
) -> Callable[[], Any]:
    """Record a step as a CUDA graph; other threads may use the device during it.

    Nothing but recordings runs on `stream`, so the pool of the graphs holds its cuBLAS workspace.
    Otherwise replays would write to freed memory once torch's workspaces are cleared, as by
    torch.compile, or by newer versions of torch at the end of the recording thread.
    """
    current = torch.cuda.current_stream(device)
    with torch.cuda.device(device), torch.cuda.stream(current):  # restored if the recording fails
        step()  # libraries and Triton initialize here, outside the graph
        graph = torch.cuda.CUDAGraph()
        with (
            recording,
            torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"),
        ):
            step()
    return graph.replay


def check_graphs(
    graphs: QueryGraphs, compute: Callable[..., Tensor], vocabulary: int, longest: int
) -> None:
    """Compare replays of every bucket with the same steps computed without a graph.

    Raises:
        RuntimeError: the values differ.
    """
    random = np.random.default_rng(0)
    for size in (*SIZES, *SIZES):  # twice, so that each runs after all others
        lengths = [min(length, longest) for length in (size - 5, 3)]
        sequences = [random.integers(0, vocabulary, n).astype(np.int32) for n in lengths]
        means = graphs(sequences)
        assert means is not None
        expected = compute(sequences)
        difference = ((means - expected).abs().max() / expected.abs().max()).item()
        if not difference < _TOLERANCE:
            raise RuntimeError(f"their values differ by {difference:.2g}")
