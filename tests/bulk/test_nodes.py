"""How many workers a cluster gets, and what each has of its node."""

from __future__ import annotations

import pytest

from shared_engine.distributed.nodes import Node, Share, choose_count, choose_cpus, choose_gpus

CPUS: list[Node] = [(8.0, 0.0), (4.0, 0.0)]
GPUS: list[Node] = [(16.0, 2.0), (8.0, 1.0), (4.0, 0.0)]


@pytest.mark.parametrize(
    ("nodes", "may_use", "expected"), [(CPUS, True, 0.0), (GPUS, True, 1.0), (GPUS, False, 0.0)]
)
def test_an_engine_has_a_gpu_if_it_may_use_one(
    nodes: list[Node], may_use: bool, expected: float
) -> None:
    assert choose_gpus(nodes, may_use) == expected


@pytest.mark.parametrize(
    ("nodes", "share", "expected"),
    [
        (GPUS, Share(1, 1), 3),  # one per GPU
        (GPUS, Share(1, 0.5), 6),
        (GPUS, Share(9, 1), 1),  # a share does not span two nodes
        (CPUS, Share(1, 0), 2),  # one per node
        (CPUS, Share(6, 0), 1),
        (CPUS, Share(99, 0), 1),  # which find_share then refuses
    ],
)
def test_workers_are_one_per_gpu_or_one_per_node(
    nodes: list[Node], share: Share, expected: int
) -> None:
    assert choose_count(nodes, share) == expected


@pytest.mark.parametrize(
    ("count", "gpus", "is_local", "expected"),
    [(1, 0.0, True, 8.0), (2, 0.0, True, 4.0), (3, 0.0, True, 4.0), (4, 0.0, True, 2.0),
     (99, 0.0, True, 1.0), (2, 0.0, False, 1.0), (2, 1.0, True, 1.0)],
)  # fmt: skip
def test_an_engine_on_cores_has_as_many_as_all_can_have(
    count: int, gpus: float, is_local: bool, expected: float
) -> None:
    assert choose_cpus(CPUS, count, gpus, is_local) == expected
