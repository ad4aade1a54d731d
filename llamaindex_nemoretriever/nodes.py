"""Nodes of LlamaIndex as inputs of the engine."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, Node

from shared_engine.documents import EmbeddingInput


def list_inputs(nodes: Iterable[BaseNode]) -> list[EmbeddingInput]:
    """Return an input for each node: its text with metadata, its image, or both."""
    return [_to_input(node) for node in nodes]


def _to_input(node: BaseNode) -> EmbeddingInput:
    image = _find_image(node)
    if image is not None and not node.get_content(metadata_mode=MetadataMode.NONE).strip():
        return EmbeddingInput(image=image)  # metadata alone is no caption
    return EmbeddingInput(node.get_content(metadata_mode=MetadataMode.EMBED), image)


def _find_image(node: BaseNode) -> Any:
    """Return a node's image as base64, path or URL; b"" if it is empty; None without an image."""
    if isinstance(node, ImageNode):
        return node.image or node.image_path or node.image_url or b""
    resource = node.image_resource if isinstance(node, Node) else None
    if resource is None:
        return None
    data = resource.data and resource.data.decode()  # base64
    return data or resource.path or (str(resource.url) if resource.url else b"")
