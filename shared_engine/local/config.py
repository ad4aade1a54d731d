"""Types of the JSON files of a checkpoint; a value that the engine does not support is an error.

Each class is a file or a part of one. Aliases are the names in the file, which errors use.
Source: the files of nvidia/llama-nemotron-embed-1b-v2 and nvidia/llama-nemotron-embed-vl-1b-v2 on
Hugging Face, NVIDIA-NeMo/Automodel `llama_bidirectional` and `llama_nemotron_vl`, and transformers'
`configuration_ministral3.py`, `configuration_mistral3.py` and `configuration_pixtral.py`.
"""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath
from typing import Annotated, Any, Literal, NoReturn, Self, TypeVar

import numpy as np
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
from pydantic_core import ErrorDetails

from shared_engine.errors import CheckpointError

MAX_TILES = 12
_MAX_POSITIONS = 2**20
"""Rows of the rotary tables: eight times the family's maximum, 0.5 GB at the usual head size."""
_MAX_TILE_SIZE = 8192
"""Pixels per side; 512 in the family."""
PIXTRAL_MEAN = (0.48145466, 0.4578275, 0.40821073)
PIXTRAL_STD = (0.26862954, 0.26130258, 0.27577711)
"""Mean and standard deviation of red, green and blue, from 0 to 1."""

Size = Annotated[int, Field(gt=0)]
One = Annotated[float, Field(ge=1, le=1)]
Epsilon = Annotated[float, Field(gt=0, le=1)]
Falsy = Literal[False] | None


class _File(BaseModel):
    """The fields that the engine reads; other fields are ignored."""

    model_config = ConfigDict(
        strict=True, frozen=True, extra="ignore", allow_inf_nan=False, protected_namespaces=()
    )


FileT = TypeVar("FileT", bound=BaseModel)


class _WrongValueError(ValueError):
    """A field whose value does not match another field."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(expected)
        self.field, self.value = field, value


def _require(is_valid: bool, field: str, value: object, expected: str) -> None:
    if not is_valid:
        raise _WrongValueError(field, value, expected)


class Rope(_File):
    """Rotary position embedding with unscaled frequencies."""

    rope_type: Literal["default"]
    theta: float = Field(alias="rope_theta", ge=1)
    partial_rotary_factor: One | None = None


class Llama3Rope(_File):
    """Rotary position embedding with scaled low frequencies, as in Llama 3.1."""

    rope_type: Literal["llama3"]
    theta: float = Field(alias="rope_theta", ge=1)
    factor: float = Field(ge=1)
    low_freq_factor: float = Field(gt=0)
    high_freq_factor: float
    original_max_position_embeddings: int = Field(gt=0, le=_MAX_POSITIONS)
    partial_rotary_factor: One | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, high = self.low_freq_factor, self.high_freq_factor
        _require(high > low, "high_freq_factor", high, f"more than low_freq_factor ({low})")
        return self


class YarnRope(_File):
    """Rotary position embedding with YaRN's frequencies, and Llama 4's scale of queries."""

    rope_type: Literal["yarn"]
    theta: float = Field(alias="rope_theta", gt=1)
    factor: float = Field(ge=1)
    original_max_position_embeddings: int = Field(gt=0, le=_MAX_POSITIONS)
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float = Field(default=0.0, ge=0)
    mscale_all_dim: float = Field(default=0.0, ge=0)
    llama_4_scaling_beta: float = Field(default=0.0, ge=0)
    """Of the scale of a query beyond the original length; 0 for none."""
    attention_factor: None = None
    truncate: Literal[True] | None = None
    partial_rotary_factor: One | None = None


class Quantization(_File):
    """`quantization_config` of config.json, as NVIDIA's Model Optimizer writes it."""

    quant_method: Literal["modelopt"] = "modelopt"
    quant_algo: Literal["FP8"]
    """float8_e4m3fn weights with one scale for each tensor."""


class QuantizationFile(_File):
    """hf_quant_config.json, Model Optimizer's own file."""

    quantization: Quantization | None = None


