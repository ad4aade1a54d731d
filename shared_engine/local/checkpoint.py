"""From a name to a folder of files that the engine has checked, with nothing loaded yet.

No remote code runs: `config.json` is parsed as data and its `auto_map` is ignored.
Layout of the public checkpoints: nvidia/llama-nemotron-embed-1b-v2 and
nvidia/llama-nemotron-embed-vl-1b-v2 on Hugging Face; the latter's fields also after NVIDIA-NeMo/
Automodel `llama_nemotron_vl`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from shared_engine.catalogue import DEFAULT_MODEL, ModelSpec, find
from shared_engine.documents import Role
from shared_engine.errors import CheckpointError
from shared_engine.options import Options

TEXT_ARCHITECTURE = "LlamaBidirectionalModel"
MULTIMODAL_ARCHITECTURE = "LlamaNemotronVLModel"
_FILES = ["*.json", "*.safetensors", "1_Pooling/*.json"]
_COMMIT = re.compile("[0-9a-f]{40}")
_ROPE_TYPES = ("default", "llama3")
_MAX_TOKENS_WITH_IMAGE = 10_240
_MOST_TILES = 12


@dataclass(frozen=True)
class Vision:
    """What a multimodal checkpoint says about its images."""

    config: dict[str, Any]
    """The SigLIP tower, `vision_config` of config.json."""
    context_token: int
    """Id of `<IMG_CONTEXT>`, whose embeddings the tower's rows replace."""
    max_tiles: int
    """Tiles that an image is cut into at most, beside the thumbnail."""

    @property
    def tile_size(self) -> int:
        """Pixels of a tile's side."""
        return int(self.config["image_size"])

    @property
    def patches_per_side(self) -> int:
        """Patches along a tile's side."""
        return self.tile_size // int(self.config["patch_size"])

    @property
    def patches_per_tile(self) -> int:
        """Rows of the tower for one tile."""
        return self.patches_per_side**2

    @property
    def tokens_per_tile(self) -> int:
        """Rows of the language model for one tile: a token for 2 x 2 patches."""
        return self.patches_per_tile // 4


@dataclass(frozen=True)
class Checkpoint:
    """A checked checkpoint: where it lies and what its small files say."""

    folder: Path
    name: str
    """The catalogue's name for it, or what the caller called it."""
    config: dict[str, Any]
    """The language model: config.json, or its `llm_config`."""
    vision: Vision | None
    """The images, where the model takes any."""
    prompts: dict[Role, str]
    """What goes before every text."""
    max_tokens: int
    """The most tokens a text may have, prefix and special tokens included."""
    max_tokens_with_image: int
    """The most tokens an image may have, or an image and a text together."""
    dimensions: tuple[int, ...]
    """Vector sizes offered, ascending; the last is the full size."""

    @property
    def hidden_size(self) -> int:
        """Length of a full vector."""
        return int(self.config["hidden_size"])

    @property
    def longest(self) -> int:
        """The most tokens of any input."""
        return max(self.max_tokens, self.max_tokens_with_image if self.vision else 0)


def resolve(options: Options) -> Checkpoint:
    """Find the checkpoint that the options mean, download it if need be, and check its config.

    Raises:
        CheckpointError: nothing there, or not what the engine computes; the message says which
            field or file, what was expected, and the ways out.
    """
    spec = find(options.model)
    folder = _locate(options, spec)
    file = _File(folder / "config.json", _read_json(folder / "config.json", required=True))
    vision = _vision(file, options) if _is_multimodal(file) else None
    if spec and spec.is_multimodal != (vision is not None):
        file.fail("architectures", f"those of {spec.name}")
    config = file if vision is None else file.part("llm_config")
    _check(config, spec)
    sentence = _read_json(folder / "sentence_bert_config.json")
    position_limit = int(config["max_position_embeddings"])
    limits = [
        position_limit,
        spec.max_tokens if spec else None,
        sentence.get("max_seq_length"),
        options.max_tokens,
    ]
    limits_with_image = [
        position_limit,
        (spec and spec.max_tokens_with_image) or _MAX_TOKENS_WITH_IMAGE,
        options.max_tokens,
    ]
    smaller = spec.dimensions if spec else tuple(file.get("matryoshka_dimensions") or ())
    hidden_size = int(config["hidden_size"])
    return Checkpoint(
        folder=folder,
        name=spec.name if spec else options.model,
        config=config.fields,
        vision=vision,
        prompts=_prompts(folder, file),
        max_tokens=min(int(limit) for limit in limits if limit),
        max_tokens_with_image=min(int(limit) for limit in limits_with_image if limit),
        dimensions=tuple(sorted({d for d in smaller if d < hidden_size} | {hidden_size})),
    )


def _prompts(folder: Path, file: _File) -> dict[Role, str]:
    given = _read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
    query, passage = file.get("query_prefix", "query:"), file.get("passage_prefix", "passage:")
    return {
        "query": str(given.get("query", f"{query} ")),
        "document": str(given.get("document", given.get("passage", f"{passage} "))),
    }


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
        if revision and _COMMIT.fullmatch(revision):  # what it names never changes: ask nobody
            folder = Path(snapshot_download(repo_id, revision=revision, local_files_only=True))
            if _is_complete(folder):
                return folder
    except LocalEntryNotFoundError:
        pass
    try:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as exc:
        raise CheckpointError(
            f"could not get {repo_id!r} (revision {revision or 'main'}) from the Hugging Face hub: "
            f"{str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__}. "
            "Ways out: check the name and HF_TOKEN, or give a local folder: "
            "checkpoint='/path/to/folder'"
        ) from exc


