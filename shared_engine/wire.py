"""What both ends of /v1/embeddings agree on."""

from __future__ import annotations

from shared_engine.documents import Role


def split_role_suffix(model: str) -> tuple[str, Role | None]:
    """Return a model name without `-query` or `-passage`, and the role that it stands for.

    NVIDIA's API takes a role in the name, for clients that cannot send one.

    >>> split_role_suffix("nvidia/llama-nemotron-embed-1b-v2-passage")
    ('nvidia/llama-nemotron-embed-1b-v2', 'document')
    """
    suffixes: dict[str, Role] = {"-query": "query", "-passage": "document"}
    for suffix, role in suffixes.items():
        if model.endswith(suffix):
            return model.removesuffix(suffix), role
    return model, None
