"""The engine as a NIM-compatible server: the only package with Starlette."""

from typing import TYPE_CHECKING

from shared_engine._lazy import attach

if TYPE_CHECKING:
    from shared_engine.server.app import create_app as create_app
    from shared_engine.server.run import serve as serve
else:
    __getattr__, __dir__ = attach(
        __name__, {"app": ("create_app",), "run": ("serve",)}, extra="server"
    )
