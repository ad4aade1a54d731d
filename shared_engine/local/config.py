"""What a checkpoint's JSON files say, checked and typed: anything else is refused by field.

A class here is a file or a part of one. Its aliases are the file's own names, which errors use.
Layout of the public checkpoints: nvidia/llama-nemotron-embed-1b-v2 and
nvidia/llama-nemotron-embed-vl-1b-v2 on Hugging Face; the latter's fields also after NVIDIA-NeMo/
Automodel `llama_nemotron_vl`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, NoReturn, TypeVar

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    RootModel,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from shared_engine.errors import CheckpointError

_MOST_TILES = 12
_MOST_POSITIONS = 2**20
"""Of a rotary table; eight times what the family has, and some 0.5 GB at the usual head size."""
_LARGEST_TILE = 8192
"""Pixels of a side; the family has 512."""

Size = Annotated[int, Field(gt=0)]
One = Annotated[float, Field(ge=1, le=1)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Falsy = Literal[False] | None


class _File(BaseModel):
    """Fields that the engine reads; others are no business of its."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )


FileT = TypeVar("FileT", bound=BaseModel)


class Rope(_File):
    """Rotary position embedding with the frequencies as they are."""

    rope_type: Literal["default"]
    theta: float = Field(alias="rope_theta", ge=1)
    partial_rotary_factor: One | None = None


class Llama3Rope(_File):
    """Rotary position embedding whose slow frequencies are stretched, as Llama 3.1 began."""

    rope_type: Literal["llama3"]
    theta: float = Field(alias="rope_theta", ge=1)
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float
    original_max_position_embeddings: int = Field(gt=0, le=_MOST_POSITIONS)
    partial_rotary_factor: One | None = None

    @field_validator("high_freq_factor")
    @classmethod
    def _is_higher(cls, value: float, info: ValidationInfo) -> float:
        if value <= (low := info.data.get("low_freq_factor", 0.0)):
            raise ValueError(f"more than low_freq_factor ({low})")
        return value


class ModelConfig(_File):
    """The language model: config.json, or its `llm_config`."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    layers: Size = Field(alias="num_hidden_layers")
    heads: Size = Field(alias="num_attention_heads")
    kv_heads: Size = Field(alias="num_key_value_heads", default=None, validate_default=True)
    head_dim: Size = Field(default=None, validate_default=True)
    max_position_embeddings: int = Field(gt=0, le=_MOST_POSITIONS)
    rms_norm_eps: Epsilon = 1e-6
    rope: Rope | Llama3Rope = Field(
        validation_alias=AliasChoices("rope_parameters", "rope_scaling"), discriminator="rope_type"
    )
    partial_rotary_factor: One | None = None
    is_causal: Falsy = None
    use_bidirectional_attention: Literal[True] | None = None
    bos_token_id: int | None = Field(default=None, ge=0)
    pooling: Literal["avg"] = "avg"
    hidden_act: Literal["silu"] = "silu"
    attention_bias: Falsy = None
    mlp_bias: Falsy = None
    quantization_config: None = None

    @model_validator(mode="before")
    @classmethod
    def _read_both_spellings_of_rope(cls, data: Any) -> Any:
        """Transformers 4 writes rope_theta beside rope_scaling or null, 5 one rope_parameters."""
        if not isinstance(data, dict):
            return data
        name = "rope_parameters" if data.get("rope_parameters") else "rope_scaling"
        rope = data.get(name) or {}
        if isinstance(rope, dict):
            default = "default" if rope.keys() <= {"rope_theta"} else None  # not one per layer type
            kind = rope.get("rope_type", rope.get("type", default))
            theta = rope.get("rope_theta", data.get("rope_theta", 10_000.0))
            rope = {**rope, "rope_type": kind, "rope_theta": theta}
        spellings = ("rope_parameters", "rope_scaling")
        return {key: data[key] for key in data if key not in spellings} | {name: rope}

    @field_validator("bos_token_id")
    @classmethod
    def _is_in_the_table(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and value >= (size := info.data.get("vocab_size", value + 1)):
            raise ValueError(f"less than vocab_size ({size})")
        return value

    @field_validator("kv_heads", mode="before")
    @classmethod
    def _default_to_heads(cls, value: Any, info: ValidationInfo) -> Any:
        return info.data.get("heads", 1) if value is None else value

    @field_validator("kv_heads")
    @classmethod
    def _divides_heads(cls, value: int, info: ValidationInfo) -> int:
        if (heads := info.data.get("heads", value)) % value:
            raise ValueError(f"a divisor of num_attention_heads ({heads})")
        return value

    @field_validator("head_dim", mode="before")
    @classmethod
    def _default_to_a_share(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None:
            return value
        return max(1, info.data.get("hidden_size", 2) // info.data.get("heads", 1))

    @field_validator("head_dim")
    @classmethod
    def _has_halves(cls, value: int) -> int:
        if value % 2:
            raise ValueError("an even number, whose halves rotary embedding turns")
        return value


class TowerConfig(_File):
    """The SigLIP tower, `vision_config` of config.json."""

    model_type: Literal["siglip_vision_model"]
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    num_channels: Literal[3] = 3
    hidden_size: Size
    intermediate_size: Size
    layers: Size = Field(alias="num_hidden_layers")
    heads: Size = Field(alias="num_attention_heads")
    image_size: int = Field(gt=0, le=_LARGEST_TILE)
    patch_size: Size
    layer_norm_eps: Epsilon = 1e-6

    @field_validator("heads")
    @classmethod
    def _divides_hidden_size(cls, value: int, info: ValidationInfo) -> int:
        if (size := info.data.get("hidden_size", value)) % value:
            raise ValueError(f"a divisor of hidden_size ({size})")
        return value

    @field_validator("patch_size")
    @classmethod
    def _makes_even_sides(cls, value: int, info: ValidationInfo) -> int:
        if info.data.get("image_size", 0) % (2 * value):
            raise ValueError("such that an even number of patches makes a side")
        return value


@dataclass(frozen=True)
class VisionConfig:
    """How a multimodal model sees images."""

    tower: TowerConfig
    context_token: int
    """Id of `<IMG_CONTEXT>`, whose embeddings the tower's rows replace."""
    max_tiles: int
    """Tiles that an image is cut into at most, beside the thumbnail."""

    @property
    def tile_size(self) -> int:
        """Pixels of a tile's side."""
        return self.tower.image_size

    @property
    def patches_per_side(self) -> int:
        """Patches along a tile's side."""
        return self.tile_size // self.tower.patch_size

    @property
    def patches_per_tile(self) -> int:
        """Rows of the tower for one tile."""
        return self.patches_per_side**2

    @property
    def tokens_per_tile(self) -> int:
        """Rows of the language model for one tile: a token for 2 x 2 patches."""
        return self.patches_per_tile // 4