def weight_files(folder: Path) -> list[str]:
    """Return the names of a checkpoint's safetensors files, there or not."""
    index = _read_json(folder / "model.safetensors.index.json").get("weight_map")
    return sorted(set(index.values())) if index else ["model.safetensors"]


def _is_complete(folder: Path) -> bool:
    names = ("config.json", "tokenizer.json", *weight_files(folder))
    return all((folder / name).is_file() for name in names)


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


class _File:
    """A part of config.json, with errors that say which field of it is at fault."""

    def __init__(self, path: Path, fields: dict[str, Any], inside: str = "") -> None:
        self.fields = fields
        self.folder = path.parent
        self._path, self._inside = path, inside

    def __getitem__(self, field: str) -> Any:
        return self.fields[field]

    def get(self, field: str, default: Any = None) -> Any:
        return self.fields.get(field, default)

    def part(self, field: str) -> _File:
        if not isinstance(self.get(field), dict):
            self.fail(field, "an object")
        return _File(self._path, self.fields[field], f"{self._inside}{field}.")

    def fail(self, field: str, expected: object) -> NoReturn:
        raise CheckpointError(
            f"{self._path}: {self._inside}{field} is {self.get(field)!r}; expected {expected}"
        )

    def require(self, field: str, value: object, default: object, why: str = "") -> None:
        """Refuse any value but one; `default` is what a missing field means."""
        if self.get(field, default) != value:
            self.fail(field, f"{value!r}{why}")

    def require_positive(self, *fields: str) -> None:
        for field in fields:
            if type(self.get(field)) is not int or self[field] < 1:
                self.fail(field, "a positive integer")


def _is_multimodal(file: _File) -> bool:
    architectures = file.get("architectures")
    if architectures not in ([TEXT_ARCHITECTURE], [MULTIMODAL_ARCHITECTURE]):
        file.fail(
            "architectures",
            f"[{TEXT_ARCHITECTURE!r}], the text embedding family, or [{MULTIMODAL_ARCHITECTURE!r}],"
            " the multimodal one",
        )
    return bool(architectures == [MULTIMODAL_ARCHITECTURE])


def _check(config: _File, spec: ModelSpec | None) -> None:
    """Refuse a language model that is anything other than what the encoder computes."""
    config.require_positive(
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    )
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    if kv_heads is not None and (not isinstance(kv_heads, int) or heads % kv_heads):
        config.fail("num_key_value_heads", f"a divisor of num_attention_heads ({heads})")
    config.require("pooling", "avg", "avg", ", the mean over tokens")
    config.require("hidden_act", "silu", "silu")
    for field in ("attention_bias", "mlp_bias", "quantization_config"):
        if config.get(field):
            config.fail(field, "none; the engine runs plain weights without biases")
    if rope(config.fields)["rope_type"] not in _ROPE_TYPES:
        config.fail("rope_scaling", f"a rope_type among {', '.join(_ROPE_TYPES)}")
    for field in ("hidden_size", "num_hidden_layers") if spec else ():
        config.require(field, getattr(spec, field), None, f", as {spec and spec.name} has")


def _vision(file: _File, options: Options) -> Vision:
    """Read how images are cut, and refuse anything other than what the tower computes."""
    config = file.part("vision_config")
    config.require_positive(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    )
    config.require("model_type", "siglip_vision_model", None)
    config.require("hidden_act", "gelu_pytorch_tanh", "gelu_pytorch_tanh")
    config.require("num_channels", 3, 3)
    if config["hidden_size"] % config["num_attention_heads"]:
        config.fail("num_attention_heads", "a divisor of hidden_size")
    if config["image_size"] % (2 * config["patch_size"]):
        config.fail("patch_size", "such that an even number of patches makes a side")
    file.require("force_image_size", config["image_size"], config["image_size"])
    file.require("downsample_ratio", 0.5, 0.5)
    file.require("ps_version", "v2", "v2")
    file.require("select_layer", -1, -1, ", the tower's last layer")
    file.require("pooling", "avg", "last", ", the mean over tokens")
    token = file.get("img_context_token_id")
    if type(token) is not int or token < 0:
        file.fail("img_context_token_id", "the id of <IMG_CONTEXT>")
    return Vision(config.fields, token, options.max_tiles or _max_tiles(file))


def _max_tiles(file: _File) -> int:
    """Return what the processor's own file says, before config.json, as vLLM reads them."""
    processor = _read_json(file.folder / "processor_config.json")
    fields = {**file.fields, **processor.get("image_processor", {}), **processor}
    most = fields.get("max_input_tiles", 2) if fields.get("dynamic_image_size", True) else 1
    expected: dict[str, object] = {"use_thumbnail": True, "min_input_tiles": 1} if most != 1 else {}
    if type(most) is not int or not 1 <= most <= _MOST_TILES:
        expected = {"max_input_tiles": f"1 to {_MOST_TILES}"}
    for field, value in expected.items():
        if fields.get(field, value) != value:
            raise CheckpointError(f"{file.folder}: {field} is {fields[field]!r}; expected {value}")
    return int(most)
