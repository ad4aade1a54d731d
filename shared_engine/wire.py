"""Shared by client and server of /v1/embeddings: the names of roles, and the body of an error."""

from __future__ import annotations

from collections.abc import Mapping

from shared_engine.documents import Role

INPUT_TYPE: Mapping[Role, str] = {"query": "query", "document": "passage"}
"""The protocol's name of each role."""
ROLE: Mapping[str, Role] = {word: role for role, word in INPUT_TYPE.items()}
"""The role of each of the protocol's names."""


def split_role_suffix(model: str) -> tuple[str, Role | None]:
    """Return a model name without its suffix `-query` or `-passage`, and the role of the suffix.

    NVIDIA's API accepts a role in the model's name, for clients that cannot send `input_type`.

    >>> split_role_suffix("nvidia/llama-nemotron-embed-1b-v2-passage")
    ('nvidia/llama-nemotron-embed-1b-v2', 'document')
    """
    for word, role in ROLE.items():
        if model.endswith(f"-{word}"):
            return model.removesuffix(f"-{word}"), role
    return model, None


def build_error(message: str, index: int | None = None) -> dict[str, object]:
    """Return the body of an error.

    Args:
        index: Position of the failed input, for our own client; a NIM does not send it.

    >>> build_error("is too long", 3)
    {'message': 'is too long', 'index': 3}
    """
    return {"message": message} if index is None else {"message": message, "index": index}


def read_error_index(body: object) -> int | None:
    """Return the position of the failed input if the body of an error has one.

    >>> read_error_index(build_error("is too long", 3)), read_error_index({"error": "busy"})
    (3, None)
    """
    index = body.get("index") if isinstance(body, dict) else None
    return index if type(index) is int and index >= 0 else None
