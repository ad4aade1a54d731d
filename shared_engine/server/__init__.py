"""The engine as a NIM-compatible server: the only room with starlette, loaded when first used."""

from typing import TYPE_CHECKING, Any

from shared_engine.errors import MissingExtraError

if TYPE_CHECKING:
    from shared_engine.server.app import create_app as create_app
else:

    def __getattr__(name: str) -> Any:
        if name != "create_app":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            from shared_engine.server.app import create_app
        except ModuleNotFoundError as exc:
            raise MissingExtraError(
                f"the server needs {exc.name!r}: pip install 'nemoretriever-embeddings[server]'"
            ) from exc
        return create_app
