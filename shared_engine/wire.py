"""What both ends of /v1/embeddings agree on: the words of roles, and the body of an error."""

from __future__ import annotations

from collections.abc import Mapping

from shared_engine.documents import Role

INPUT_TYPE: Mapping[Role, str] = {"query": "query", "document": "passage"}
"""The wire's word for each role."""
ROLE: Mapping[str, Role] = {word: role for role, word in INPUT_TYPE.items()}
"""The role for each of the wire's words."""


def split_role_suffix(model: str) -> tuple[str, Role | None]:
    """Return a model name without `-query` or `-passage`, and the role that it stands for.

    NVIDIA's API takes a role in the name, for clients that cannot send one.

    >>> split_role_suffix("nvidia/llama-nemotron-embed-1b-v2-passage")
    ('nvidia/llama-nemotron-embed-1b-v2', 'document')
    """
    for word, role in ROLE.items():
        if model.endswith(f"-{word}"):
            return model.removesuffix(f"-{word}"), role
    return model, None


def build_error(message: str, index: int | None = None) -> dict[str, object]:
    """Return the body of an error: `error` as a NIM says it, `message` for OpenAI's clients.

    `index` is the position of the input at fault, which no NIM says and our client reads.

    >>> build_error("is too long", 3)
    {'error': 'is too long', 'message': 'is too long', 'index': 3}
    """
    body: dict[str, object] = {"error": message, "message": message}
    return body if index is None else {**body, "index": index}


def read_error_index(body: object) -> int | None:
    """Return the position of the input at fault, if an error's body names one.

    >>> read_error_index(build_error("is too long", 3)), read_error_index({"error": "busy"})
    (3, None)
    """
    index = body.get("index") if isinstance(body, dict) else None
    return index if type(index) is int and index >= 0 else None
