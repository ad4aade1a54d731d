"""The models that the engine knows by name, one row per model.

Sources: names and renames from the release notes of the NeMo Retriever text embedding NIM
(1.13.0), sizes and limits from NVIDIA's model cards and its support matrix, public checkpoints and
their revisions from NVIDIA/NeMo-Retriever `models/hf_model_registry.py`. The state of a model in
the hosted catalogue comes from its replies, as users published them up to HOSTED_AS_OF.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

from shared_engine.documents import Modality, Role
from shared_engine.errors import CheckpointError, ConfigurationError, ModelRetiredError
from shared_engine.wire import split_role_suffix

Task = Literal["embed", "rerank"]
"""Result of a model: a vector of each input, or the score of a document for a query."""

DEFAULT_MODEL = "nvidia/llama-nemotron-embed-1b-v2"
"""The text model of the family with public weights; the hosted catalogue has no default."""
DEFAULT_MODELS: Mapping[Task, str] = {
    "embed": DEFAULT_MODEL,
    "rerank": "nvidia/llama-nemotron-rerank-1b-v2",
}
"""The model of each task in this process."""

HOSTED_AS_OF = "2026-11"
"""Month of the last look at the hosted catalogue; update it with `hosted` of the rows."""


class Hosted(NamedTuple):
    """State of a model in NVIDIA's hosted catalogue."""

    state: Literal["live", "deprecated", "ended", "unknown"] = "unknown"
    """Requests for an ended model are answered with 410."""
    since: str = ""
    """Date on which it was deprecated or ended."""
    successor: str = ""
    """NVIDIA's newer model for the same inputs; its vectors do not mix with those of this one."""


_UNKNOWN = Hosted()
_PREFIXES: Mapping[Role, str] = {"query": "query: ", "document": "passage: "}


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
    """Result of the model."""
    prefixes: Mapping[Role, str] = field(default_factory=lambda: _PREFIXES, hash=False)
    """Prefix of a text in each role, for servers that do not add it."""
    hosted: Hosted = _UNKNOWN
    """Its state in the hosted catalogue."""

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

_MODELS = (
    ModelSpec(
        name="nvidia/llama-3.2-nemoretriever-300m-embed-v2",
        aliases=(
            "nvidia/llama-nemotron-embed-300m-v2",
            "nvidia/llama-3_2-nemoretriever-300m-embed-v2",
        ),
        num_hidden_layers=9,
        dimensions=_MATRYOSHKA,
        hosted=Hosted("ended", "2026-05-18", "nvidia/nemotron-3-embed-1b"),
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
        hosted=Hosted("ended", "2026-08-25", "nvidia/nemotron-3-embed-1b"),
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
        hosted=Hosted("deprecated", "2026-09-20", "nvidia/Nemotron-3.5-Embed-1B-BF16"),
    ),
    ModelSpec(
        name="nvidia/nemotron-3-embed-1b",
        aliases=("nvidia/Nemotron-3-Embed-1B-BF16",),
        checkpoint="nvidia/Nemotron-3-Embed-1B-BF16",
        revision="f880174635613cff04033875fc6a69296cb72006",
        max_tokens=32_768,  # a NIM takes 4,096
        hosted=Hosted("live"),
    ),
    ModelSpec(
        name="nvidia/nemotron-3-embed-8b",
        aliases=("nvidia/Nemotron-3-Embed-8B-BF16",),
        checkpoint="nvidia/Nemotron-3-Embed-8B-BF16",
        revision="dd9d06b1852ef836d3dc2fbd2b71a34356912759",
        hidden_size=4096,
        num_hidden_layers=34,
        max_tokens=32_768,
    ),
    ModelSpec(
        name="nvidia/Nemotron-3.5-Embed-1B-BF16",
        checkpoint="nvidia/Nemotron-3.5-Embed-1B-BF16",
        revision="afdf14ebb254bacbaa466a041f5a4b8a3f6550e6",
        max_tokens=32_768,
        max_tokens_with_image=32_768,
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
        hosted=Hosted("live"),
    ),
)

