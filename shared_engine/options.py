"""Every option there is, once. Both adapters inherit them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from shared_engine.catalogue import DEFAULT_MODEL
from shared_engine.vectors import EmbeddingType

DType = Literal["auto", "float32", "bfloat16", "float16"]
Truncate = Literal["NONE", "START", "END"]

_option = partial(Field, frozen=True)  # an engine in use does not change; copy with model_copy()


class Options(BaseModel):
    """Which model, where it runs, and what its vectors look like. Unknown options are refused."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str = _option(
        default=DEFAULT_MODEL,
        min_length=1,
        description="Name or alias of a model in the catalogue, a Hugging Face id, or a folder.",
    )
    checkpoint: str | None = _option(
        default=None,
        description="Folder or Hugging Face id of the weights, where `model` is only their name.",
    )
    revision: str | None = _option(
        default=None, description="Branch, tag or commit of a Hugging Face id."
    )
    device: str = _option(
        default="auto",
        description='"cpu", "cuda", "cuda:1"; auto is a CUDA GPU if there is one, else the CPU.',
    )
    dtype: DType = _option(
        default="auto",
        description="Number type of the weights; auto is bfloat16 where the device multiplies it.",
    )
    dimensions: int | None = _option(
        default=None, gt=0, description="Length of a vector; None is the model's full size."
    )
    embedding_type: EmbeddingType = _option(
        default="float", description="Number type of a vector's values."
    )
    truncate: Truncate = _option(
        default="NONE",
        description="A text over the limit is refused (NONE), or loses its START or END.",
    )
    max_tokens: int | None = _option(
        default=None, gt=0, description="A limit below the model's own, prefix and BOS included."
    )
    tokens_per_step: int | None = _option(
        default=None,
        gt=0,
        description="The most tokens in one forward pass; None suits the device.",
    )
    show_progress: bool = _option(default=False, description="Show a progress bar.")

    @field_validator("model", "checkpoint", mode="before")
    @classmethod
    def _path_to_str(cls, value: Any) -> Any:
        return str(value) if isinstance(value, Path) else value

    @field_validator("truncate", mode="before")
    @classmethod
    def _upper(cls, value: Any) -> Any:
        return value.upper() if isinstance(value, str) else value
