"""Server replicas on many machines behind the proxies of Ray Serve.

    a client ──► a proxy on each node ──► the replica with the fewest requests: `create_app`

Ray Serve starts replicas, routes requests, scales by load, replaces replicas that die, and drains
those that it stops. A request in flight on a replica that dies fails; our client retries it.

Load counts requests, not inputs: those that a replica has, and those that wait for one. Only the
proxies know the latter; /v1/metrics shows the queue of the replica that answers.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Mapping
from typing import Any, Literal

import httpx
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt

from shared_engine.distributed.nodes import connect, find_share, import_ray
from shared_engine.endpoints import read_key
from shared_engine.errors import ConfigurationError, EngineError
from shared_engine.options import Options, RerankOptions
from shared_engine.server.limits import ServerLimits

_log = logging.getLogger("shared_engine")

NAME = "nemoretriever"
"""Name of the application on the cluster."""
_MOST_ONGOING = 512
"""Requests of a replica; more wait in the proxies."""


class Replicas(BaseModel):
    """The models to serve, the number of replicas, and the share of a node for each."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    options: Options | None = None
    """None with `rerank_options` serves no embedding model, else the default one."""
    rerank_options: RerankOptions | None = None
    served_name: str | None = None
    rerank_served_name: str | None = None
    allowed_hosts: tuple[str, ...] = ()
    limits: ServerLimits = ServerLimits()
    default_input_type: Literal["query", "passage"] | None = None
    api_key_env: str | None = None
    """Environment variable with the API key, set on every node. Ray would store the key itself."""
    replicas: PositiveInt = 1
    """Number of replicas; the minimum if `max_replicas` is set."""
    max_replicas: PositiveInt | None = None
    target_ongoing_requests: PositiveFloat = 16.0
    """Running and waiting requests per replica that autoscaling aims at."""
    cpus_per_replica: PositiveFloat | None = None
    gpus_per_replica: float | None = Field(default=None, ge=0)


def build(settings: Replicas | Mapping[str, Any]) -> Any:
    """Return the application for `serve.run`, `serve run` or the `import_path` of a Serve config.

    The program must be connected to the cluster. Folders in the options, and this package, must be
    on every node.

    Raises:
        ConfigurationError: the nodes cannot hold so many replicas.
        pydantic.ValidationError: a setting is unknown or has a wrong value.
        MissingExtraError: Ray is not installed.
    """
    settings = Replicas.model_validate(settings)
    count: dict[str, Any] = {"num_replicas": settings.replicas}
    if settings.max_replicas is not None:
        if settings.max_replicas < settings.replicas:
            raise ConfigurationError(
                f"max_replicas={settings.max_replicas}: must be at least "
                f"replicas={settings.replicas}"
            )
        count = {
            "autoscaling_config": {
                "min_replicas": settings.replicas,
                "max_replicas": settings.max_replicas,
                "target_ongoing_requests": settings.target_ongoing_requests,
            }
        }
    _, share = find_share(
        settings.options or settings.rerank_options or Options(),
        settings.replicas,
        cpus=settings.cpus_per_replica,
        gpus=settings.gpus_per_replica,
    )
    serve = import_ray("serve")
    deployment = serve.deployment(
        serve.ingress(lambda: _create_app(settings))(_Replica),
        name=NAME,
        ray_actor_options={"num_cpus": share.cpus, "num_gpus": share.gpus},
        # The engine batches across requests, and the app itself refuses too many.
        max_ongoing_requests=_MOST_ONGOING,
        graceful_shutdown_timeout_s=settings.limits.grace_seconds,
        graceful_shutdown_wait_loop_s=0.5,
        max_constructor_retry_count=3,
        **count,
    )
    return deployment.bind()


def _create_app(settings: Replicas) -> Any:
    """Return the app of a replica; called in its process."""
    from shared_engine.server import create_app

    failures: list[Exception] = []
    app = create_app(
        settings.options,
        rerank_options=settings.rerank_options,
        served_name=settings.served_name,
        rerank_served_name=settings.rerank_served_name,
        api_key=read_key(settings.api_key_env),
        limits=settings.limits,
        allowed_hosts=settings.allowed_hosts,
        default_input_type=settings.default_input_type,
        on_failure=failures.append,
    )
    app.state.failures = failures
    app.state.returns_request_id = False  # the proxies of Ray Serve return it
    return app


class _Replica:
    """The methods of a replica that Ray Serve calls."""

    app: Any
    _has_been_ready = False

    async def check_health(self) -> None:
        """Wait until the model is loaded at the first call, so that no request arrives earlier."""
        transport = httpx.ASGITransport(self.app)
        async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
            while not (await client.get("http://localhost/v1/health/ready")).is_success:
                if self._has_been_ready or self.app.state.failures:
                    raise EngineError(f"no request can be answered: {self.app.state.failures}")
                await asyncio.sleep(0.1)
        self._has_been_ready = True


def serve_replicas(
    settings: Replicas, *, address: str | None = None, host: str = "127.0.0.1", port: int = 8000
) -> None:
    """Serve on a cluster until a signal arrives, then finish accepted requests in the grace time.

    Raises:
        ConfigurationError: no cluster at the address, or it cannot hold the replicas.
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
            for number, handler in before.items():  # a second signal ends the wait
                signal.signal(number, handler)
            serve.delete(NAME)  # waits for requests in flight; others' applications stay
