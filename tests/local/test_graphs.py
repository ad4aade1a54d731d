"""A step in a bucket gives what it gives without, whatever was in the bucket before.

Here a bucket "replays" by computing again; that a GPU records it is for test_gpu.py to tell.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from shared_engine.local import attention, graphs, llama
from shared_engine.local.attention import Layout
from shared_engine.local.checkpoint import resolve
from shared_engine.local.device import Placement, select_devices
from shared_engine.local.llama import Encoder
from shared_engine.options import Options
from shared_engine.vectors import unit


def by_boundaries(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attention that reads the boundaries when it runs, as a GPU's kernel does."""
    ends = layout.cu_seqlens.tolist()
    lengths = [b - a for a, b in itertools.pairwise(ends) if b > a]
    assert max(lengths) <= layout.max_seqlen
    return attention.per_sequence(q, k, v, Layout(lengths, layout.cu_seqlens))


@pytest.fixture
def encoder(checkpoint: Path) -> Encoder:
    found = resolve(Options(model=checkpoint))
    (placement,) = select_devices("cpu", "float32", None, found.config)
    return Encoder(found, replace(placement, kernel=by_boundaries))


def make_graphs(encoder: Encoder, log: list[int] | None = None) -> graphs.QueryGraphs:
    def forward(ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        if log is not None:
            log.append(len(ids))
        x = torch.nn.functional.embedding(ids, encoder._embedding)
        return encoder._forward(x, positions, layout, encoder._buffers)

    recorder = mock.patch.object(graphs, "_make_recorder", return_value=lambda step: step)
    with torch.inference_mode(), recorder:
        return graphs.QueryGraphs(forward, 64, encoder.device)


def draw(*lengths: int) -> list[np.ndarray]:
    random = np.random.default_rng(sum(lengths))
    return [random.integers(5, 300, length).astype(np.int32) for length in lengths]


STEPS = [[7], [1], [33], [16], [128], [5, 5], [1] * 8, [120, 8], [3, 40, 2], [64], [17]]


def test_a_replay_gives_the_same_means_after_other_replays(encoder):
    replayed: list[int] = []
    recorded = make_graphs(encoder, replayed)
    for lengths in [*STEPS, *reversed(STEPS)]:
        sequences = draw(*lengths)
        order = np.argsort(lengths, kind="stable")
        expected = encoder(sequences).numpy()[order]
        with torch.inference_mode():
            means = recorded([sequences[i] for i in order])
        assert means.dtype == torch.float32
        assert np.abs(unit(means.numpy().copy()) - unit(expected)).max() <= 1e-6
        assert replayed[-1] == next(n for n in graphs.SIZES if n >= sum(lengths))


@pytest.mark.parametrize("lengths", [[129], [100, 29], [1] * 9])
def test_a_step_that_fits_no_bucket_has_no_graph(encoder, lengths):
    assert make_graphs(encoder)(draw(*lengths)) is None


@pytest.fixture
def placement(encoder: Encoder, checkpoint: Path, monkeypatch) -> Placement:
    """A CPU whose attention passes for the kernel of a GPU that graphs are for."""
    found = resolve(Options(model=checkpoint))
    (placed,) = select_devices("cpu", "float32", None, found.config)
    monkeypatch.setattr(llama, "varlen", by_boundaries)
    monkeypatch.setattr(graphs, "_make_recorder", lambda _: lambda step: step)
    return replace(placed, kernel=by_boundaries)


def test_an_encoder_with_graphs_gives_the_same_vectors(encoder, placement):
    recorded, why = encoder._record_graphs(placement)
    assert why == "CUDA graphs for up to 128 tokens"
    for lengths in STEPS:
        expected = encoder(draw(*lengths)).numpy()
        encoder._graphs = recorded
        assert np.abs(unit(encoder(draw(*lengths)).numpy()) - unit(expected)).max() <= 1e-6
        encoder._graphs = None


def fail(*_):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize(
    ("record", "said"),
    [
        (fail, "no CUDA graphs: operation not permitted when stream is capturing"),
        (lambda *_: lambda: None, "no CUDA graphs: their values differ by"),
    ],
)
def test_graphs_that_fail_or_differ_change_nothing_but_the_description(
    encoder, placement, monkeypatch, record, said
):
    monkeypatch.setattr(graphs, "_make_recorder", lambda _: record)
    recorded, why = encoder._record_graphs(placement)
    assert recorded is None
    assert why.startswith(said)
    assert "\n" not in why


@pytest.mark.parametrize(("noise", "is_same"), [(0.04, True), (1.0, False)])
def test_a_check_of_graphs_accepts_rounding_and_no_more(noise, is_same):
    """The 1B model in bfloat16 differs by up to 0.04 where sums have another order."""

    def compute(sequences: list[np.ndarray]) -> Tensor:
        return torch.stack([torch.linspace(-1, 1, 64) * len(ids) for ids in sequences])

    def replay(sequences: list[np.ndarray]) -> Tensor:
        means = compute(sequences)
        return means + noise * means.abs().max()

    outcome = nullcontext() if is_same else pytest.raises(RuntimeError, match="values differ by 1")
    with outcome:
        graphs.check_graphs(replay, compute, 300, 512)


def test_a_gpu_that_is_lost_while_graphs_are_recorded_ends_the_loading(
    encoder, placement, monkeypatch
):
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    error = mock.Mock(side_effect=lost)
    monkeypatch.setattr(torch.cuda, "synchronize", error)
    monkeypatch.setattr(graphs, "_make_recorder", error)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        encoder._record_graphs(placement)


def test_only_kernels_that_read_boundaries_on_the_device_are_recorded(encoder, placement):
    other = replace(placement, kernel=attention.efficient)
    assert encoder._record_graphs(other)[0] is None


def test_positions_stay_in_the_table_of_a_model_with_a_small_limit(checkpoint, placement):
    """A GPU would die of an index that is out of range."""
    found = resolve(Options(model=checkpoint, max_tokens=10))
    short = Encoder(found, placement)
    assert len(short._cos) == found.longest == 10
    assert short._record_graphs(placement)[0] is not None
