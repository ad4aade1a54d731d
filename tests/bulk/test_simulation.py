"""The simulation of a cluster keeps to what must be so, whatever goes wrong in it."""

from __future__ import annotations

import pytest

from tests.benchmarks.simulate import Cluster, Work, simulate

HARD = Cluster(workers=20, per_node=4, slow=0.2, between_deaths=600.0, between_node_deaths=1200.0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("cluster", [Cluster(workers=20), HARD])
def test_all_is_done_and_nothing_faster_than_it_can_be(cluster: Cluster, seed: int) -> None:
    work = Work(rows=2_000_000, rows_per_file=5_000)
    found = simulate(cluster, work, seed)
    assert found.makespan >= found.ideal
    assert found == simulate(cluster, work, seed)
    assert (found.deaths > 0) == (cluster is HARD)
