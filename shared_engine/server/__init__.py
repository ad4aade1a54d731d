"""The engine as a NIM-compatible server: the only room with starlette, loaded when first used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from shared_engine.errors import MissingExtraError

if TYPE_CHECKING:
    from shared_engine.server.app import create_app as create_app
    from shared_engine.server.run import serve as serve
else:
    _ROOMS = {"create_app": "app", "serve": "run"}

    def __getattr__(name: str) -> Any:
        if name not in _ROOMS:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            return getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
        except ModuleNotFoundError as exc:
            raise MissingExtraError(
                f"the server needs {exc.name!r}: pip install 'nemoretriever-embeddings[server]'"
            ) from exc
