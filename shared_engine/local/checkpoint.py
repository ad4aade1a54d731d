"""Find a checkpoint, download it if needed, and validate its configuration.

No remote code runs: `config.json` is parsed as data, and its `auto_map` is ignored.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from shared_engine.catalogue import (
    DEFAULT_MODEL,
    ModelSpec,
    Task,
    lookup,
    report_task,
    suggest,
)
from shared_engine.documents import Role
from shared_engine.errors import CheckpointError, first_line
from shared_engine.local.config import (
    EmbedderFile,
    MistralFile,
    ModelConfig,
    Modules,
    PoolingConfig,
    QuantizationFile,
    RerankerFile,
    SentenceConfig,
    SentenceTransformersConfig,
    WeightIndex,
    read,
    read_config,
    refuse,
)
from shared_engine.local.vision import VisionConfig, read_pixtral, read_tiled
from shared_engine.options import EngineOptions, RerankOptions

_PATTERNS = ["*.json", "*.safetensors", "1_Pooling/*.json"]
_COMMIT = re.compile("[0-9a-f]{40}")
_SECONDS_FOR_HUB = 5.0
_MAX_TOKENS_WITH_IMAGE = 10_240


@dataclass(frozen=True)
class Scoring:
    """How a reranker scores a pair: `before_query`, query, `before_document`, document."""

    before_query: str
    before_document: str
    temperature: float
    """Divisor of the product of the mean vector and the head."""


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint: its folder and configuration."""

    folder: Path
    name: str
    """The catalogue's name, or the caller's."""
    config: ModelConfig
    """The language model."""
    vision: VisionConfig | None
    """The image input; None for a text model."""
    prompts: dict[Role, str]
    """The prefix of a text in each role; empty for a reranker."""
    max_tokens: int
    """Maximum number of tokens of a text, prefix and special tokens included."""
    max_tokens_with_image: int
    """Maximum number of tokens of an image, or of an image with a text."""
    dimensions: tuple[int, ...]
    """Vector sizes offered, ascending; the last is the full size. (1,) for a reranker: a score."""
    is_fp8: bool = False
    """Whether weights are stored in FP8; they are dequantized when they are loaded."""
    scoring: Scoring | None = None
    """The prompt and head of a reranker; None for an embedding model."""

    @property
    def longest(self) -> int:
        """Maximum number of tokens of any input."""
        return max(self.max_tokens, self.max_tokens_with_image if self.vision else 0)


def resolve(options: EngineOptions) -> Checkpoint:
    """Return the checkpoint of some options, validated; downloads it if needed.

    Raises:
        CheckpointError: the checkpoint is missing or not supported; the message has the file or
            field, the expected value, and what to do.
    """
    model = options.local_model
    spec = lookup(model)
    folder = _locate(model, options, spec)
    path = folder / "config.json"
    file = read_config(path)
    task: Task = "rerank" if isinstance(file, RerankerFile) else "embed"
    if task != options.task:
        raise report_task(str(folder), task)
    config = file if isinstance(file, ModelConfig) else file.llm_config
    vision = _read_vision(path, file, options)
    if spec is not None:
        _check_spec(path, config, vision, spec)
    elif task == "embed":  # all models of the catalogue use mean pooling and unit length
        read(folder / "modules.json", Modules)
        read(folder / "1_Pooling" / "config.json", PoolingConfig)
    limits = [options.max_tokens, config.max_position_embeddings]
    limit_with_image = spec.max_tokens_with_image if spec else _MAX_TOKENS_WITH_IMAGE
    limit = read(folder / "sentence_bert_config.json", SentenceConfig).max_seq_length
    quantized = (
        file.quantization_config
        or config.quantization_config
        or read(folder / "hf_quant_config.json", QuantizationFile).quantization
    )
    scoring: Scoring | None = None
    prompts: dict[Role, str] = {}
    dimensions: tuple[int, ...] = (1,)
    if isinstance(file, RerankerFile):
        scoring = _read_scoring(file)
    else:
        prompts = _read_prompts(folder, file)
        smaller = spec.dimensions if spec else file.matryoshka_dimensions or ()
        full = config.hidden_size
        dimensions = (*sorted({d for d in smaller if d < full}), full)
    return Checkpoint(
        folder=folder,
        name=spec.name if spec else model,
        config=config,
        vision=vision,
        prompts=prompts,
        max_tokens=min(filter(None, [*limits, limit, spec.max_tokens if spec else None])),
        max_tokens_with_image=min(filter(None, [*limits, limit_with_image])),
        dimensions=dimensions,
        is_fp8=quantized is not None,
        scoring=scoring,
    )


