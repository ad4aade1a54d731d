"""Vectors and scores computed by transformers' own classes, for `nemoretriever check --reference`.

The engine has its own forward pass, because transformers pads batches, needs remote code for
these checkpoints, and accepts configurations that it does not compute. Here its stock `LlamaModel`,
`Ministral3Model` or `Mistral3Model`, or its `InternVLModel` of a `SiglipVisionModel` and a
`LlamaModel`, computes the checkpoint: one input at a time, in float32, with a mask that hides no
token. Only the images are cut or resized by this package.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from shared_engine._lazy import needs_extra
from shared_engine.documents import EmbeddingInput, Role
from shared_engine.local.checkpoint import Checkpoint, resolve, weight_files
from shared_engine.local.config import PIXTRAL_MEAN, PIXTRAL_STD
from shared_engine.local.tokenizer import create_tokenizer
from shared_engine.local.vision import PixtralVision
from shared_engine.local.weights import common_name, is_unused
from shared_engine.options import EngineOptions

_NAMED = (
    "architectures", "auto_map", "dtype", "model_type", "quantization_config", "torch_dtype",
)  # fmt: skip
"""Fields of a config that name a class or a dtype."""
_HEAD = "score.weight"
"""Name of the tensor (1, hidden) that turns a mean into a score."""
_PARTS = {
    "mlp1.0.": "multi_modal_projector.layer_norm.",
    "mlp1.1.": "multi_modal_projector.linear_1.",
    "mlp1.3.": "multi_modal_projector.linear_2.",
    "vision_model.": "vision_tower.",
}
"""Prefixes of tensor names in a multimodal checkpoint, and their names in InternVL."""


class Reference:
    """A checkpoint in transformers' classes, on the CPU in float32."""

    def __init__(self, options: EngineOptions) -> None:
        """Load the checkpoint.

        Raises:
            CheckpointError: the checkpoint cannot be found or is not supported.
            MissingExtraError: transformers is not installed.
        """
        self._checkpoint = resolve(options)
        folder = self._checkpoint.folder
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._tokenizer = create_tokenizer(folder, (folder / "tokenizer.json").read_text("utf-8"))
        with needs_extra("local"):
            self._model = _create(config)
        # Raises for missing or unexpected tensors.
        weights = _read_weights(self._checkpoint)
        self._head = weights.pop(_HEAD) if self.is_reranker else None
        self._model.load_state_dict(weights)
        self._model.train(False)

    @property
    def is_reranker(self) -> bool:
        """Whether it has scores, not vectors."""
        return self._checkpoint.scoring is not None

    @torch.inference_mode()
    def score(self, query: str, documents: Sequence[EmbeddingInput]) -> NDArray[np.float32]:
        """Return the logits of documents, (n,) float32."""
        scoring = self._checkpoint.scoring
        assert scoring is not None
        assert self._head is not None
        before = f"{scoring.before_query}{query}{scoring.before_document}"
        means = torch.stack([self._compute(document, "", before) for document in documents])
        return (means @ self._head[0] / scoring.temperature).numpy()

    @torch.inference_mode()
    def embed(self, documents: Sequence[EmbeddingInput], role: Role) -> NDArray[np.float32]:
        """Return vectors of full size and unit length, (n, hidden) float32."""
        prompt = self._checkpoint.prompts[role]
        means = [self._compute(document, prompt) for document in documents]
        return torch.nn.functional.normalize(torch.stack(means), dim=-1).numpy()

    def _compute(self, document: EmbeddingInput, prompt: str, before: str = "") -> torch.Tensor:
        """Return the mean of the last hidden states, (hidden,).

        Args:
            document: The input.
            prompt: The text before an image.
            before: The text between an image and the text.
        """
        inputs: dict[str, Any] = {}
        vision = self._checkpoint.vision
        if document.image is not None and vision is not None:
            image = np.asarray(vision.prepare(document.image, urls=False, on_device=False))
            pixels = torch.from_numpy(image).permute(0, 3, 1, 2).float()  # (n, 3, height, width)
            if isinstance(vision, PixtralVision):
                center, width = torch.tensor([PIXTRAL_MEAN, PIXTRAL_STD]).view(2, 3, 1, 1)
                inputs["pixel_values"] = (pixels / 255 - center) / width
                inputs["image_sizes"] = [image.shape[1:3]]
            else:
                inputs["pixel_values"] = pixels / 127.5 - 1
            prompt += "".join(vision.lay_out(image, vision.names)) + " "
        text = prompt + before + (document.text or "")
        if vision is not None and vision.guards_text:
            text = text.rstrip()
        ids = torch.tensor([self._tokenizer.encode(text).ids])
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1])  # additive: every token attends to all
        states = self._model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)
        mean: torch.Tensor = states.last_hidden_state[0].mean(dim=0)
        return mean


def _create(config: dict[str, Any]) -> torch.nn.Module:
    """Return the model of a config, with random weights."""
    import transformers as hf

    def stock(part: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in part.items() if name not in _NAMED}

    model: torch.nn.Module
    if config["architectures"] == ["Ministral3Model"]:
        model = hf.Ministral3Model(hf.Ministral3Config(**stock(config)))
    elif config["architectures"] == ["Mistral3Model"]:
        parts: dict[str, Any] = {
            "text_config": hf.Ministral3Config(**stock(config["text_config"])),
            "vision_config": hf.PixtralVisionConfig(**stock(config["vision_config"])),
        }
        model = hf.Mistral3Model(hf.Mistral3Config(**stock(config) | parts))
    elif "vision_config" not in config:
        model = hf.LlamaModel(hf.LlamaConfig(**stock(config)))
    else:
        vision = hf.SiglipVisionConfig(**stock(config["vision_config"]), vision_use_head=False)
        joined = hf.InternVLConfig(
            vision_config=vision,
            text_config=hf.LlamaConfig(**stock(config["llm_config"])),
            image_token_id=config["img_context_token_id"],
            downsample_ratio=config["downsample_ratio"],
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
        model = hf.InternVLModel(joined)
    return model


def _read_weights(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """Return the tensors of a checkpoint under transformers' names, dequantized to float32."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(checkpoint.folder):
        for key, tensor in load_file(checkpoint.folder / file).items():
            name = common_name(key)
            if not is_unused(name):
                for prefix, new_prefix in _PARTS.items():
                    if name.startswith(prefix):
                        name = new_prefix + name.removeprefix(prefix)
                        break
                tensors[name] = tensor.float()
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith("weight_scale")}
    for name, scale in scales.items():  # of weights in FP8
        tensors[name.removesuffix("_scale")] *= scale
    return tensors
