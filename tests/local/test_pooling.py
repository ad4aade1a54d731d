"""The mean of each sequence is that of its rows, by whichever operators it is computed."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch

from shared_engine.local import pooling
from shared_engine.local.attention import Layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1], [7, 1, 1, 20], [3] * 50])
def test_means(lengths, dtype):
    torch.manual_seed(0)
    hidden = torch.randn(sum(lengths), 16).to(dtype)
    cu_seqlens = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    expected = torch.stack([rows.double().mean(0) for rows in torch.split(hidden, lengths)])
    count = max(1, len(lengths) - 1)  # the last is padding
    on_cpu = pooling.pool(hidden, Layout(lengths, cu_seqlens), count)
    by_product = pooling.mean_by_product(hidden, cu_seqlens)
    for means in (on_cpu, by_product[:count]):
        assert means.dtype == torch.float32
        torch.testing.assert_close(means.double(), expected[:count], atol=1e-6, rtol=1e-6)


def test_an_empty_sequence_has_a_mean_of_0():
    boundaries = torch.tensor([0, 2, 2, 3], dtype=torch.int32)
    means = pooling.mean_by_product(torch.ones(3, 4), boundaries)
    assert means.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", [2, 1_024])
def test_an_overflow_is_that_of_its_sequence_alone(value, group):
    hidden = torch.ones(6, 4, dtype=torch.float16)
    hidden[4, 1] = value
    layout = Layout([1, 2, 2, 1], torch.tensor([0, 1, 3, 5, 6], dtype=torch.int32))
    with (
        mock.patch.object(pooling, "_GROUP", group),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(pooling, "_multiply_in_float32", lambda a, b: a.float() @ b.float()),
    ):
        means = pooling.pool(hidden, layout, 4)
    assert torch.isfinite(means).all(dim=1).tolist() == [True, True, False, True]
    assert means[[0, 1, 3]].tolist() == [[1.0] * 4] * 3


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_a_gpu_takes_sequences_in_groups(count):
    hidden = torch.randn(5, 4)
    layout = Layout([1] * 5, torch.arange(6, dtype=torch.int32))
    with (
        mock.patch.object(pooling, "_GROUP", 2),
        mock.patch.object(torch.Tensor, "is_cuda", True),
        mock.patch.object(pooling, "_multiply_in_float32", torch.mm),
    ):
        means = pooling.pool(hidden, layout, count)
    torch.testing.assert_close(means, hidden[:count])
