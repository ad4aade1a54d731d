"""The tensors of a checkpoint by name, read one at a time, straight to the device."""

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
_UNUSED = ("lm_head.weight", "rotary_emb.inv_freq", "embeddings.position_ids")
_UNUSED_PARTS = ("vision_model.head.",)  # SigLIP's attention pooling, which no embedder runs
_SPELLINGS = {  # of training exports and rerankers, and of transformers 4
    "model.": "",
    "language_model.model.": "language_model.",
    "vision_model.vision_model.": "vision_model.",
}


class Weights:
    """Tensors under the names of the public checkpoints, whatever spelling and files they are in.

    The text model's are bare (`layers.0...`), or under `language_model.` in a multimodal one.
    """

    def __init__(self, checkpoint: Checkpoint, placement: Placement) -> None:
        """Open the files.

        Raises:
            CheckpointError: a file is missing or cannot be read.
        """
        self._folder, self._placement = checkpoint.folder, placement
        self._left: dict[str, tuple[Any, str]] = {}
        for name in weight_files(self._folder):
            path = self._folder / name
            if not os.path.isfile(path):
                raise CheckpointError(
                    f"{self._folder} has no {name}; the engine reads safetensors only"
                )
            try:
                file = safe_open(path, framework="pt", device=str(placement.device))
            except (SafetensorError, OSError) as exc:
                raise CheckpointError(f"{path} cannot be read: {exc}") from exc
            for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
                common = common_name(key)
                if is_unused(common):
                    continue
                if common in self._left:
                    raise CheckpointError(f"{path} holds {key!r}, which is there already")
                self._left[common] = (file, key)

    def __call__(self, name: str, *shape: int) -> Tensor:
        """Return a tensor in the placement's dtype; each is asked for once.

        Raises:
            CheckpointError: there is none of that name, or it is of another shape, or of integers.
        """
        try:
            file, key = self._left.pop(name)
        except KeyError:
            raise CheckpointError(f"{self._folder} has no tensor {name!r}") from None
        try:
            tensor: Tensor = file.get_tensor(key)
        except (SafetensorError, AttributeError) as exc:  # a dtype that torch does not have
            raise CheckpointError(f"{self._folder}: tensor {key!r} cannot be read: {exc}") from exc
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self._folder}: tensor {key!r} has shape {tuple(tensor.shape)}; config.json says "
                f"{shape}"
            )
        if tensor.dtype not in _DTYPES:
            raise CheckpointError(
                f"{self._folder}: tensor {key!r} is of {tensor.dtype}; expected one of "
                f"{', '.join(map(str, _DTYPES))}, as the engine runs plain weights"
            )
        return tensor.to(self._placement.dtype)

    def check_nothing_left(self) -> None:
        """Raise CheckpointError for tensors that nobody asked for: config.json is another's."""
        if self._left:
            some = ", ".join(sorted(key for _, key in self._left.values())[:3])
            raise CheckpointError(
                f"{self._folder} holds {len(self._left)} tensors that config.json does not "
                f"account for, among them {some}"
            )


def is_unused(name: str) -> bool:
    """Whether no embedding depends on a tensor of this common name."""
    return name.endswith(_UNUSED) or name.startswith(_UNUSED_PARTS)


def common_name(key: str) -> str:
    """Return the name of a tensor in the public checkpoints, from any of its spellings."""
    for spelling, common in _SPELLINGS.items():
        if key.startswith(spelling):
            return common + key.removeprefix(spelling)
    return key
