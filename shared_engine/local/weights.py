"""Read the tensors of a checkpoint by name, one at a time, directly to the device.

Weights in FP8 are dequantized. Source of their layout: NVIDIA's Model Optimizer, which stores a
`weight` as float8_e4m3fn and the number to multiply it with as `weight_scale`.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shared_engine.errors import CheckpointError
from shared_engine.local.checkpoint import Checkpoint, weight_files
from shared_engine.local.device import Placement

_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_UNUSED = (
    "lm_head.weight",
    "rotary_emb.inv_freq",
    "embeddings.position_ids",
    ".input_scale",  # of activations, which the engine does not quantize
    ".k_scale",  # of a KV cache, which an encoder does not have
    ".v_scale",
)
_UNUSED_PARTS = (
    "vision_model.head.",  # SigLIP's attention pooling, which no model of ours runs
    "language_model.score.",  # a second head in some exports of rerankers
)
_PREFIX_ALIASES = {  # in training exports, rerankers and transformers 4
    "model.": "",
    "language_model.model.": "language_model.",
    "vision_model.vision_model.": "vision_model.",
}


class Weights:
    """The tensors of a checkpoint's files by their names in the public checkpoints.

    Names of a text model have no prefix (`layers.0...`); in a multimodal model, those of the
    language model begin with `language_model.`.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement) -> None:
        """Open the files.

        Raises:
            CheckpointError: a file is missing or cannot be read.
        """
        self._folder, self._placement = checkpoint.folder, placement
        self._is_fp8 = checkpoint.is_fp8
        # Devices other than these may not support FP8.
        device = placement.device if placement.device.type == "cuda" else "cpu"
        self._remaining: dict[str, tuple[Any, str]] = {}
        for name in weight_files(self._folder):
            path = self._folder / name
            if not os.path.isfile(path):
                raise CheckpointError(
                    f"{self._folder} has no {name}; the engine reads only safetensors"
                )
            try:
                file = safe_open(path, framework="pt", device=str(device))
            except (SafetensorError, OSError) as exc:
                raise CheckpointError(f"{path} cannot be read: {exc}") from exc
            for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
                common = common_name(key)
                if is_unused(common):
                    continue
                if common in self._remaining:
                    raise CheckpointError(f"{path} holds {key!r}, which is a duplicate")
                self._remaining[common] = (file, key)

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a tensor in `dtype`, by default the placement's; each can be read once.

        Raises:
            CheckpointError: the tensor or its scale is missing, has another shape or a dtype that
                is not supported.
        """
        tensor = self._read(name, *shape)
        if tensor.dtype == torch.float8_e4m3fn and self._is_fp8:
            tensor = tensor.float() * self._read(f"{name}_scale").float()
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._folder}: tensor {name!r} has dtype {tensor.dtype}; expected one of "
                f"{', '.join(map(str, _DTYPES))}, or torch.float8_e4m3fn with quant_algo FP8 in "
                "quantization_config of config.json"
            )
        return tensor.to(self._placement.device, dtype or self._placement.dtype)

    def _read(self, name: str, *shape: int) -> Tensor:
        try:
            file, key = self._remaining.pop(name)
        except KeyError:
            raise CheckpointError(f"{self._folder} has no tensor {name!r}") from None
        try:
            tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, AttributeError) as exc:  # AttributeError: a dtype unknown to torch
            raise CheckpointError(f"{self._folder}: tensor {key!r} cannot be read: {exc}") from exc
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self._folder}: tensor {key!r} has shape {tuple(tensor.shape)}; expected "
                f"{shape}, as in config.json"
            )
        return tensor

    def check_nothing_left(self) -> None:
        """Raise a CheckpointError if a tensor was not read: config.json is of another model."""
        if self._remaining:
            examples = ", ".join(sorted(key for _, key in self._remaining.values())[:3])
            raise CheckpointError(
                f"{self._folder} holds {len(self._remaining)} tensors that config.json does not "
                f"describe, for example {examples}"
            )


def is_unused(name: str) -> bool:
    """Return whether no result depends on a tensor; `name` is its common name."""
    return name.endswith(_UNUSED) or name.startswith(_UNUSED_PARTS)


def common_name(key: str) -> str:
    """Return the name in the public checkpoints of a tensor, which may have an alias."""
    for alias, prefix in _PREFIX_ALIASES.items():  # several may apply
        if key.startswith(alias):
            key = prefix + key.removeprefix(alias)
    return key
