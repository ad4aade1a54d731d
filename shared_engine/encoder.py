"""The bidirectional Llama over packed rows: tokens in, one mean vector a sequence out.

The decoder stack of Llama 3.2 without its causal mask and without padding: linear layers and norms
see the tokens of all sequences in one row (T, hidden), attention keeps each sequence to itself.
T is the tokens of a step, S its sequences.

Source of the arithmetic: `LlamaBidirectionalModel` of the public checkpoints (mean pooling, no
causal mask) and transformers' `modeling_llama.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from shared_engine.attention import Attention, Layout
from shared_engine.checkpoint import Checkpoint, rope
from shared_engine.device import Placement
from shared_engine.errors import CheckpointError


@dataclass(frozen=True)
class Layer:
    """Weights of one layer; projections that share their input lie in one matrix."""

    attention_norm: Tensor  # (hidden,)
    qkv: Tensor  # ((heads + 2 * kv_heads) * d, hidden)
    o: Tensor  # (hidden, heads * d)
    mlp_norm: Tensor  # (hidden,)
    gate_up: Tensor  # (2 * intermediate, hidden)
    down: Tensor  # (hidden, intermediate)


class Encoder:
    """A loaded model on one device. Calls are not concurrent: its worker thread owns it."""

    def __init__(self, checkpoint: Checkpoint, placement: Placement) -> None:
        """Load the weights.

        Raises:
            CheckpointError: a weight file or tensor is missing, unknown or of another shape.
        """
        config = checkpoint.config
        self.device = placement.device
        self._attend: Attention = placement.attend
        self._heads = int(config["num_attention_heads"])
        self._kv_heads = int(config.get("num_key_value_heads") or self._heads)
        self._head_dim = int(config.get("head_dim") or config["hidden_size"] // self._heads)
        self._eps = float(config.get("rms_norm_eps", 1e-6))
        self._embedding, self._layers, self._norm = _load(
            checkpoint.folder, config, self._head_dim, placement
        )
        self._cos, self._sin = _rotary_tables(
            rope(config), self._head_dim, checkpoint.max_tokens, placement
        )

    @torch.inference_mode()
    def __call__(self, sequences: Sequence[NDArray[np.int32]]) -> NDArray[np.float32]:
        """Return the mean of the last hidden states of every sequence, (S, hidden) float32.

        The means are neither cut nor scaled. Each is over all tokens of its sequence, prefix and
        special tokens included, and does not depend on the other sequences.
        """
        # Neighbours of equal length share an attention call on a CPU.
        order = np.argsort([len(ids) for ids in sequences], kind="stable")
        sequences = [sequences[i] for i in order]
        lengths = [len(ids) for ids in sequences]
        boundaries = np.zeros(len(lengths) + 1, np.int32)
        np.cumsum(lengths, out=boundaries[1:])
        positions = np.arange(boundaries[-1], dtype=np.int32) - np.repeat(boundaries[:-1], lengths)
        layout = Layout(lengths, self._to_device(boundaries))
        hidden = self._forward(
            self._to_device(np.concatenate(sequences)), self._to_device(positions), layout
        )  # (T, hidden)
        counts = self._to_device(np.asarray(lengths, np.int64))  # (S,)
        means = torch.segment_reduce(hidden.float(), "mean", lengths=counts, unsafe=True)
        out = np.empty(means.shape, np.float32)  # (S, hidden)
        out[order] = means.cpu().numpy()
        return out

    def _forward(self, ids: Tensor, positions: Tensor, layout: Layout) -> Tensor:
        x = F.embedding(ids, self._embedding)  # (T, hidden)
        cos, sin = self._cos[positions], self._sin[positions]  # (T, 1, d / 2)
        rotated = self._heads + self._kv_heads  # queries and keys are rotated, values are not
        for layer in self._layers:
            qkv = F.linear(self._rms_norm(x, layer.attention_norm), layer.qkv)
            heads = qkv.view(len(x), -1, self._head_dim)  # (T, heads + 2 * kv_heads, d)
            turned = _rotate(heads[:, :rotated], cos, sin)  # (T, heads + kv_heads, d)
            q, k, v = turned[:, : self._heads], turned[:, self._heads :], heads[:, rotated:]
            attended = self._attend(q, k, v, layout)  # (T, heads, d)
            x.addmm_(attended.flatten(1), layer.o.T)
            gate, up = F.linear(self._rms_norm(x, layer.mlp_norm), layer.gate_up).chunk(2, -1)
            x.addmm_(F.silu(gate, inplace=True).mul_(up), layer.down.T)
        return self._rms_norm(x, self._norm)

    def _rms_norm(self, x: Tensor, weight: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, (x.shape[-1],), weight, self._eps)
        # torch has no fused kernel for a CPU: two passes over memory instead of its four.
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)  # (T, 1)
        scale = torch.rsqrt(norm.square_().div_(x.shape[-1]).add_(self._eps))
        return (x * scale).to(x.dtype).mul_(weight)

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary position embedding to x (T, heads, d), whose halves are the two components."""
    first, second = x.chunk(2, dim=-1)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out