class LayersConfig(_File):
    """The layers of a language model, or of a vision tower that has the same kind."""

    hidden_size: Size
    intermediate_size: Size
    layers: Size = Field(alias="num_hidden_layers")
    heads: Size = Field(alias="num_attention_heads")
    kv_heads: Size = Field(alias="num_key_value_heads")
    head_dim: Size
    rms_norm_eps: Epsilon = 1e-6
    hidden_act: Literal["silu"] = "silu"

    @model_validator(mode="before")
    @classmethod
    def _complete_heads(cls, data: Any) -> Any:
        """Add the defaults of the heads."""
        if not isinstance(data, dict):
            return data
        data = dict(data)
        heads, hidden = data.get("num_attention_heads"), data.get("hidden_size")
        if data.get("num_key_value_heads") is None:
            data["num_key_value_heads"] = heads
        if data.get("head_dim") is None and isinstance(heads, int) and isinstance(hidden, int):
            data["head_dim"] = hidden // max(heads, 1)
        return data

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        _require(
            self.heads % self.kv_heads == 0,
            "num_key_value_heads", self.kv_heads,
            f"a divisor of num_attention_heads ({self.heads})",
        )  # fmt: skip
        _require(self.head_dim % 2 == 0, "head_dim", self.head_dim, "an even number")
        return self


class ModelConfig(LayersConfig):
    """The language model: config.json, or its `llm_config` or `text_config`."""

    vocab_size: Size
    max_position_embeddings: int = Field(gt=0, le=_MAX_POSITIONS)
    rope: Rope | Llama3Rope | YarnRope = Field(
        validation_alias=AliasChoices("rope_parameters", "rope_scaling"), discriminator="rope_type"
    )
    partial_rotary_factor: One | None = None
    is_causal: Falsy = None
    use_bidirectional_attention: Literal[True] | None = None
    bos_token_id: int | None = Field(default=None, ge=0)
    pooling: Literal["avg"] = "avg"
    attention_bias: Falsy = None
    mlp_bias: Falsy = None
    quantization_config: Quantization | None = None

    @model_validator(mode="before")
    @classmethod
    def _complete(cls, data: Any) -> Any:
        """Unify the field names of RoPE.

        transformers 4 writes rope_theta and rope_scaling, transformers 5 writes rope_parameters.
        """
        if not isinstance(data, dict):
            return data
        spellings = ("rope_parameters", "rope_scaling")
        name = next((spelling for spelling in spellings if data.get(spelling)), "rope_scaling")
        rope = data.get(name) or {}
        if isinstance(rope, dict):
            default = "default" if rope.keys() <= {"rope_theta"} else None  # not one per layer type
            kind = rope.get("rope_type", rope.get("type", default))
            theta = rope.get("rope_theta", data.get("rope_theta", 10_000.0))
            rope = {**rope, "rope_type": kind, "rope_theta": theta}
        return {key: data[key] for key in data if key not in spellings} | {name: rope}

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(
            self.bos_token_id is None or self.bos_token_id < self.vocab_size,
            "bos_token_id", self.bos_token_id, f"less than vocab_size ({self.vocab_size})",
        )  # fmt: skip
        return self


class TowerConfig(_File):
    """The SigLIP tower: `vision_config` of config.json."""

    model_type: Literal["siglip_vision_model"]
    hidden_act: Literal["gelu_pytorch_tanh"] = "gelu_pytorch_tanh"
    num_channels: Literal[3] = 3
    hidden_size: Size
    intermediate_size: Size
    layers: Size = Field(alias="num_hidden_layers")
    heads: Size = Field(alias="num_attention_heads")
    image_size: int = Field(gt=0, le=_MAX_TILE_SIZE)
    patch_size: Size
    layer_norm_eps: Epsilon = 1e-6

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(
            self.hidden_size % self.heads == 0,
            "num_attention_heads", self.heads, f"a divisor of hidden_size ({self.hidden_size})",
        )  # fmt: skip
        _require(
            self.image_size % (2 * self.patch_size) == 0,
            "patch_size", self.patch_size, f"half a divisor of image_size ({self.image_size})",
        )  # fmt: skip
        return self


class AxialRope(_File):
    """Rotary position embedding of a row and a column."""

    rope_type: Literal["axial"] = "axial"
    theta: float = Field(default=10_000.0, alias="rope_theta", ge=1)