class Tiling(_File):
    """How many tiles an image is cut into; None where a file does not say."""

    dynamic_image_size: bool | None = None
    max_input_tiles: int | None = None
    min_input_tiles: int | None = None
    use_thumbnail: bool | None = None


class ProcessorConfig(Tiling):
    """processor_config.json, whose fields go before those of config.json."""

    image_processor: Tiling = Tiling()


class _Architecture(_File):
    architectures: list[str]


class _Prefixes(_File):
    query_prefix: str = "query:"
    passage_prefix: str = "passage:"
    matryoshka_dimensions: list[Size] | None = None


class TextFile(ModelConfig, _Prefixes):
    """config.json of a text model."""


class MultimodalFile(Tiling, _Prefixes):
    """config.json of a multimodal model."""

    llm_config: ModelConfig
    vision_config: TowerConfig
    img_context_token_id: int = Field(ge=0)
    force_image_size: int | None = None
    downsample_ratio: float = Field(default=0.5, ge=0.5, le=0.5)
    ps_version: Literal["v2"] = "v2"
    select_layer: Literal[-1] = -1
    pooling: Literal["avg"]

    @field_validator("force_image_size")
    @classmethod
    def _is_image_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        tower = info.data.get("vision_config")
        if tower and value not in (None, tower.image_size):
            raise ValueError(f"{tower.image_size}, the image_size of vision_config")
        return value


class SentenceConfig(_File):
    """sentence_bert_config.json."""

    max_seq_length: Size | None = None
    do_lower_case: Falsy = None


class PoolingConfig(_File):
    """1_Pooling/config.json, in sentence-transformers' old spelling or its new one."""

    pooling_mode: Literal["mean"] = "mean"
    pooling_mode_mean_tokens: Literal[True] = True
    pooling_mode_cls_token: Falsy = None
    pooling_mode_max_tokens: Falsy = None
    pooling_mode_mean_sqrt_len_tokens: Falsy = None
    pooling_mode_weightedmean_tokens: Falsy = None
    pooling_mode_lasttoken: Falsy = None
    include_prompt: Literal[True] = True


class _Module(_File):
    type: str