# The same weights, quantized after training, so all other facts are equal.
_FP8 = replace(
    next(spec for spec in _MODELS if spec.name == "nvidia/llama-nemotron-embed-vl-1b-v2"),
    name="nvidia/llama-nemotron-embed-vl-1b-v2-fp8",
    aliases=(),
    checkpoint="nvidia/llama-nemotron-embed-vl-1b-v2-fp8",
    revision=None,
    hosted=_UNKNOWN,
)
CATALOGUE: tuple[ModelSpec, ...] = (*_MODELS, _FP8)

_BY_NAME = {name.lower().removeprefix("nvidia/"): spec for spec in CATALOGUE for name in spec.names}


def lookup(model: str | None) -> ModelSpec | None:
    """Return the row of a model name or alias, with or without `nvidia/`; None without one.

    >>> lookup("llama-nemotron-embed-300m-v2").name
    'nvidia/llama-3.2-nemoretriever-300m-embed-v2'
    >>> lookup("intfloat/e5-small") is None
    True
    """
    return _BY_NAME.get(model.lower().removeprefix("nvidia/")) if model else None


def suggest(model: str, task: Task) -> str:
    """Return a hint on a model of the catalogue with a similar name; "" without one.

    >>> suggest("nvidia/llama-nemotron-embed-1bv2", "embed")
    "; did you mean 'nvidia/llama-nemotron-embed-1b-v2'?"
    """
    from difflib import get_close_matches  # imported only for a wrong name

    names = [name for spec in CATALOGUE if spec.task == task for name in spec.names]
    similar = get_close_matches(model, names, n=1, cutoff=0.8)
    return f"; did you mean {similar[0]!r}?" if similar else ""


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


def require_hosted(model: str | None, task: Task = "embed") -> str:
    """Return the name of a model that the hosted catalogue runs, as far as its row knows.

    Args:
        model: Its name, which may have a role as suffix; None if the caller named none.
        task: The result that is expected of it.

    Raises:
        ConfigurationError: no model was named.
        ModelRetiredError: the model has ended.
    """
    if model is None:
        raise ConfigurationError(
            f"model= is missing, and NVIDIA's catalogue has no default; {_use_live(task)}"
        )
    name, _ = split_role_suffix(model)
    spec = lookup(name)
    if spec is not None and spec.hosted.state == "ended":
        raise ModelRetiredError(
            f"NVIDIA's catalogue ended {model} on {spec.hosted.since}; {explain_end(spec, task)}"
        )
    return name


def explain_end(spec: ModelSpec | None, task: Task) -> str:
    """Return the advice of an error about a hosted model that ends.

    Args:
        spec: Its row; None if it has none.
        task: What it computes.
    """
    successor = spec.hosted.successor if spec is not None else ""
    newer = f"its successor is {successor}" if successor else _use_live(task, spec)
    if spec is None:
        place = "may still run at a self-hosted NIM (base_url=)"
    else:
        here = 'backend="local"' if spec.checkpoint else 'backend="local", checkpoint="/folder"'
        place = f"still run in this process ({here}) or at a self-hosted NIM (base_url=)"
    return f"{newer}. {_MIXING[task]}. The same weights {place}"


_MIXING: Mapping[Task, str] = {
    "embed": "Vectors of two models do not mix in an index: embed all documents again, or keep the "
    "model",
    "rerank": "Scores of two models do not compare: set thresholds again",
}


def _use_live(task: Task, ended: ModelSpec | None = None) -> str:
    rows = [spec for spec in CATALOGUE if spec.task == task and spec.hosted.state == "live"]
    if live := ", ".join(spec.name for spec in rows if spec is not ended):
        return f"use a live hosted model ({HOSTED_AS_OF}): {live}"
    return f"no other hosted model is known ({HOSTED_AS_OF})"
