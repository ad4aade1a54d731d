"""Independent embedders that the engine is compared with: `f(folder, texts, prefix) -> vectors`.

Each returns unit rows (n, hidden), row i for text i, computed in float32 or better whatever the
checkpoint's dtype. All but `sentence_transformers` take one text at a time, without padding.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch

Vectors = NDArray[np.floating[Any]]
Float64 = NDArray[np.float64]


def numpy_float64(folder: Path, texts: list[str], prefix: str, *, causal: bool = False) -> Float64:
    """Embed with the model written out in numpy; `causal` puts back the mask that must be gone."""
    return _embed(folder, texts, prefix, last_hidden_float64(folder, causal=causal))


def last_hidden_float64(folder: Path, *, causal: bool = False) -> Callable[[list[int]], Float64]:
    """Return a function from the ids of a text to its last hidden states (t, hidden), in numpy."""
    config, weights = read_config(folder), _weights(folder)

    def last_hidden(ids: list[int]) -> Float64:
        rows = weights["embed_tokens.weight"][ids].astype(np.float64)  # (t, hidden)
        return llama_float64(config, weights, rows, causal=causal)

    return last_hidden


def llama_float64(
    config: Mapping[str, Any],
    weights: Mapping[str, NDArray[np.float32]],
    x: Float64,
    *,
    causal: bool = False,
) -> Float64:
    """Take the embeddings of a text's tokens (t, hidden) to the last hidden states, in numpy."""
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    frequencies = _rope_frequencies(config, head_dim)  # (head_dim / 2,)

    def linear(x: Float64, name: str) -> Float64:
        weight = weights[f"{name}.weight"].astype(np.float64)  # (out, in)
        return x @ weight.T

    def norm(x: Float64, name: str) -> Float64:
        scale: Float64 = np.sqrt((x**2).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / scale * weights[f"{name}.weight"]

    def split(x: Float64, count: int) -> Float64:
        return x.reshape(len(x), count, head_dim).swapaxes(0, 1)  # (count, t, head_dim)

    def rotate(x: Float64, angles: Float64) -> Float64:
        a, b = np.split(x, 2, axis=-1)  # the pairs are i and i + head_dim / 2, not 2i and 2i + 1
        cos, sin = np.cos(angles), np.sin(angles)  # (t, head_dim / 2)
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def attention(x: Float64, name: str) -> Float64:
        angles = np.outer(np.arange(len(x)), frequencies)
        q = rotate(split(linear(x, f"{name}.q_proj"), heads), angles)  # (heads, t, head_dim)
        k = rotate(split(linear(x, f"{name}.k_proj"), kv_heads), angles)
        v = split(linear(x, f"{name}.v_proj"), kv_heads)
        k, v = (np.repeat(y, heads // kv_heads, axis=0) for y in (k, v))  # neighbours share
        scores = q @ k.swapaxes(1, 2) / np.sqrt(head_dim)  # (heads, t, t)
        if causal:
            scores[:, np.triu(np.ones(scores.shape[1:], dtype=bool), 1)] = -np.inf
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed = scores / scores.sum(-1, keepdims=True) @ v
        return linear(mixed.swapaxes(0, 1).reshape(len(x), -1), f"{name}.o_proj")

    def mlp(x: Float64, name: str) -> Float64:
        gate = linear(x, f"{name}.gate_proj")
        gate = gate / (1 + np.exp(-gate))
        return linear(gate * linear(x, f"{name}.up_proj"), f"{name}.down_proj")

    for i in range(config["num_hidden_layers"]):
        layer = f"layers.{i}"
        x = x + attention(norm(x, f"{layer}.input_layernorm"), f"{layer}.self_attn")
        x = x + mlp(norm(x, f"{layer}.post_attention_layernorm"), f"{layer}.mlp")
    return norm(x, "norm")


def eurobert(folder: Path, texts: list[str], prefix: str) -> Float64:
    """Embed with transformers' EuroBERT, a bidirectional Llama by another name."""
    from transformers import EuroBertConfig, EuroBertModel

    # Its default pad and mask ids lie outside a small table; neither is used here.
    config = EuroBertConfig(**_stock_config(folder) | {"pad_token_id": None, "mask_token_id": 0})
    model = _load(EuroBertModel(config), folder)

    def last_hidden(ids: torch.Tensor) -> torch.Tensor:
        states: torch.Tensor = model(input_ids=ids).last_hidden_state
        return states

    return _embed_torch(folder, texts, prefix, last_hidden)


def llama_4d_mask(
    folder: Path, texts: list[str], prefix: str, *, attention: Literal["eager", "sdpa"] = "eager"
) -> Float64:
    """Embed with transformers' causal Llama under an additive mask of zeros: all see all."""
    import torch
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(**_stock_config(folder) | {"attn_implementation": attention})
    model = _load(LlamaModel(config), folder)

    def last_hidden(ids: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(1, 1, ids.shape[1], ids.shape[1])
        output = model(input_ids=ids, attention_mask=mask, use_cache=False)
        states: torch.Tensor = output.last_hidden_state
        return states

    return _embed_torch(folder, texts, prefix, last_hidden)


def sentence_transformers(
    folder: Path, texts: list[str], prefix: str, *, batch_size: int = 4
) -> Vectors:
    """Embed with sentence-transformers, which pads its batches and loads the weights itself."""
    import torch
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import (
        Normalize,
        Pooling,
        Transformer,
    )

    config = read_config(folder)
    for key in ("auto_map", "architectures"):  # auto_map would ask on stdin whether to run code
        config.pop(key, None)
    config |= {"model_type": "llama", "is_causal": False}
    with tempfile.TemporaryDirectory() as name, _quiet():
        copy = Path(name)
        for path in folder.iterdir():
            if path.name != "config.json":
                (copy / path.name).symlink_to(path.resolve())
        (copy / "config.json").write_text(json.dumps(config))
        transformer = Transformer(
            name,
            model_kwargs={"dtype": torch.float32},
            processor_kwargs={"model_max_length": 1 << 20},  # nothing may be cut in silence
        )
        modules = [transformer, Pooling(config["hidden_size"], "mean"), Normalize()]
        model = SentenceTransformer(modules=modules, device="cpu")
        vectors: Vectors = model.encode(
            [prefix + text for text in texts], batch_size=batch_size, show_progress_bar=False
        )
    return vectors.reshape(len(texts), config["hidden_size"])


Oracle = Callable[[Path, list[str], str], Vectors]
ORACLES: dict[str, Oracle] = {
    oracle.__name__: oracle
    for oracle in (numpy_float64, eurobert, llama_4d_mask, sentence_transformers)
}


def _embed(
    folder: Path, texts: list[str], prefix: str, last_hidden: Callable[[list[int]], Vectors]
) -> Float64:
    """Take each text through tokenizer.json, the model, the mean and the norm."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vectors = np.empty((len(texts), read_config(folder)["hidden_size"]))
    for row, text in zip(vectors, texts, strict=True):
        states = last_hidden(tokenizer.encode(prefix + text).ids)  # (t, hidden)
        mean = states.mean(axis=0, dtype=np.float64)
        row[:] = mean / np.linalg.norm(mean)
    return vectors


def _embed_torch(
    folder: Path,
    texts: list[str],
    prefix: str,
    last_hidden: Callable[[torch.Tensor], torch.Tensor],
) -> Float64:
    """Do as `_embed` for a model that maps ids (1, t) to states (1, t, hidden)."""
    import torch

    def states(ids: list[int]) -> Vectors:
        found: Vectors = last_hidden(torch.tensor([ids]))[0].numpy()
        return found

    with torch.inference_mode():
        return _embed(folder, texts, prefix, states)


def _load(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Fill `model` with the folder's weights: every tensor, and no other, must be there."""
    import torch

    model.load_state_dict({name: torch.tensor(x) for name, x in _weights(folder).items()})
    return model.eval()


def _stock_config(folder: Path) -> dict[str, Any]:
    """Return what config.json says of the dimensions, without what names a class or a dtype."""
    named = ("architectures", "auto_map", "dtype", "model_type", "torch_dtype")
    return {key: value for key, value in read_config(folder).items() if key not in named}


def read_config(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config


def _rope_frequencies(config: Mapping[str, Any], head_dim: int) -> Float64:
    """Return the angle per position of each pair, (head_dim / 2,), from either spelling of RoPE."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta") or config["rope_theta"]
    frequencies: Float64 = theta ** (-np.arange(0, head_dim, 2) / head_dim)
    if rope.get("rope_type", "default") == "default":
        return frequencies
    assert rope["rope_type"] == "llama3", rope
    # Llama 3 keeps a pair that turns more than `high` times in the original context, divides one
    # that turns less than `low` times by `factor`, and goes linearly from one to the other.
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * np.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    keep: Float64 = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / float(rope["factor"]))


def _weights(folder: Path) -> dict[str, NDArray[np.float32]]:
    """Read all that a bare Llama needs, under its names without prefix."""
    return {
        name.removeprefix("model."): values
        for name, values in read_tensors(folder)
        if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")
    }


def read_tensors(folder: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Read every tensor of a folder, one file or shards, under the name it has there."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        shards = ["model.safetensors"]
    for shard in shards:
        yield from _read_safetensors(folder / shard)


def _read_safetensors(path: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Read a file by its format: header length, JSON header, data. numpy itself has no bfloat16."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=8 + length)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        raw = data[start:end]
        match entry["dtype"]:
            case "F32":
                values = raw.view("<f4")
            case "F16":
                values = raw.view("<f2").astype(np.float32)
            case "BF16":  # the upper half of a float32
                values = (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
            case other:
                raise ValueError(f"{path.name}: {name} has dtype {other}")
        yield name, values.reshape(entry["shape"])


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and its report of unused tensors off stderr."""
    import transformers

    logging: Any = transformers.utils.logging  # untyped

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
