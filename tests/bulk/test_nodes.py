"""How many workers a cluster gets, and what each has of its node."""

from __future__ import annotations

from typing import Any

import pytest

from shared_engine import ConfigurationError, Options
from shared_engine.distributed.nodes import Share, divide, find_share

CPUS = [Share(8.0, 0.0), Share(4.0, 0.0)]
GPUS = [Share(16.0, 2.0), Share(8.0, 1.0), Share(4.0, 0.0)]


@pytest.mark.parametrize(("nodes", "expected"), [(CPUS, 0.0), (GPUS, 1.0)])
def test_an_engine_has_a_gpu_if_a_node_has_one(nodes: list[Share], expected: float) -> None:
    assert divide(nodes, None, None, None)[1].gpus == expected


@pytest.mark.parametrize(
    ("nodes", "share", "expected"),
    [
        (GPUS, (1, 1), 3),  # one per GPU
        (GPUS, (1, 0.5), 6),
        (GPUS, (9, 1), 1),  # a share does not span two nodes
        (GPUS, (1, 0), 3),
        (CPUS, (1, 0), 2),  # one per node
        (CPUS, (6, 0), 1),
        (CPUS, (99, 0), 1),  # which find_share then refuses
    ],
)
def test_workers_are_one_per_gpu_or_one_per_node(
    nodes: list[Share], share: tuple[float, float], expected: int
) -> None:
    assert divide(nodes, None, *share) == (expected, Share(*share))


@pytest.mark.parametrize(("count", "expected"), [(1, 8.0), (2, 4.0), (3, 4.0), (4, 2.0), (99, 1.0)])
def test_an_engine_on_cores_has_as_many_as_all_can_have(count: int, expected: float) -> None:
    assert divide(CPUS, count, None, None) == (count, Share(expected, 0.0))


def test_an_engine_on_a_gpu_has_one_core() -> None:
    assert divide(GPUS, 2, None, None) == (2, Share(1.0, 1.0))


@pytest.mark.parametrize("given", [{"count": 0}, {"count": -1}, {"cpus": 0}, {"cpus": -0.5}])
def test_a_number_that_is_not_positive_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="must be greater than 0"):
        find_share(Options(backend="local"), **given)
