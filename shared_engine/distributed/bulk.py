"""A bulk job on a Ray cluster: actors with an engine each, which take fragments until all are done.

    missing fragments ──► actors: an `Embedder`, `embed_fragment`, two at a time ──► `Done` or error

An actor writes its files itself, so they are those of a local run; only counts come back. Each
actor takes fragments in order, so that it reads a table on from where it was. If an actor dies, its
fragments go back to the others, and a new actor starts on a node with enough free resources. If the
driver dies, the next run does the missing work. Inputs, the folder of results, the model and this
package are at the same paths on every node.
"""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections import Counter
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from typing import Any

from shared_engine.bulk.fragment import embed_fragment
from shared_engine.bulk.job import Fragment, Job, Unread
from shared_engine.bulk.manifest import Done
from shared_engine.bulk.run import Summary, begin, finish
from shared_engine.bulk.tables import Cursors
from shared_engine.distributed.nodes import Share, connect, find_share, import_ray
from shared_engine.embedder import Embedder
from shared_engine.errors import EngineError, InputError, NeMoRetrieverError

AT_ONCE = 2
"""Fragments of an actor: it reads one while the last rows of the other are computed."""
_TRIES = 3
"""How often a fragment is tried whose actor dies, and how many actors in a row may die at start:
the fragment may be the reason, for example by its memory."""

_log = logging.getLogger("shared_engine")


def run_ray(
    job: Job,
    address: str | None = None,
    *,
    workers: int | None = None,
    cpus_per_worker: float | None = None,
    gpus_per_worker: float | None = None,
) -> Summary:
    """Embed the unfinished fragments of a job on a cluster, as `run_local` does on this machine.

    The API key is not part of a job: set NVIDIA_API_KEY on every node.

    Args:
        job: The job.
        address: as `ray.init` takes it; None is the cluster of RAY_ADDRESS, else a new one on this
            machine.
        workers: number of actors with an engine; default: as many as fit, see `find_share`.
        cpus_per_worker: cores of each.
        gpus_per_worker: GPUs of each.

    Raises:
        ConfigurationError: no cluster at the address, or it cannot hold the workers; else as
            `begin` raises it.
        EngineError: workers cannot start, or the same fragments ended them several times.
        NeMoRetrieverError: the error that ended the run, as `embed_fragment` raises it. What was
            finished is kept.
        MissingExtraError: Ray is not installed.
    """
    import_ray()
    started = time.perf_counter()
    outcomes: list[Done | Unread] = []
    with begin(job) as work:
        if work.missing:
            with connect(address):
                count, share = find_share(
                    job.options, workers, cpus=cpus_per_worker, gpus=gpus_per_worker
                )
                with closing(embed_fragments(job, work.missing, count, share)) as found:
                    for outcome in found:
                        if isinstance(outcome, NeMoRetrieverError):
                            raise outcome
                        outcomes.append(outcome)
        return finish(job, work, outcomes, time.perf_counter() - started)


def embed_fragments(
    job: Job, fragments: Sequence[Fragment], workers: int, share: Share
) -> Generator[Done | Unread | NeMoRetrieverError, None, None]:
    """Yield the outcomes of fragments, as they end; closing the iterator ends the actors.

    Args:
        job: the job of the fragments.
        fragments: The fragments, in the order in which to read them.
        workers: number of actors.
        share: Resources of each actor.

    Raises:
        EngineError: workers cannot start, or the same fragments ended them several times.
    """
    ray = import_ray()
    actors = ray.remote(Worker).options(
        num_cpus=share.cpus, num_gpus=share.gpus, max_concurrency=AT_ONCE
    )
    workers = min(workers, len(fragments))
    waiting = set(range(len(fragments)))
    starts = [number * len(fragments) // workers for number in range(workers)]
    tries: Counter[int | None] = Counter()
    """How often a fragment was lost with its actor; None: how many actors died at their start."""
    calls: dict[Any, tuple[Any, int | None]] = {}
    """Calls in flight, with actor and number of the fragment; None while the actor starts."""

    def start() -> None:
        actor = actors.remote(job)
        calls[actor.start.remote()] = (actor, None)

    def submit(actor: Any, number: int | None) -> int | None:
        """Give an actor a fragment, this one if it waits; return the number of the next."""
        if not waiting:
            return None
        number = number if number in waiting else next(iter(waiting))
        waiting.remove(number)
        calls[actor.embed.remote(fragments[number])] = (actor, number)
        return number + 1

    try:
        for _ in range(workers):
            start()
        while waiting or any(number is not None for _, number in calls.values()):
            (call,), _ = ray.wait(list(calls))
            actor, number = calls.pop(call)
            try:
                outcome = ray.get(call)
            except ray.exceptions.RayError as exc:
                in_hand = [ref for ref, (other, _) in calls.items() if other is actor]
                numbers = {number, *(calls.pop(ref)[1] for ref in in_hand)}
                lost = {number for number in numbers if number is not None}
                waiting |= lost
                tries.update(lost or [None])
                if tries[None] == _TRIES:
                    raise EngineError(f"{_TRIES} workers died at their start: {exc}") from exc
                if exhausted := [fragments[n] for n in lost if tries[n] == _TRIES]:
                    titles = sorted({fragment.title for fragment in exhausted})
                    raise EngineError(
                        f"{len(exhausted)} fragments ended with their workers {_TRIES} times, "
                        f"those of {', '.join(titles[:3])} among them: do the workers have enough "
                        "memory?"
                    ) from exc
                _log.warning(
                    "%d fragments ended with their workers, and are begun again", len(lost)
                )
                start()
                continue
            if number is None:
                del tries[None]
                following = starts.pop(0) if starts else None
                for _ in range(AT_ONCE):
                    following = submit(actor, following)
            else:
                yield outcome
                submit(actor, number + 1)
    finally:
        for actor in {id(actor): actor for actor, _ in calls.values()}.values():
            ray.kill(actor)


class Worker:
    """The engine of one actor; it loads at the first fragment."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._embedder = Embedder(job.options)
        self._reading = threading.Lock()
        self._cursors = Cursors()

    def start(self) -> None:
        """Return: the actor has started."""

    def embed(self, fragment: Fragment) -> Done | Unread | NeMoRetrieverError:
        """Embed a fragment; return an error that ends the run instead of raising it."""
        with ExitStack() as turn:
            turn.enter_context(self._reading)
            try:
                return embed_fragment(
                    self._job, self._embedder, fragment, on_read=turn.close, cursors=self._cursors
                )
            except NeMoRetrieverError as exc:
                if self._job.strict or not isinstance(exc, InputError):
                    return exc
                return Unread(fragment.title, fragment.first, fragment.rows, exc)
            except Exception:
                return EngineError(f"{fragment.title}: {traceback.format_exc()}")
