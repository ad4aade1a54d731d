"""Models in this process: the only package that imports torch, tokenizers or safetensors."""

from shared_engine.errors import MissingExtraError

try:
    from shared_engine.local.backend import LocalBackend as LocalBackend
except ModuleNotFoundError as exc:
    raise MissingExtraError(
        f"running a model in this process needs {exc.name!r}: "
        "pip install 'nemoretriever-embeddings[local]'"
    ) from exc