def _read_vision(
    path: Path, file: EmbedderFile | RerankerFile, options: EngineOptions
) -> VisionConfig | None:
    if isinstance(file, MistralFile):
        return read_pixtral(path, file, options.max_tiles)
    if isinstance(file, ModelConfig):
        return None
    cache_bytes = options.vision_cache_bytes if isinstance(options, RerankOptions) else 0
    return replace(read_tiled(path, file, options.max_tiles), cache_bytes=cache_bytes)


def _check_spec(
    path: Path, config: ModelConfig, vision: VisionConfig | None, spec: ModelSpec
) -> None:
    """Refuse a checkpoint of another model than the named one."""
    if spec.is_multimodal != (vision is not None):
        kind = "no vision tower" if vision is None else "a vision tower"
        raise CheckpointError(f"{path} describes {kind}, unlike {spec.name}")
    for field, value, expected in (
        ("hidden_size", config.hidden_size, spec.hidden_size),
        ("num_hidden_layers", config.layers, spec.num_hidden_layers),
    ):
        if value != expected:
            refuse(path, field, value, f"{expected}, the value of {spec.name}")


def _read_scoring(file: RerankerFile) -> Scoring:
    # Source: `rerank_prompt` "v1" of the public checkpoints. No space follows the colons.
    if file.prompt_template == "v1":
        return Scoring("question:", " \n \n passage:", file.temperature)
    return Scoring("", " \n ", file.temperature)


def _read_prompts(folder: Path, file: EmbedderFile) -> dict[Role, str]:
    path = folder / "config_sentence_transformers.json"
    given = read(path, SentenceTransformersConfig).prompts
    query, document = (given.query, given.document) if given else (None, None)
    return {
        "query": f"{file.query_prefix} " if query is None else query,
        "document": f"{file.passage_prefix} " if document is None else document,
    }


def _locate(model: str, options: EngineOptions, spec: ModelSpec | None) -> Path:
    source = options.checkpoint or (spec.checkpoint if spec else model)
    if source is None:
        raise CheckpointError(
            f"{model!r} has no public weights; pass checkpoint='/path/to/folder' with the "
            f"weights from NGC, or use model={DEFAULT_MODEL!r}, which is public and has the same "
            "vector sizes"
        )
    folder = Path(os.path.expanduser(source))  # pathlib raises for an unknown user
    if os.path.isdir(folder):
        return folder
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise CheckpointError(
            f"{source!r} is not a local folder, a model of the catalogue, or a Hugging Face id "
            f"(organisation/name){suggest(model, options.task)}"
        )
    revision = options.revision or (spec.revision if spec and not options.checkpoint else None)
    hint = suggest(model, options.task) if spec is None else ""
    return _download(source, revision, hint)


def _download(repo_id: str, revision: str | None, hint: str = "") -> Path:
    from huggingface_hub import HfApi, snapshot_download

    cached = _find_cached(repo_id, revision)
    if cached and revision and _COMMIT.fullmatch(revision):  # a commit never changes
        return cached
    try:
        # Without a network, a download would retry for half a minute; this is one request.
        HfApi().model_info(repo_id, revision=revision, timeout=_SECONDS_FOR_HUB)
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_PATTERNS))
    except Exception as exc:  # from huggingface_hub, its HTTP library or the file system
        if cached and getattr(exc, "response", None) is None:  # the hub was not reached
            return cached
        raise CheckpointError(
            f"cannot download {repo_id!r} (revision {revision or 'main'}) from Hugging Face: "
            f"{first_line(exc)}; check the name and HF_TOKEN, or pass a local folder: "
            f"checkpoint='/path/to/folder'{hint}"
        ) from exc


def _find_cached(repo_id: str, revision: str | None) -> Path | None:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
    except Exception:  # as above
        return None
    return folder if _is_complete(folder) else None


def weight_files(folder: Path) -> list[str]:
    """Return the names of a checkpoint's safetensors files, which may be missing."""
    if os.path.isfile(folder / "model.safetensors"):  # precedes an index, as in transformers
        return ["model.safetensors"]
    index = read(folder / "model.safetensors.index.json", WeightIndex).weight_map
    return sorted(set(index.values())) if index else ["model.safetensors"]


def _is_complete(folder: Path) -> bool:
    names = ("config.json", "tokenizer.json", *weight_files(folder))
    return all(os.path.isfile(folder / name) for name in names)