class PixtralConfig(LayersConfig):
    """The Pixtral tower: `vision_config` of config.json."""

    model_type: Literal["pixtral"]
    hidden_act: Literal["silu"]  # required, as transformers' default is another
    num_channels: Literal[3] = 3
    patch_size: Size
    rope: AxialRope = Field(default=AxialRope(), validation_alias="rope_parameters")
    rms_norm_eps: Epsilon = 1e-5

    @model_validator(mode="before")
    @classmethod
    def _nest_theta(cls, data: Any) -> Any:
        """Accept the spelling of transformers 4."""
        if isinstance(data, dict) and "rope_parameters" not in data and "rope_theta" in data:
            return {**data, "rope_parameters": {"rope_theta": data["rope_theta"]}}
        return data

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(
            self.head_dim * self.heads == self.hidden_size and self.head_dim % 4 == 0,
            "head_dim", self.head_dim,
            f"a multiple of 4, and hidden_size ({self.hidden_size}) / num_attention_heads",
        )  # fmt: skip
        return self


class Tiling(_File):
    """How images are cut into tiles; None if a file does not define it."""

    dynamic_image_size: bool | None = None
    max_input_tiles: int | None = None
    min_input_tiles: int | None = None
    use_thumbnail: bool | None = None


class ProcessorConfig(Tiling):
    """processor_config.json, whose fields take precedence over config.json."""

    image_processor: Tiling = Tiling()


class _LongestEdge(_File):
    longest_edge: int = Field(gt=0, le=_MAX_TILE_SIZE)


class PixtralImages(_File):
    """preprocessor_config.json of a Pixtral model, or that part of processor_config.json."""

    size: _LongestEdge | None = None
    do_resize: Literal[True] | None = None
    do_rescale: Literal[True] | None = None
    do_normalize: Literal[True] | None = None
    do_center_crop: Falsy = None
    resample: Literal[3] = 3
    """Pillow's number of the bicubic filter."""
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = PIXTRAL_MEAN
    image_std: tuple[float, float, float] = PIXTRAL_STD

    @field_validator("rescale_factor", "image_mean", "image_std")
    @classmethod
    def _is_published(cls, value: Any, info: ValidationInfo) -> Any:
        expected = cls.model_fields[info.field_name or ""].default
        if not np.allclose(value, expected, rtol=1e-6):
            raise ValueError(f"{expected}")
        return value


class PixtralProcessor(_File):
    """processor_config.json of a Pixtral model."""

    image_processor: PixtralImages | None = None
    patch_size: int | None = None
    spatial_merge_size: int | None = None


class _Architecture(_File):
    architectures: list[str]


class _Prefixes(_File):
    query_prefix: str = "query:"
    passage_prefix: str = "passage:"
    matryoshka_dimensions: list[Size] | None = None


class _Scoring(_File):
    temperature: float = Field(default=1.0, gt=0)
    """Divisor of the score."""


class TextFile(ModelConfig, _Prefixes):
    """config.json of a text embedding model."""


class MinistralFile(TextFile):
    """config.json of a Nemotron-3 text embedding model, a `Ministral3Model` of transformers."""

    is_causal: Literal[False]
    rope: YarnRope = Field(
        validation_alias=AliasChoices("rope_parameters", "rope_scaling"),
    )
    rms_norm_eps: Epsilon = 1e-5
    sliding_window: None = None


class TextRerankerFile(ModelConfig, _Scoring):
    """config.json of a text reranker."""

    prompt_template: Literal["v1"] = "v1"


class _MultimodalFile(Tiling):
    llm_config: ModelConfig
    vision_config: TowerConfig
    img_context_token_id: int = Field(ge=0)
    force_image_size: int | None = None
    downsample_ratio: float = Field(default=0.5, ge=0.5, le=0.5)
    ps_version: Literal["v2"] = "v2"
    select_layer: Literal[-1] = -1
    pooling: Literal["avg"]
    quantization_config: Quantization | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        _require(
            self.force_image_size in (None, self.vision_config.image_size),
            "force_image_size", self.force_image_size,
            f"{self.vision_config.image_size}, the image_size of vision_config",
        )  # fmt: skip
        return self


class MultimodalFile(_MultimodalFile, _Prefixes):
    """config.json of a multimodal embedding model."""


class MultimodalRerankerFile(_MultimodalFile, _Scoring):
    """config.json of a multimodal reranker."""

    prompt_template: Literal["v1"] | None = None


