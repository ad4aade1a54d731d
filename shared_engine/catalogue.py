"""The models that the engine knows by name, one row per model.

Sources: names and renames from the release notes of the NeMo Retriever text embedding NIM
(1.13.0), sizes and limits from NVIDIA's model cards and its support matrix, public checkpoints and
their revisions from NVIDIA/NeMo-Retriever `models/hf_model_registry.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from shared_engine.documents import Modality
from shared_engine.errors import CheckpointError

Task = Literal["embed", "rerank"]
"""What a model computes: a vector of each input, or the score of a document for a query."""

DEFAULT_MODEL = "nvidia/llama-nemotron-embed-1b-v2"
"""The text model of the family with public weights."""
DEFAULT_RERANKER = "nvidia/llama-nemotron-rerank-1b-v2"
"""The text reranker of the family."""


@dataclass(frozen=True)
class ModelSpec:
    """Published facts about a model; everything else is read from its checkpoint."""

    name: str
    """Name in NVIDIA's API."""
    aliases: tuple[str, ...] = ()
    """Other names of the model."""
    checkpoint: str | None = None
    """Hugging Face id of the public weights; None if there are none."""
    revision: str | None = None
    """Pinned commit of the public weights."""
    hidden_size: int = 2048
    """Length of a full vector, and `hidden_size` in config.json."""
    num_hidden_layers: int = 16
    """Layers, and `num_hidden_layers` in config.json."""
    dimensions: tuple[int, ...] = ()
    """Shorter vector sizes that the model was trained for (Matryoshka)."""
    max_tokens: int = 8192
    """Maximum number of tokens of a text, prefix and special tokens included."""
    max_tokens_with_image: int = 0
    """Maximum number of tokens of an image, or of an image with a text."""
    modalities: frozenset[Modality] = frozenset({"text"})
    """Kinds of input that the model was trained on."""
    task: Task = "embed"
    """What the model computes."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names of the model, that of NVIDIA's API first."""
        return (self.name, *self.aliases)

    @property
    def is_multimodal(self) -> bool:
        """Whether the model takes images."""
        return "image" in self.modalities


class AvailableModel(NamedTuple):
    """A model that can be used as `model=`."""

    id: str
    """Its name."""
    base_model: str | None = None
    """NVIDIA's name of the model, if a server uses another name."""


_MATRYOSHKA = (384, 512, 768, 1024)

CATALOGUE: tuple[ModelSpec, ...] = (
    ModelSpec(
        name="nvidia/llama-3.2-nemoretriever-300m-embed-v2",
        aliases=(
            "nvidia/llama-nemotron-embed-300m-v2",
            "nvidia/llama-3_2-nemoretriever-300m-embed-v2",
        ),
        num_hidden_layers=9,
        dimensions=_MATRYOSHKA,
    ),
    ModelSpec(
        name="nvidia/llama-3.2-nemoretriever-300m-embed-v1",
        aliases=("nvidia/llama-3_2-nemoretriever-300m-embed-v1",),
        num_hidden_layers=9,
    ),
    ModelSpec(
        name="nvidia/llama-nemotron-embed-1b-v2",
        aliases=("nvidia/llama-3.2-nv-embedqa-1b-v2", "nvidia/llama-3_2-nv-embedqa-1b-v2"),
        checkpoint="nvidia/llama-nemotron-embed-1b-v2",
        revision="113abe4acafa848e77ead9c0623205e511932348",
        dimensions=_MATRYOSHKA,
    ),
    ModelSpec(
        name="nvidia/llama-nemotron-embed-vl-1b-v2",
        aliases=(
            "nvidia/llama-3.2-nemoretriever-1b-vlm-embed-v1",
            "nvidia/llama-3_2-nemoretriever-1b-vlm-embed-v1",
        ),
        checkpoint="nvidia/llama-nemotron-embed-vl-1b-v2",
        revision="582e3bf72aee355e3c59ed89de53543c5b0657ee",
        dimensions=_MATRYOSHKA,
        max_tokens_with_image=10_240,
        modalities=frozenset({"text", "image", "text_image"}),
    ),
    ModelSpec(
        name="nvidia/llama-nemotron-rerank-1b-v2",
        aliases=("nvidia/llama-3.2-nv-rerankqa-1b-v2", "nvidia/llama-3_2-nv-rerankqa-1b-v2"),
        checkpoint="nvidia/llama-nemotron-rerank-1b-v2",
        revision="8fd3e5d962d44cfe65d4ba0784eebed44cf136b0",
        task="rerank",
    ),
    ModelSpec(
        name="nvidia/llama-nemotron-rerank-vl-1b-v2",
        checkpoint="nvidia/llama-nemotron-rerank-vl-1b-v2",
        revision="9c20c4aedf9ec87b6b7346c3bc4754ea030dab35",
        max_tokens_with_image=10_240,
        modalities=frozenset({"text", "image", "text_image"}),
        task="rerank",
    ),
)

_BY_NAME = {name.removeprefix("nvidia/"): spec for spec in CATALOGUE for name in spec.names}


def lookup(model: str) -> ModelSpec | None:
    """Return the row of a model name or alias, with or without `nvidia/`; None if unknown.

    >>> lookup("llama-nemotron-embed-300m-v2").name
    'nvidia/llama-3.2-nemoretriever-300m-embed-v2'
    >>> lookup("intfloat/e5-small") is None
    True
    """
    return _BY_NAME.get(model.lower().removeprefix("nvidia/"))


def report_task(name: str, task: Task) -> CheckpointError:
    """Return the error for a model whose task is not the wanted one."""
    if task == "rerank":
        return CheckpointError(
            f"{name} is a reranker and has no vectors; use shared_engine.Reranker, or "
            "NeMoRetrieverRerank of an adapter"
        )
    return CheckpointError(
        f"{name} is an embedding model and does not score documents; use shared_engine.Embedder, "
        "or the embeddings of an adapter"
    )