def _rotary_tables(
    parameters: dict[str, Any], head_dim: int, max_tokens: int, placement: Placement
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for every position, each (max_tokens, 1, d / 2).

    "llama3" stretches the slow frequencies: those whose wavelength exceeds the original context
    are divided by `factor`, the fast ones kept, those between interpolated. Computed in float32 as
    transformers does, so that long texts agree with it to the last bits.
    """
    theta = float(parameters["rope_theta"])
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if parameters["rope_type"] == "llama3":
        factor = parameters["factor"]
        low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
        turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        kept = ((turns - low) / (high - low)).clamp(0, 1)  # 0: stretched, 1: kept
        frequencies = (1 - kept) * frequencies / factor + kept * frequencies
    angles = torch.arange(max_tokens, dtype=torch.float32)[:, None, None] * frequencies
    return (
        angles.cos().to(placement.device, placement.dtype),
        angles.sin().to(placement.device, placement.dtype),
    )


def _load(
    folder: Path, config: dict[str, Any], head_dim: int, placement: Placement
) -> tuple[Tensor, list[Layer], Tensor]:
    """Read the safetensors files, one tensor at a time, straight to the device."""
    take = _Weights(folder, placement)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    heads = config["num_attention_heads"]
    q, kv = heads * head_dim, (config.get("num_key_value_heads") or heads) * head_dim
    embedding = take("embed_tokens.weight", config["vocab_size"], hidden)
    layers = []
    for n in range(config["num_hidden_layers"]):
        at, mlp = f"layers.{n}.self_attn", f"layers.{n}.mlp"
        layers.append(
            Layer(
                attention_norm=take(f"layers.{n}.input_layernorm.weight", hidden),
                qkv=torch.cat(
                    [
                        take(f"{at}.q_proj.weight", q, hidden),
                        take(f"{at}.k_proj.weight", kv, hidden),
                        take(f"{at}.v_proj.weight", kv, hidden),
                    ]
                ),
                o=take(f"{at}.o_proj.weight", hidden, q),
                mlp_norm=take(f"layers.{n}.post_attention_layernorm.weight", hidden),
                gate_up=torch.cat(
                    [
                        take(f"{mlp}.gate_proj.weight", inner, hidden),
                        take(f"{mlp}.up_proj.weight", inner, hidden),
                    ]
                ),
                down=take(f"{mlp}.down_proj.weight", hidden, inner),
            )
        )
    norm = take("norm.weight", hidden)
    take.check_nothing_left()
    return embedding, layers, norm


class _Weights:
    """Tensors of a checkpoint by name: in one file or shards, with or without `model.`."""

    _UNUSED = ("lm_head.weight", "rotary_emb.inv_freq")

    def __init__(self, folder: Path, placement: Placement) -> None:
        from safetensors import SafetensorError, safe_open

        self._folder, self._placement = folder, placement
        index = folder / "model.safetensors.index.json"
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        else:
            names = ["model.safetensors"]
        self._left: dict[str, tuple[Any, str]] = {}
        for name in names:
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder} has no {name}; the engine reads safetensors only")
            try:
                file = safe_open(folder / name, framework="pt", device=str(placement.device))
            except SafetensorError as exc:
                raise CheckpointError(f"{folder / name} cannot be read: {exc}") from exc
            for key in file.keys():  # type: ignore[no-untyped-call]  # noqa: SIM118
                if not key.endswith(self._UNUSED):
                    self._left[key.removeprefix("model.")] = (file, key)

    def __call__(self, name: str, *shape: int) -> Tensor:
        try:
            file, key = self._left.pop(name)
        except KeyError:
            raise CheckpointError(f"{self._folder} has no tensor {name!r}") from None
        tensor: Tensor = file.get_tensor(key)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(
                f"{self._folder}: tensor {key!r} has shape {tuple(tensor.shape)}; config.json says "
                f"{shape}"
            )
        return tensor.to(self._placement.dtype)

    def check_nothing_left(self) -> None:
        if self._left:
            some = ", ".join(sorted(key for _, key in self._left.values())[:3])
            raise CheckpointError(
                f"{self._folder} holds {len(self._left)} tensors that config.json does not "
                f"account for, among them {some}"
            )