class Modules(RootModel[list[_Module]]):
    """modules.json: what sentence-transformers runs, beginning with the model itself."""

    root: list[_Module] = []

    @field_validator("root")
    @classmethod
    def _are_computed(cls, value: list[_Module]) -> list[_Module]:
        for module in value[1:]:
            if module.type.rpartition(".")[2] not in ("Pooling", "Normalize"):
                raise ValueError(f"Pooling and Normalize after the model, not {module.type}")
        return value


class Prompts(_File):
    """What goes before a text, in config_sentence_transformers.json."""

    query: str | None = None
    document: str | None = Field(default=None, validation_alias=AliasChoices("document", "passage"))


class SentenceTransformersConfig(_File):
    """config_sentence_transformers.json."""

    prompts: Prompts | None = None


class WeightIndex(_File):
    """model.safetensors.index.json: the file of each tensor."""

    weight_map: dict[str, str] | None = None

    @field_validator("weight_map")
    @classmethod
    def _stays_in_the_folder(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for name in set((value or {}).values()):
            path = PureWindowsPath(name)  # reads both kinds of slashes, and drives
            if not path.name or path.is_absolute() or path.anchor or ".." in path.parts:
                raise ValueError(f"names of files in the folder or below it, not {name!r}")
        return value


_FILES: dict[str, type[_File]] = {
    "LlamaBidirectionalModel": TextFile,
    "LlamaNemotronVLModel": MultimodalFile,
}
"""What config.json is, by its architecture."""


def read_config(path: Path) -> TextFile | MultimodalFile:
    """Return config.json, a text model's or a multimodal one's.

    Raises:
        CheckpointError: it is missing, no JSON, or says something the engine does not compute.
    """
    architectures = read(path, _Architecture, required=True).architectures
    kind = _FILES.get(architectures[0]) if len(architectures) == 1 else None
    if kind is None:
        text, multimodal = _FILES
        refuse(
            path,
            "architectures",
            architectures,
            f"[{text!r}], the text embedding family, or [{multimodal!r}], the multimodal one",
        )
    file = read(path, kind, required=True)
    assert isinstance(file, (TextFile, MultimodalFile))
    return file


def read_vision(path: Path, file: MultimodalFile, max_tiles: int | None) -> VisionConfig:
    """Return what config.json and processor_config.json beside it say of images.

    `max_tiles` is asked for, or None for what the files say, the processor's first, as vLLM does.

    Raises:
        CheckpointError: images are to be cut in a way that the engine does not.
    """
    processor = read(path.with_name("processor_config.json"), ProcessorConfig)
    said: dict[str, Any] = {}
    for part in (file, processor.image_processor, processor):
        said |= part.model_dump(include=set(Tiling.model_fields), exclude_none=True)
    most = said.get("max_input_tiles", 2) if said.get("dynamic_image_size", True) else 1
    if max_tiles is None:
        if not 1 <= most <= _MOST_TILES:
            refuse(path.parent, "max_input_tiles", most, f"1 to {_MOST_TILES}")
        for name, value in (
            {"use_thumbnail": True, "min_input_tiles": 1}.items() if most > 1 else ()
        ):
            if (given := said.get(name, value)) != value:
                refuse(path.parent, name, given, repr(value))
    return VisionConfig(file.vision_config, file.img_context_token_id, max_tiles or most)


def read(path: Path, kind: type[FileT], required: bool = False) -> FileT:
    """Return a JSON file as `kind`; where it is missing and not required, as its defaults.

    Raises:
        CheckpointError: it is missing, cannot be read, is no JSON, or a field has a wrong value.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        if not required and not path.is_symlink():
            return kind()
        raise CheckpointError(f"{path.parent} has no {path.name}; is it a checkpoint?") from None
    except OSError as exc:
        raise CheckpointError(f"{path} cannot be read: {exc}") from exc
    except ValidationError as exc:
        error = exc.errors(include_url=False)[0]
    field = ".".join(str(part) for part in error["loc"] if part not in ("default", "llama3"))
    if error["type"] == "json_invalid":
        raise CheckpointError(f"{path} is not valid JSON: {error['ctx']['error']}")
    if error["type"] == "missing":
        raise CheckpointError(f"{path}: {field} is missing")
    if error["type"] == "union_tag_invalid":
        tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        refuse(path, f"{field}.rope_type", tag, f"one of {tags}")
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = re.sub("^(greater|less)", r"a number \1", expected)
    refuse(path, field or "the file", error["input"], expected)


def refuse(path: Path, field: str, value: object, expected: str) -> NoReturn:
    """Raise the CheckpointError of a field."""
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    raise CheckpointError(f"{path}: {field} is {shown}; expected {expected}")
