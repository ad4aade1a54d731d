"""Ray's nodes: the way to them, and whether they can hold what is wanted before it waits for ever.

An actor that fits nowhere waits without a word, so what is wanted is counted first, per node.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from shared_engine.errors import ConfigurationError, MissingExtraError
from shared_engine.options import Options
from shared_engine.routing import select_backend

_log = logging.getLogger("shared_engine")

_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Of a cluster that we start: nothing is reported to Ray's makers, and its workers are no lesser
processes than this one."""


def import_ray(part: str = "") -> Any:
    """Return Ray, or a part of it such as "data".

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import ray

        return importlib.import_module(f"ray.{part}") if part else ray
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            f"a cluster needs {exc.name!r}: pip install 'nemoretriever-embeddings[ray]'"
        ) from exc


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Be connected to the cluster at an address, as `ray.init` takes it, while the block runs.

    None is the cluster that RAY_ADDRESS names or that runs on this machine, else a new one on this
    machine that ends with the block. A connection that the program has already is used and kept.

    Raises:
        ConfigurationError: there is no cluster at the address.
        MissingExtraError: Ray is not installed.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    before = {name: os.environ.get(name) for name in _SETTINGS}
    os.environ.update({name: value for name, value in _SETTINGS.items() if before[name] is None})
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
    except ConnectionError as exc:
        raise ConfigurationError(f"there is no Ray cluster at {address}: {exc}") from exc
    finally:  # the cluster that was started has them; what this process starts later need not
        for name, value in before.items():
            if value is None:
                del os.environ[name]
    try:
        yield
    finally:
        ray.shutdown()


@dataclass(frozen=True)
class Share:
    """What one actor with an engine has of its node."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.cpus:g} CPU{gpus}"


def find_share(
    options: Options,
    count: int | None = None,
    *,
    cpus: float | None = None,
    gpus: float | None = None,
) -> tuple[int, Share]:
    """Return how many actors with an engine of some options there can be, and the share of each.

    What is not given: a NIM's client takes a core, one on each node. A model takes a GPU and a core
    beside it where nodes have GPUs and its device is not the CPU, on all of them. Else one on each
    node, with as many cores as all of them can have: Ray lets an actor compute with as many threads
    as it has cores.

    Raises:
        ConfigurationError: the nodes cannot hold so many of such shares.
    """
    nodes = _read_nodes()
    is_local = select_backend(options).base_url is None
    if gpus is None:
        has_gpus = is_local and options.device != "cpu" and any(node[1] for node in nodes)
        gpus = 1.0 if has_gpus else 0.0
    wanted = count or sum(_count([node], Share(cpus or 1, gpus)) > 0 for node in nodes)
    if gpus and count is None:
        wanted = _count(nodes, Share(cpus or 1, gpus))
    if cpus is None:
        most = int(max((node[0] for node in nodes), default=0)) if is_local and not gpus else 1
        fitting = (n for n in range(most, 1, -1) if _count(nodes, Share(n, gpus)) >= wanted)
        cpus = float(next(fitting, 1))
    share = Share(cpus, gpus)
    room = _count(nodes, share)
    if room < max(1, wanted):
        there = ", ".join(str(Share(*node)) for node in nodes) or "none"
        raise ConfigurationError(
            f"{max(1, wanted)} workers of {share} each are wanted, and the cluster has room for "
            f"{room}; its nodes have: {there}"
        )
    _log.info("%d workers on %d nodes, each with %s", wanted, len(nodes), share)
    return wanted, share


def count_room(share: Share) -> int:
    """Return how many of a share the nodes hold that are there now."""
    return _count(_read_nodes(), share)


def _read_nodes() -> list[tuple[float, float]]:
    """Return the cores and GPUs of each node."""
    return [
        (node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in import_ray().nodes()
        if node["Alive"]
    ]


def _count(nodes: list[tuple[float, float]], share: Share) -> int:
    """Return how many shares the nodes hold; a share does not span two nodes."""
    wanted = (share.cpus, share.gpus)
    return sum(
        min(int(has / wants + 1e-9) for has, wants in zip(node, wanted, strict=True) if wants)
        for node in nodes
    )
