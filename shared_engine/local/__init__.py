"""Models in this process: the only package that imports torch, tokenizers or safetensors."""

from shared_engine._lazy import needs_extra

with needs_extra("local"):
    from shared_engine.local.backend import LocalBackend as LocalBackend
