"""From a name to a folder of files that the engine has checked, with nothing loaded yet.

No remote code runs: `config.json` is parsed as data and its `auto_map` is ignored.
Layout of the public checkpoints: nvidia/llama-nemotron-embed-1b-v2 on Hugging Face.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shared_engine.catalogue import DEFAULT_MODEL, ModelSpec, find
from shared_engine.documents import Role
from shared_engine.errors import CheckpointError
from shared_engine.options import Options

ARCHITECTURE = "LlamaBidirectionalModel"
_FILES = ["*.json", "*.safetensors", "1_Pooling/*.json"]
_ROPE_TYPES = ("default", "llama3")


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: where it lies and what its small files say."""

    folder: Path
    name: str
    """The catalogue's name for it, or what the caller called it."""
    config: dict[str, Any]
    """config.json as it is."""
    prompts: dict[Role, str]
    """What goes before every text."""
    max_tokens: int
    """The most tokens a text may have, prefix and special tokens included."""
    dimensions: tuple[int, ...]
    """Vector sizes offered, ascending; the last is the full size."""

    @property
    def hidden_size(self) -> int:
        """Length of a full vector."""
        return int(self.config["hidden_size"])


def resolve(options: Options) -> Checkpoint:
    """Find the checkpoint that the options mean, download it if need be, and check its config.

    Raises:
        CheckpointError: nothing there, or not what the engine computes; the message says which
            field or file, what was expected, and the ways out.
    """
    spec = find(options.model)
    folder = _locate(options, spec)
    config = _read_json(folder / "config.json", required=True)
    _check(config, folder, spec)
    sentence = _read_json(folder / "sentence_bert_config.json")
    prompts = _read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    limits = [
        int(config["max_position_embeddings"]),
        spec.max_tokens if spec else None,
        sentence.get("max_seq_length"),
        options.max_tokens,
    ]
    smaller = spec.dimensions if spec else tuple(config.get("matryoshka_dimensions") or ())
    hidden_size = int(config["hidden_size"])
    return Checkpoint(
        folder=folder,
        name=spec.name if spec else options.model,
        config=config,
        prompts={
            "query": str(prompts.get("query", "query: ")),
            "document": str(prompts.get("document", prompts.get("passage", "passage: "))),
        },
        max_tokens=min(int(limit) for limit in limits if limit),
        dimensions=tuple(sorted({d for d in smaller if d < hidden_size} | {hidden_size})),
    )


def _locate(options: Options, spec: ModelSpec | None) -> Path:
    source = options.checkpoint or (spec.checkpoint if spec else options.model)
    if source is None:
        raise CheckpointError(
            f"{options.model!r} has no public weights to run in this process. Ways out: "
            "checkpoint='/path/to/folder' with the weights from NGC, or the public "
            f"model={DEFAULT_MODEL!r}, which offers the same vector sizes"
        )
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if source.count("/") != 1 or source.startswith((".", "~", "/")):
        raise CheckpointError(
            f"{source!r} is not a folder here, a model of the catalogue, or a Hugging Face id "
            "(organisation/name)"
        )
    revision = options.revision or (spec.revision if spec and not options.checkpoint else None)
    return _download(source, revision)


def _download(repo_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise CheckpointError(
            f"could not get {repo_id!r} (revision {revision or 'main'}) from the Hugging Face hub: "
            f"{str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__}. "
            "Ways out: check the name and HF_TOKEN, or give a local folder: "
            "checkpoint='/path/to/folder'"
        ) from exc


def _read_json(path: Path, required: bool = False) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise CheckpointError(f"{path.parent} has no {path.name}; is it a checkpoint?") from None
    except ValueError as exc:
        raise CheckpointError(f"{path} is not valid JSON: {exc}") from exc
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; expected an object")
    return content


def rope(config: dict[str, Any]) -> dict[str, Any]:
    """Return the rotary embedding's parameters, in the spelling of transformers 5.

    transformers 4 writes `rope_theta` beside `rope_scaling` (or null), 5 one `rope_parameters`.
    """
    parameters = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    parameters.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    parameters["rope_type"] = parameters.pop("type", parameters.get("rope_type", "default"))
    return parameters


def _check(config: dict[str, Any], folder: Path, spec: ModelSpec | None) -> None:
    """Refuse a config.json that says anything other than what the encoder computes."""

    def fail(field: str, expected: object) -> None:
        raise CheckpointError(
            f"{folder / 'config.json'}: {field} is {config.get(field)!r}; expected {expected}"
        )

    if config.get("architectures") != [ARCHITECTURE]:
        fail("architectures", f"[{ARCHITECTURE!r}], the text embedding family")
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    for field in (*sizes, "num_attention_heads", "max_position_embeddings"):
        if not isinstance(config.get(field), int) or config[field] < 1:
            fail(field, "a positive integer")
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if kv_heads is not None and (not isinstance(kv_heads, int) or heads % kv_heads):
        fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    if config.get("pooling", "avg") != "avg":
        fail("pooling", "'avg', the mean over tokens")
    if config.get("hidden_act", "silu") != "silu":
        fail("hidden_act", "'silu'")
    for field in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(field):
            fail(field, "none; the engine runs plain weights without biases")
    if rope(config)["rope_type"] not in _ROPE_TYPES:
        fail("rope_scaling", f"a rope_type among {', '.join(_ROPE_TYPES)}")
    if spec:
        for field in ("hidden_size", "num_hidden_layers"):
            if config[field] != getattr(spec, field):
                fail(field, f"{getattr(spec, field)}, as {spec.name} has")
