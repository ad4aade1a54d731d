"""The server on many machines: replicas of it behind Ray Serve's proxies.

    a client ──► a proxy on each node ──► the replica with the least to do: `create_app`

Ray Serve starts replicas, sends each request to one, adds and removes them by load, replaces those
that die, and lets one that goes finish what it has. A request in flight on a replica that dies is
answered with an error: a client sends it again, as ours does.

Load is requests, not inputs: those of a replica and those that wait for one. Only the proxies know
the latter; the queue of inputs that /v1/metrics tells is that of the replica which was asked.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from shared_engine.distributed.nodes import Share, connect, find_share, import_ray
from shared_engine.endpoints import read_key
from shared_engine.errors import ConfigurationError, EngineError
from shared_engine.options import Options
from shared_engine.server.limits import ServerLimits

_log = logging.getLogger("shared_engine")

READY = "/v1/health/ready"
NAME = "nemoretriever"
"""Of the application, among others on the same cluster."""
DRAIN_SECONDS = 120.0
"""What a replica that goes may take to finish its requests: as long as our client waits for one."""


class Replicas(BaseModel):
    """What to serve, how often, and with how much of a node each."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    options: Options = Field(default_factory=Options)
    served_name: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    limits: ServerLimits = ServerLimits()
    api_key_env: str | None = None
    """Variable with the key, set on every node: a key in here would be stored by Ray."""
    replicas: PositiveInt = 1
    """How many; with `max_replicas`, at least."""
    max_replicas: PositiveInt | None = None
    target_ongoing_requests: PositiveFloat = 16.0
    """Requests per replica, running and waiting, around which their number follows the load."""
    cpus_per_replica: PositiveFloat | None = None
    gpus_per_replica: float | None = Field(default=None, ge=0)


def build(settings: Replicas | Mapping[str, Any]) -> Any:
    """Return the application for `serve.run`, `serve run` or the `import_path` of a Serve config.

    The program is connected to the cluster. Folders in the options, and this package, are on every
    node.

    Raises:
        ConfigurationError: the nodes cannot hold so many replicas.
        pydantic.ValidationError: no such setting, or not a value for it.
        MissingExtraError: Ray is not installed.
    """
    settings = Replicas.model_validate(settings)
    if settings.max_replicas is not None and settings.max_replicas < settings.replicas:
        raise ConfigurationError(
            f"max_replicas is {settings.max_replicas}, fewer than replicas: {settings.replicas}"
        )
    _, share = find_share(
        settings.options,
        settings.replicas,
        cpus=settings.cpus_per_replica,
        gpus=settings.gpus_per_replica,
    )
    serve = import_ray("serve")
    replica = serve.ingress(lambda: _create_app(settings))(_Replica)
    return serve.deployment(replica, name=NAME, **_describe(settings, share)).bind()


def _describe(settings: Replicas, share: Share) -> dict[str, Any]:
    numbers: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        numbers = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_ongoing_requests,
            }
        }
    return numbers | {
        "ray_actor_options": {"num_cpus": share.cpus, "num_gpus": share.gpus},
        # Requests share the engine's steps, and the app itself refuses what is too much.
        "max_ongoing_requests": settings.limits.max_connections,
        "graceful_shutdown_timeout_s": DRAIN_SECONDS,
        "graceful_shutdown_wait_loop_s": 0.5,
        "max_constructor_retry_count": 3,
    }


def _create_app(settings: Replicas) -> Any:
    """Return the app of one replica, where it runs."""
    from shared_engine.server import create_app

    failures: list[Exception] = []
    app = create_app(
        settings.options,
        served_name=settings.served_name,
        api_key=read_key(settings.api_key_env),
        limits=settings.limits,
        allowed_hosts=settings.allowed_hosts,
        on_failure=failures.append,
    )
    app.state.failures = failures
    return app


class _Replica:
    """What Ray Serve asks of a replica besides requests."""

    app: Any
    _has_been_ready = False

    async def check_health(self) -> None:
        """Wait for the model at first, so that no request comes before it; later, ask once."""
        while not await _is_ready(self.app):
            if self._has_been_ready or self.app.state.failures:
                raise EngineError(f"no request can be answered: {self.app.state.failures}")
            await asyncio.sleep(0.1)
        self._has_been_ready = True


async def _is_ready(app: Any) -> bool:
    """Ask an ASGI app what a probe asks."""
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope: dict[str, Any] = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "GET",
    }
    scope |= {"scheme": "http", "path": READY, "raw_path": READY.encode(), "query_string": b""}
    await app(scope | {"headers": [(b"host", b"localhost")], "root_path": ""}, receive, send)
    return bool(sent and sent[0]["status"] == 200)


def serve_replicas(
    settings: Replicas, *, address: str | None = None, host: str = "127.0.0.1", port: int = 8000
) -> None:
    """Serve on a cluster until a signal comes, then finish what was accepted.

    Raises:
        ConfigurationError: there is no cluster at the address, or it cannot hold the replicas.
        EngineError: the model cannot be served; the message has the reason.
        MissingExtraError: Ray is not installed.
    """
    serve = import_ray("serve")
    with connect(address):
        app = build(settings.model_copy(update={"allowed_hosts": (host, *settings.allowed_hosts)}))
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
        stop = threading.Event()
        before = {
            number: signal.signal(number, lambda *_: stop.set())
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            serve.run(app, name=NAME, route_prefix="/")
            _log.info("serving on %s:%d of every node with a replica", host, port)
            stop.wait()
        except RuntimeError as exc:
            raise EngineError(f"the model cannot be served: {exc}") from exc
        finally:
            serve.delete(NAME)  # waits for requests in flight; others' applications stay
            for number, handler in before.items():
                signal.signal(number, handler)
