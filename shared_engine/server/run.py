"""The app on uvicorn, from its start to the signal that ends it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from shared_engine.options import Options
from shared_engine.server.access import require_hosts
from shared_engine.server.app import create_app
from shared_engine.server.connections import bound_connections
from shared_engine.server.limits import ServerLimits

_log = logging.getLogger("shared_engine")


def serve(
    options: Options,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_name: str | None = None,
    api_key: str | None = None,
    limits: ServerLimits | None = None,
    allowed_hosts: Sequence[str] = (),
    log_level: str = "info",
    access_log: bool = False,
) -> bool:
    """Serve a model until a signal comes, then finish what was accepted.

    Returns False where the model could not be loaded, which the log has.

    Raises:
        ConfigurationError: as `create_app` does.
    """
    failures: list[Exception] = []

    def stop(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        _log.warning(
            "anybody who reaches %s can use this server, by its address or under the names of "
            "--allowed-host; --api-key-env names a key",
            host,
        )
    app = create_app(
        options,
        served_name=served_name,
        api_key=api_key,
        limits=limits,
        allowed_hosts=(host, *require_hosts(allowed_hosts)),
        on_failure=stop,
    )
    server = build_server(
        app, limits, host=host, port=port, access_log=access_log, log_level=log_level
    )
    server.run()
    return not failures


def build_server(
    app: ASGIApp, limits: ServerLimits | None = None, **settings: Any
) -> uvicorn.Server:
    """Return the server of an app, with its connections kept within `limits`."""
    limits = limits or ServerLimits()
    config = uvicorn.Config(
        app,
        http=bound_connections(limits),
        h11_max_incomplete_event_size=limits.max_head_bytes,
        lifespan="on",
        ws="none",
        timeout_keep_alive=75,  # longer than clients keep theirs, so that they close first
        server_header=False,
        **settings,
    )
    return uvicorn.Server(config)
