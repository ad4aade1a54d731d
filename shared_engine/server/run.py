"""Run the app on uvicorn until a signal stops it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Sequence
from types import FrameType
from typing import Any, Literal

import uvicorn
from starlette.types import ASGIApp

from shared_engine import spans
from shared_engine.options import Options, RerankOptions
from shared_engine.server.access import check_hosts
from shared_engine.server.app import create_app
from shared_engine.server.limits import ServerLimits
from shared_engine.threads import run_off_loop

_log = logging.getLogger("shared_engine")


def serve(
    options: Options | None = None,
    *,
    rerank_options: RerankOptions | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    served_name: str | None = None,
    rerank_served_name: str | None = None,
    api_key: str | None = None,
    limits: ServerLimits | None = None,
    allowed_hosts: Sequence[str] = (),
    default_input_type: Literal["query", "passage"] | None = None,
    access_log: bool = False,
) -> bool:
    """Serve models until a signal stops it; accepted requests are finished in the grace time.

    A second SIGINT ends the process immediately.
    The loggers `shared_engine` and `uvicorn` have the messages; the caller chooses their handlers.

    Args:
        options, rerank_options, served_name, rerank_served_name, api_key, limits, allowed_hosts,
            default_input_type, access_log: As for `create_app`.
        host: Interface to bind; its name is an allowed host.
        port: Port to bind; 0 for a free one.

    Returns:
        False if a model could not be loaded; the reason is logged.

    Raises:
        ConfigurationError: as `create_app`.
    """
    failures: list[Exception] = []

    def stop(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    if api_key is None and host not in ("127.0.0.1", "localhost", "::1"):
        _log.warning(
            "anyone who can reach %s can use this server; use --api-key-env to require a key",
            host,
        )
    app = create_app(
        options,
        rerank_options=rerank_options,
        served_name=served_name,
        rerank_served_name=rerank_served_name,
        api_key=api_key,
        limits=limits,
        allowed_hosts=(host, *check_hosts(allowed_hosts)),
        default_input_type=default_input_type,
        access_log=access_log,
        on_failure=stop,
    )
    server = build_server(app, limits, host=host, port=port, log_config=None)
    server.run()
    return not failures


def build_server(
    app: ASGIApp, limits: ServerLimits | None = None, **settings: Any
) -> uvicorn.Server:
    """Return the uvicorn server of an app, with the grace time of `limits`."""
    limits = limits or ServerLimits()
    config = uvicorn.Config(
        app,
        http="h11",  # it limits the bytes of a head; the faster httptools does not
        lifespan="on",
        ws="none",
        timeout_keep_alive=75,  # longer than in clients, so that they close first
        timeout_graceful_shutdown=limits.grace_seconds,  # type: ignore[arg-type]  # may be a fraction
        server_header=False,
        access_log=False,  # uvicorn's has the query string, which may hold a key
        **settings,
    )
    return _Server(config)


class _Server(uvicorn.Server):
    """Ends after the grace time, and at a second SIGINT immediately."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop; a second SIGINT ends the process."""
        if self.should_exit and sig == signal.SIGINT:
            os._exit(128 + sig)
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for the requests, and cancel the rest of them after the grace time."""
        await super().shutdown(sockets)
        if cancelled := set(self.server_state.tasks):
            await asyncio.wait(cancelled, timeout=1)
        await run_off_loop(spans.flush, 2)
