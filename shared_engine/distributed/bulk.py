"""A job on a cluster: Ray Data hands its fragments to one engine per actor.

    missing fragments ──► a row per block ──► a pool of actors ──► Done, or what went wrong
                                              each: an Embedder, `embed_fragment`, two at a time

An actor writes the files itself, as a local run does, so they are the same files: nothing but
counts comes back. An actor that dies is started again where there is room for it, and what it had
in hand is done at the end, by a pool of as many as there is room for then: Ray's own way, to keep
it for that actor, waits for ever where its node does not come back, and for ever with a fragment
that ends every actor. What a driver that dies had not done, the next run does. Inputs and the
folder of results are at the same paths on every node; a model's folder, and this package, are on
every node too.
"""

from __future__ import annotations

import logging
import pickle
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import pyarrow as pa

from shared_engine.bulk.fragment import embed_fragment
from shared_engine.bulk.job import Fragment, Job, Unread
from shared_engine.bulk.manifest import Done
from shared_engine.bulk.run import Summary, begin, finish
from shared_engine.distributed.nodes import Share, connect, count_room, find_share, import_ray
from shared_engine.embedder import Embedder
from shared_engine.errors import EngineError, InputError, NeMoRetrieverError

AT_ONCE = 2
"""Fragments of an actor: one whose last rows are computed, and one that is read meanwhile."""
_TRIES = 3
"""How often a fragment is begun whose actor dies: it may be the reason, as by its memory."""

_log = logging.getLogger("shared_engine")

Outcome = tuple[Fragment, Done | NeMoRetrieverError]
"""A fragment, and what became of it."""


def run_ray(
    job: Job,
    address: str | None = None,
    *,
    workers: int | None = None,
    cpus_per_worker: float | None = None,
    gpus_per_worker: float | None = None,
) -> Summary:
    """Do what is missing of a job on a cluster, as `run_local` does here.

    `address` is as `ray.init` takes it; None is the cluster that RAY_ADDRESS names or that runs on
    this machine, else a new one on it. How many workers, and what they have of a node, is chosen
    where it is not given. The key is no part of a job: each node has NVIDIA_API_KEY for itself.

    Raises:
        ConfigurationError: no cluster is at the address, or it cannot hold the workers; the folder
            is another job's; a source changed.
        EngineError: the cluster failed at more than it mends itself.
        NeMoRetrieverError: what ended the run, as `embed_fragment` raises it. What was done stays.
        MissingExtraError: Ray is not installed.
    """
    import_ray("data")
    started = time.perf_counter()
    work = begin(job)
    done: list[Done] = []
    unread: list[Unread] = []
    if work.missing:
        with connect(address):
            count, share = find_share(
                job.options, workers, cpus=cpus_per_worker, gpus=gpus_per_worker
            )
            with closing(embed_fragments(job, work.missing, count, share)) as outcomes:
                for fragment, outcome in outcomes:
                    if isinstance(outcome, Done):
                        done.append(outcome)
                    elif isinstance(outcome, InputError) and not job.strict:
                        lost = Unread(fragment.title, fragment.first, fragment.rows, outcome)
                        unread.append(lost)
                    else:
                        raise outcome
    return finish(job, work, done, unread, time.perf_counter() - started)


def embed_fragments(
    job: Job,
    fragments: Sequence[Fragment],
    workers: int,
    share: Share,
    embed: Callable[..., Done] = embed_fragment,
) -> Generator[Outcome, None, None]:
    """Yield what became of fragments, as they end; closing the iterator stops the actors.

    `embed` does what `embed_fragment` does. The program is connected to a cluster.

    Raises:
        EngineError: actors cannot start, or died too often with the same fragments.
    """
    missing = {fragment.name: fragment for fragment in fragments}
    for number in range(_TRIES):
        if number:
            _log.warning("%d fragments ended with their workers, and are begun again", len(missing))
            workers = max(1, min(workers, count_room(share)))
        with closing(_run_pool(job, list(missing.values()), workers, share, embed)) as outcomes:
            for fragment, outcome in outcomes:
                if missing.pop(fragment.name, None) is not None:
                    yield fragment, outcome
        if not missing:
            return
    titles = sorted({fragment.title for fragment in missing.values()})
    raise EngineError(
        f"{len(missing)} fragments ended with their workers {_TRIES} times, those of "
        f"{', '.join(titles[:3])} among them: do the workers have enough memory?"
    )


def _run_pool(
    job: Job,
    fragments: Sequence[Fragment],
    workers: int,
    share: Share,
    embed: Callable[..., Done],
) -> Generator[Outcome, None, None]:
    """Yield what became of fragments, but for those that ended with their actors."""
    ray, data = import_ray(), import_ray("data")
    if not fragments:
        return
    with warnings.catch_warnings(action="ignore"):  # of its own settings, at the first call
        context = data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.max_consecutive_actor_init_deaths = 3
    context.max_errored_blocks = -1  # what fails for another reason than a death is an outcome
    with data.DataContext.current(context), _told_by_us():
        rows = [{"fragment": pickle.dumps(fragment)} for fragment in fragments]
        pool = data.ActorPoolStrategy(
            size=min(workers, len(rows)),
            max_tasks_in_flight_per_actor=AT_ONCE,
            max_concurrent_calls_per_actor=AT_ONCE,
            enable_true_multi_threading=True,
        )
        with warnings.catch_warnings(action="ignore"):  # of `max_task_retries`, without another way
            outcomes = data.from_items(rows, override_num_blocks=len(rows)).map_batches(
                _Worker,
                fn_constructor_args=[job, embed],
                batch_size=1,
                batch_format="pyarrow",
                num_cpus=share.cpus,
                num_gpus=share.gpus,
                max_task_retries=0,
                compute=pool,
            )
        try:
            for batch in outcomes.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from map(pickle.loads, batch["outcome"].to_pylist())
        except ray.exceptions.RayError as exc:
            raise EngineError(f"the cluster failed: {exc}") from exc


@contextmanager
def _told_by_us() -> Iterator[None]:
    """Keep Ray Data's own words back, which are of blocks and tracebacks, while the block runs."""
    log = logging.getLogger("ray.data")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        log.setLevel(before)


class _Worker:
    """The engine of one actor, which loads at its first fragment."""

    def __init__(self, job: Job, embed: Callable[..., Done]) -> None:
        self._job = job
        self._embed_fragment = embed
        self._embedder = Embedder(job.options)
        self._reading = threading.Lock()

    def __call__(self, batch: Any) -> Any:
        """Embed the fragments of a batch, while another call ends its own."""
        outcomes = [self._embed(pickle.loads(each)) for each in batch["fragment"].to_pylist()]
        return pa.table({"outcome": [pickle.dumps(outcome) for outcome in outcomes]})

    def _embed(self, fragment: Fragment) -> Outcome:
        with ExitStack() as turn:
            turn.enter_context(self._reading)
            try:
                done = self._embed_fragment(self._job, self._embedder, fragment, on_read=turn.close)
            except NeMoRetrieverError as exc:
                return fragment, exc
            except Exception:  # Ray would drop it
                error = EngineError(f"{fragment.title}: {traceback.format_exc()}")
                return fragment, error
        return fragment, done
