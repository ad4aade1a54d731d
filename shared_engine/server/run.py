"""The app on uvicorn, from its start to the signal that ends it."""

from __future__ import annotations

import logging

import uvicorn

from shared_engine.options import Options
from shared_engine.server.app import create_app
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
    log_level: str = "info",
    access_log: bool = False,
) -> bool:
    """Serve a model until a signal comes, then finish what was accepted.

    Returns False where the model could not be loaded, which the log has.
    """
    failures: list[Exception] = []

    def stop(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        _log.warning("anybody who reaches %s can use this server; --api-key-env names a key", host)
    app = create_app(
        options, served_name=served_name, api_key=api_key, limits=limits, on_failure=stop
    )
    config = uvicorn.Config(
        app,
        host=host,
        port=port,
        lifespan="on",
        ws="none",
        timeout_keep_alive=75,  # longer than clients keep theirs, so that they close first
        server_header=False,
        access_log=access_log,
        log_level=log_level,
    )
    server = uvicorn.Server(config)
    server.run()
    return not failures
