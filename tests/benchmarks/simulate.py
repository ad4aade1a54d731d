"""How long a cluster takes for a job's fragments, with slow workers, deaths and start-up.

A discrete-event simulation of what `shared_engine/bulk` does: a driver hands fragments, one after
the other, to workers that hold two each and do one at a time; what dead workers held is done at the
end, by workers that start anew. Seeded: the same table each time.

    python -m tests.benchmarks.simulate

No cluster of this size was measured. `SPEED` is a prediction, the rest of `Cluster` assumptions.
"""

from __future__ import annotations

import argparse
import heapq
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import count

SPEED = 270_000 / 128
"""Rows per second of a worker: the 1B model on an H100 as tests/benchmarks/README.md predicts it,
with 128 tokens per row."""


@dataclass(frozen=True)
class Cluster:
    """Workers, and what goes wrong with them. Times in seconds."""

    workers: int = 1_000
    per_node: int = 8
    start: float = 90.0
    """A worker loads its model; between half and one and a half of it."""
    slow: float = 0.02
    """Share of workers that are slow: a hot GPU, a busy disk."""
    slowness: float = 3.0
    between_deaths: float = 500 * 3600.0
    """Of one worker, on average; it starts again."""
    between_node_deaths: float = 2_000 * 3600.0
    repair: float = 600.0
    """Until a node is replaced."""
    hand_over: float = 0.002
    """Of the driver, for each fragment; the driver does one at a time."""


@dataclass(frozen=True)
class Work:
    """Rows, cut into fragments."""

    rows: int = 1_000_000_000
    rows_per_file: int = 10_000
    in_flight: int = 2
    """Fragments that a worker holds."""
    spread: float = 0.1
    """Standard deviation of the logarithm of a fragment's length: texts differ."""


@dataclass
class Result:
    """What came of it. Times in seconds."""

    makespan: float
    ideal: float
    """All workers busy from the first moment to the last, none ever dead."""
    again: float
    """Share of the work that was lost with a worker and done again."""
    deaths: int
    done: list[int] = field(repr=False)
    """How often each fragment was completed."""


class _Worker:
    def __init__(self, speed: float) -> None:
        self.speed = speed
        self.life = 0
        """Events of a former life are void."""
        self.is_up = False
        self.held: deque[tuple[int, float]] = deque()
        """Fragments, and when the driver had handed each over."""
        self.began = 0.0
        """When it began the first that it holds."""


