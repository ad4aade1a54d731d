"""Connect to a Ray cluster, and choose how many workers its nodes can hold.

Ray lets an actor that fits on no node wait without an error, so free resources are counted first.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from shared_engine._lazy import needs_extra
from shared_engine.errors import ConfigurationError
from shared_engine.options import EngineOptions
from shared_engine.routing import select_backend

_log = logging.getLogger("shared_engine")

_SETTINGS = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Environment of Ray: no usage reports, workers of normal priority."""
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Environment of a cluster that is started here: all its processes listen on 127.0.0.1 only, as Ray
does on Windows and macOS. On Linux they would listen on every interface."""


def import_ray(part: str = "") -> Any:
    """Return Ray, or a module of it such as "serve".

    Raises:
        MissingExtraError: it is not installed.
    """
    with needs_extra("ray"):
        import ray

        return importlib.import_module(f"ray.{part}") if part else ray


@contextmanager
def connect(address: str | None) -> Iterator[None]:
    """Connect to the cluster at an address, as `ray.init` takes it, while the block runs.

    None is the cluster of RAY_ADDRESS, else a new one on this machine, which ends with the block
    and listens on 127.0.0.1 only. A cluster that runs on this machine is used only with "auto",
    because Ray finds it by a file in /tmp, which any user can write. If the program is connected
    already, that connection is used and kept.

    Raises:
        ConfigurationError: there is no cluster at the address.
        MissingExtraError: Ray is not installed.
    """
    ray = import_ray()
    if ray.is_initialized():
        yield
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    is_new = address == "local"
    settings = _SETTINGS | (_LOOPBACK if is_new else {})
    added = settings.keys() - os.environ.keys()
    os.environ.update({name: settings[name] for name in added})
    # Ray read the environment when it was imported; the variable reaches only its other processes.
    constants: Any = importlib.import_module("ray._private.ray_constants")
    may_span_nodes = constants.ENABLE_RAY_CLUSTER
    constants.ENABLE_RAY_CLUSTER = may_span_nodes and not is_new
    try:
        ray.init(
            address,
            include_dashboard=False if is_new else None,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    except (ConnectionError, ValueError) as exc:  # ValueError: not an address
        raise ConfigurationError(f"there is no Ray cluster at {address}: {exc}") from exc
    finally:  # they are for the cluster only, not for later children of this process
        constants.ENABLE_RAY_CLUSTER = may_span_nodes
        for name in added:
            del os.environ[name]
    try:
        yield
    finally:
        ray.shutdown()


class Share(NamedTuple):
    """Cores and GPUs of a node, or the part of them that one actor has."""

    cpus: float
    gpus: float

    def __str__(self) -> str:
        gpus = f" and {self.gpus:g} GPU" if self.gpus else ""
        return f"{self.cpus:g} CPU{gpus}"


def find_share(
    options: EngineOptions,
    count: int | None = None,
    *,
    cpus: float | None = None,
    gpus: float | None = None,
) -> tuple[int, Share]:
    """Return the number of actors with an engine, and the resources of each; see `divide`.

    Raises:
        ConfigurationError: a number is not positive, or the nodes cannot hold so many such shares.
    """
    for name, value in (("workers", count), ("cpus", cpus)):
        if value is not None and value <= 0:
            raise ConfigurationError(f"{name}={value}: must be greater than 0")
    nodes = [
        Share(node["Resources"].get("CPU", 0.0), node["Resources"].get("GPU", 0.0))
        for node in import_ray().nodes()
        if node["Alive"]
    ]
    is_local = select_backend(options).base_url is None
    if gpus is None and not (is_local and options.device != "cpu"):
        gpus = 0.0
    if cpus is None and not is_local:
        cpus = 1.0
    count, share = divide(nodes, count, cpus, gpus)
    fitting = _count(nodes, share)
    if fitting < count:
        there = ", ".join(map(str, nodes)) or "none"
        raise ConfigurationError(
            f"{count} workers of {share} each do not fit: the cluster holds {fitting}; its "
            f"nodes have: {there}"
        )
    _log.info("%d workers on %d nodes, each with %s", count, len(nodes), share)
    return count, share


def divide(
    nodes: Sequence[Share], count: int | None, cpus: float | None, gpus: float | None
) -> tuple[int, Share]:
    """Return the number of actors and the share of each, with defaults for what is None.

    - `gpus`: 1 if a node has one, else 0.
    - `count`: an actor per GPU; without GPUs, one on each node that can hold it; at least 1.
    - `cpus`: 1 with a GPU, else as many as all actors can have, as Ray limits the threads of an
      actor to its number of cores.
    """
    if gpus is None:
        gpus = 1.0 if any(node.gpus for node in nodes) else 0.0
    if count is None:
        share = Share(cpus or 1.0, gpus)
        held = [_count([node], share) for node in nodes]
        count = max(1, sum(held) if gpus else sum(each > 0 for each in held))
    if cpus is None:
        most = 1 if gpus else int(max((node.cpus for node in nodes), default=0))
        choices = (float(cores) for cores in range(most, 1, -1))
        fitting = (each for each in choices if _count(nodes, Share(each, gpus)) >= count)
        cpus = next(fitting, 1.0)
    return count, Share(cpus, gpus)


def _count(nodes: Sequence[Share], share: Share) -> int:
    """Return how many shares the nodes hold; a share does not span two nodes."""
    return sum(
        min(int(has / part + 1e-9) for has, part in zip(node, share, strict=True) if part)
        for node in nodes
    )