class MistralFile(_Prefixes):
    """config.json of a Nemotron-3.5 embedding model, a `Mistral3Model` of transformers."""

    llm_config: MinistralFile = Field(alias="text_config")
    vision_config: PixtralConfig
    image_token: int = Field(
        validation_alias=AliasChoices("image_token_index", "image_token_id"), ge=0
    )
    spatial_merge_size: Literal[2]
    vision_feature_layer: Literal[-1] = -1
    multimodal_projector_bias: Falsy = None
    projector_hidden_act: Literal["gelu"] = "gelu"
    is_causal: Falsy = None
    pooling: Literal["avg"] = "avg"
    quantization_config: Quantization | None = None


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
    """modules.json: the modules that sentence-transformers runs, the model first."""

    root: list[_Module] = []

    @field_validator("root")
    @classmethod
    def _are_computed(cls, value: list[_Module]) -> list[_Module]:
        for module in value[1:]:
            if module.type.rpartition(".")[2] not in ("Pooling", "Normalize"):
                raise ValueError(f"only Pooling and Normalize after the model, not {module.type}")
        return value


class Prompts(_File):
    """The prefixes of texts in config_sentence_transformers.json."""

    query: str | None = None
    document: str | None = Field(default=None, validation_alias=AliasChoices("document", "passage"))


class SentenceTransformersConfig(_File):
    """config_sentence_transformers.json."""

    prompts: Prompts | None = None


class TokenizerConfig(_File):
    """tokenizer_config.json."""

    fix_mistral_regex: bool | None = None


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


EmbedderFile = TextFile | MultimodalFile | MistralFile
RerankerFile = TextRerankerFile | MultimodalRerankerFile

_FILES: dict[str, type[EmbedderFile | RerankerFile]] = {
    "LlamaBidirectionalModel": TextFile,
    "Ministral3Model": MinistralFile,
    "LlamaNemotronVLModel": MultimodalFile,
    "Mistral3Model": MistralFile,
    "LlamaBidirectionalForSequenceClassification": TextRerankerFile,
    "LlamaNemotronVLForSequenceClassification": MultimodalRerankerFile,
}
"""The type of config.json, by architecture."""


def read_config(path: Path) -> EmbedderFile | RerankerFile:
    """Return config.json of an embedding model or of a reranker.

    Raises:
        CheckpointError: the file is missing or invalid, or the engine does not compute the model.
    """
    architectures = read(path, _Architecture, required=True).architectures
    kind = _FILES.get(architectures[0]) if len(architectures) == 1 else None
    if kind is None:
        known = ", ".join(f"[{name!r}]" for name in _FILES)
        refuse(path, "architectures", architectures, f"one of {known}")
    return read(path, kind, required=True)


def read(path: Path, kind: type[FileT], required: bool = False) -> FileT:
    """Return a JSON file as `kind`; the defaults of `kind` if it is missing and not required.

    Raises:
        CheckpointError: the file is missing, unreadable or invalid, or a field has a wrong value.
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
    _refuse_error(path, error)


def _refuse_error(path: Path, error: ErrorDetails) -> NoReturn:
    """Raise a CheckpointError about the first error of a file."""
    field = ".".join(
        str(part) for part in error["loc"] if part not in ("default", "llama3", "yarn")
    )
    if error["type"] == "json_invalid":
        raise CheckpointError(f"{path} is not valid JSON: {error['ctx']['error']}")
    if error["type"] == "missing":
        raise CheckpointError(f"{path}: {field} is missing")
    if error["type"] == "union_tag_invalid":
        tag, tags = error["ctx"]["tag"], error["ctx"]["expected_tags"]
        refuse(path, f"{field}.rope_type", tag, f"one of {tags}")
    wrong = error.get("ctx", {}).get("error")
    if isinstance(wrong, _WrongValueError):
        refuse(path, f"{field}.{wrong.field}".lstrip("."), wrong.value, str(wrong))
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = re.sub("^(greater|less)", r"a number \1", expected)
    refuse(path, field or "the file", error["input"], expected)


def refuse(path: Path, field: str, value: object, expected: str) -> NoReturn:
    """Raise a CheckpointError about a field."""
    shown = repr(value)
    shown = shown if len(shown) <= 200 else f"{shown[:200]}..."
    raise CheckpointError(f"{path}: {field} is {shown}; expected {expected}")