class _Simulation:
    def __init__(self, cluster: Cluster, work: Work, seed: int) -> None:
        self.cluster, self.work = cluster, work
        self.chance = random.Random(seed)
        usual = work.rows_per_file / SPEED
        fragments = range(-(-work.rows // work.rows_per_file))
        self.lengths = [usual * self.chance.lognormvariate(0, work.spread) for _ in fragments]
        self.workers = [
            _Worker(1 / cluster.slowness if self.chance.random() < cluster.slow else 1.0)
            for _ in range(cluster.workers)
        ]
        self.waiting = deque(fragments)
        self.left_over: list[int] = []
        """What dead workers held."""
        self.in_hand = 0
        """Fragments that workers hold."""
        self.done = [0 for _ in fragments]
        self.events: list[tuple[float, int, str, int, int]] = []  # a heap
        self.order = count()
        self.driver_free = self.lost = 0.0
        self.deaths = 0

    def run(self) -> Result:
        cluster = self.cluster
        for who in range(cluster.workers):
            self.start(who, 0.0)
            self.wait_for("death", who, 0.0, cluster.between_deaths)
        for node in range(0, cluster.workers, cluster.per_node):
            self.wait_for("node", node, 0.0, cluster.between_node_deaths)
        left = len(self.lengths)
        now = 0.0
        while left:
            now, _, kind, who, life = heapq.heappop(self.events)
            if kind == "death":
                if self.workers[who].is_up:
                    self.die(who, now, 0.0)
                self.wait_for(kind, who, now, cluster.between_deaths)
            elif kind == "node":
                for one in range(who, min(who + cluster.per_node, cluster.workers)):
                    self.die(one, now, cluster.repair)
                self.wait_for(kind, who, now, cluster.between_node_deaths)
            elif life == self.workers[who].life:
                left -= kind == "done"
                self.go_on(who, now, is_done=kind == "done")
            if self.left_over and not self.waiting and not self.in_hand:
                self.begin_again(now)
        total = sum(self.lengths)
        ideal = total / sum(worker.speed for worker in self.workers)
        return Result(now, ideal, self.lost / total, self.deaths, self.done)

    def put(self, time: float, kind: str, who: int) -> None:
        life = self.workers[who].life
        heapq.heappush(self.events, (time, next(self.order), kind, who, life))

    def wait_for(self, kind: str, who: int, now: float, between: float) -> None:
        self.put(now + self.chance.expovariate(1 / between), kind, who)

    def start(self, who: int, now: float) -> None:
        self.put(now + self.cluster.start * (0.5 + self.chance.random()), "up", who)

    def go_on(self, who: int, now: float, is_done: bool) -> None:
        worker = self.workers[who]
        worker.is_up = True
        if is_done:
            self.done[worker.held.popleft()[0]] += 1
            self.in_hand -= 1
            if worker.held:
                self.begin(who, now)
        self.hand_over(who, now)

    def begin_again(self, now: float) -> None:
        self.waiting.extend(self.left_over)
        self.left_over.clear()
        for who, worker in enumerate(self.workers):
            if worker.is_up:  # the others are on their way
                worker.life += 1
                worker.is_up = False
                self.start(who, now)

    def hand_over(self, who: int, now: float) -> None:
        worker = self.workers[who]
        while self.waiting and len(worker.held) < self.work.in_flight:
            self.driver_free = max(self.driver_free, now) + self.cluster.hand_over
            worker.held.append((self.waiting.popleft(), self.driver_free))
            self.in_hand += 1
            if len(worker.held) == 1:
                self.begin(who, now)

    def begin(self, who: int, now: float) -> None:
        worker = self.workers[who]
        fragment, arrival = worker.held[0]
        worker.began = max(now, arrival)
        self.put(worker.began + self.lengths[fragment] / worker.speed, "done", who)

    def die(self, who: int, now: float, repair: float) -> None:
        worker = self.workers[who]
        self.deaths += 1
        worker.life += 1
        worker.is_up = False
        if worker.held:
            self.lost += max(0.0, now - worker.began) * worker.speed
        self.left_over.extend(fragment for fragment, _ in worker.held)
        self.in_hand -= len(worker.held)
        worker.held.clear()
        self.start(who, now + repair)


def simulate(cluster: Cluster, work: Work, seed: int = 0) -> Result:
    """Run until every fragment is done."""
    return _Simulation(cluster, work, seed).run()


def list_cases() -> Iterator[tuple[str, Cluster, Work]]:
    """Yield what the table shows: what changes, and what it is then."""
    for rows, workers in (
        (10_000_000, 8), (10_000_000, 64), (1_000_000_000, 64), (1_000_000_000, 1_000),
        (10_000_000_000, 1_000), (10_000_000_000, 10_000),
    ):  # fmt: skip
        for per_file in (10_000, 100_000):
            yield "", Cluster(workers), Work(rows, per_file)
    usual, work = Cluster(), Work()
    for per_file in (1_000, 3_000, 30_000, 300_000):
        yield "", usual, replace(work, rows_per_file=per_file)
    yield "nothing goes wrong", Cluster(start=0, slow=0, hand_over=0, between_deaths=1e12,
                                        between_node_deaths=1e12), work  # fmt: skip
    yield "no start-up", replace(usual, start=0), work
    yield "no slow workers", replace(usual, slow=0), work
    yield "slow is 10 times slower", replace(usual, slowness=10), work
    yield "no deaths", replace(usual, between_deaths=1e12, between_node_deaths=1e12), work
    yield (
        "deaths 100 times as often",
        replace(usual, between_deaths=5 * 3600, between_node_deaths=20 * 3600),
        work,
    )
    yield "a worker holds 1", usual, replace(work, in_flight=1)
    yield "a worker holds 4", usual, replace(work, in_flight=4)


def _name(seconds: float) -> str:
    return f"{seconds / 3600:.2f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    print("| rows | workers | rows per file | files | per worker | | ideal | takes | times | "
          "done again | deaths |")  # fmt: skip
    print("|--:|--:|--:|--:|--:|---|--:|--:|--:|--:|--:|")
    for what, cluster, work in list_cases():
        found = simulate(cluster, work, asked.seed)
        files = len(found.done)
        print(
            f"| {work.rows:,} | {cluster.workers:,} | {work.rows_per_file:,} | {files:,} | "
            f"{files / cluster.workers:,.0f} | {what} | {_name(found.ideal)} | "
            f"{_name(found.makespan)} | {found.makespan / found.ideal:.2f} | "
            f"{found.again:.2%} | {found.deaths:,} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
