"""Independent multimodal embedders that the engine is compared with.

`f(folder, items, role) -> vectors`: unit rows (n, hidden), row i for item i, computed in float32
or better whatever the checkpoint's dtype, one item at a time and without padding. An item is a
text or None, and the pixels of its tiles (n, size, size, 3) or None: cutting and resizing are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.support.oracles import Float64, Vectors, llama_float64, read_config, read_tensors

if TYPE_CHECKING:
    import torch

Pixels = NDArray[np.uint8]
Item = tuple[str | None, Pixels | None]
Role = Literal["query", "document"]
Weights = dict[str, NDArray[np.float32]]

# What an engine could get wrong in silence, for tests that show that the fixtures would see it.
Mistake = Literal[
    "causal mask",
    "v1 pixel shuffle",
    "channel-major space-to-depth",
    "column-major space-to-depth",
    "no position embedding",
    "column-major patches",
    "channels last in a patch",
    "BGR",
    "ImageNet mean and deviation",
    "no post_layernorm",
    "hidden layer -2",
    "pooled by the head",
    "erf GELU in the tower",
    "tanh GELU in the connector",
    "rows not pasted",
    "mean over the text",
    "mean over the image",
]


def numpy_float64(
    folder: Path, items: Sequence[Item], role: Role, *, mistake: Mistake | None = None
) -> Float64:
    """Embed with the model written out in numpy; `mistake` makes one, to see what it changes."""
    return _embed(folder, items, role, mean_float64(folder, mistake))


def mean_float64(
    folder: Path, mistake: Mistake | None = None
) -> Callable[[list[int], Pixels | None], Float64]:
    """Return a function from ids and tiles to the mean of the last hidden states, in numpy."""
    config, parts = read_config(folder), _parts(folder)
    embeddings = parts["language_model"]["embed_tokens.weight"]
    context = config["img_context_token_id"]

    def mean_state(ids: list[int], pixels: Pixels | None) -> Float64:
        x = embeddings[ids].astype(np.float64)  # (t, hidden)
        pasted = np.array(ids) == context  # (t,)
        if pixels is not None and mistake != "rows not pasted":
            rows = np.concatenate([_tile_rows(config, parts, tile, mistake) for tile in pixels])
            x[pasted] = rows  # raises unless there are as many rows as context tokens
        causal = mistake == "causal mask"
        x = llama_float64(config["llm_config"], parts["language_model"], x, causal=causal)
        if pixels is not None and mistake == "mean over the text":
            x = x[~pasted]
        if pixels is not None and mistake == "mean over the image":
            x = x[pasted]
        mean: Float64 = x.mean(axis=0)
        return mean

    return mean_state


def internvl(folder: Path, items: Sequence[Item], role: Role) -> Float64:
    """Embed with transformers' InternVL, put together from SigLIP and a Llama that is not causal.

    transformers ignores `is_causal` before 5.2 and says nothing, so there this is wrong.
    """
    import torch
    from transformers import InternVLConfig, InternVLModel, LlamaConfig, SiglipVisionConfig

    config = read_config(folder)
    stock = InternVLConfig(
        vision_config=SiglipVisionConfig(**_stock(config["vision_config"]), vision_use_head=False),
        text_config=LlamaConfig(**_stock(config["llm_config"]) | {"is_causal": False}),
        image_token_id=config["img_context_token_id"],
        downsample_ratio=config["downsample_ratio"],
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = InternVLModel(stock)
    model.train(False)
    _fill(model, folder)

    def mean_state(ids: list[int], pixels: Pixels | None) -> Vectors:
        inputs = {"input_ids": torch.tensor([ids])}
        if pixels is not None:
            channels_first = torch.tensor(pixels).permute(0, 3, 1, 2)  # (n, 3, size, size)
            inputs["pixel_values"] = (channels_first.float() / 255 - 0.5) / 0.5
        with torch.inference_mode():
            states: torch.Tensor = model(**inputs, use_cache=False).last_hidden_state
        mean: Vectors = states[0].double().mean(dim=0).numpy()
        return mean

    return _embed(folder, items, role, mean_state)


def prompt(config: Mapping[str, Any], item: Item, role: Role) -> str:
    """Return the string that the tokenizer gets; BOS is the tokenizer's to add."""
    text, pixels = item
    if pixels is None:
        assert text is not None, "an item has a text, tiles or both"
        return {"query": "query: ", "document": "passage: "}[role] + text
    assert role == "document", "the reference embeds an image as a passage only"
    patches = (config["vision_config"]["image_size"] // config["vision_config"]["patch_size"]) ** 2
    context = "<IMG_CONTEXT>" * (len(pixels) * patches // 4)
    return f"passage: <img>{context}</img> " + (text or "")


def pixel_shuffle(x: Float64, scale: float = 0.5, version: str = "v2") -> Float64:
    """Do as the reference's function of that name on (n, w, h, c), step for step."""
    n, w, h, c = x.shape
    x = x.reshape(n, w, int(h * scale), int(c / scale))
    x = x.transpose(0, 2, 1, 3)
    x = x.reshape(n, int(h * scale), int(w * scale), int(c / (scale * scale)))
    if version == "v2":
        x = x.transpose(0, 2, 1, 3)
    return x


def _tile_rows(
    config: Mapping[str, Any], parts: Mapping[str, Weights], tile: Pixels, mistake: Mistake | None
) -> Float64:
    """Take one tile (size, size, 3) to the rows that stand for it (patches / 4, hidden)."""
    features = _siglip(config["vision_config"], parts["vision_model"], tile, mistake)
    side = math.isqrt(len(features))
    grid = features.reshape(side, side, -1)  # row, column, channel
    match mistake:
        case "channel-major space-to-depth":  # torch's PixelUnshuffle
            blocks = grid.reshape(side // 2, 2, side // 2, 2, -1).transpose(0, 2, 4, 1, 3)
        case "column-major space-to-depth":
            blocks = grid.reshape(side // 2, 2, side // 2, 2, -1).transpose(0, 2, 3, 1, 4)
        case _:
            version = "v1" if mistake == "v1 pixel shuffle" else config["ps_version"]
            blocks = pixel_shuffle(grid[None], config["downsample_ratio"], version)
    x = blocks.reshape(side * side // 4, -1)  # (patches / 4, 4 * vision hidden)
    weights = parts["mlp1"]
    x = _linear(weights, _layer_norm(weights, x, "0", 1e-5), "1")
    x = _gelu_tanh(x) if mistake == "tanh GELU in the connector" else _gelu_erf(x)
    return _linear(weights, x, "3")


def _siglip(
    config: Mapping[str, Any], weights: Weights, tile: Pixels, mistake: Mistake | None
) -> Float64:
    """Take one tile's pixels to the tower's features (patches, vision hidden)."""
    heads, eps, patch = (
        config[key] for key in ("num_attention_heads", "layer_norm_eps", "patch_size")
    )
    gelu = _gelu_erf if mistake == "erf GELU in the tower" else _gelu_tanh

    def norm(x: Float64, name: str) -> Float64:
        return _layer_norm(weights, x, name, eps)

    def mix(q: Float64, k: Float64, v: Float64) -> Float64:
        q, k, v = (x.reshape(len(x), heads, -1).swapaxes(0, 1) for x in (q, k, v))
        scores = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])  # (heads, queries, keys)
        scores = np.exp(scores - scores.max(-1, keepdims=True))
        mixed: Float64 = scores / scores.sum(-1, keepdims=True) @ v  # (heads, queries, head_dim)
        return mixed.swapaxes(0, 1).reshape(q.shape[1], -1)

    def attention(x: Float64, name: str) -> Float64:
        q, k, v = (_linear(weights, x, f"{name}.{kind}_proj") for kind in "qkv")
        return _linear(weights, mix(q, k, v), f"{name}.out_proj")

    def mlp(x: Float64, name: str) -> Float64:
        return _linear(weights, gelu(_linear(weights, x, f"{name}.fc1")), f"{name}.fc2")

    def head(x: Float64) -> Float64:
        rows = weights["head.attention.in_proj_weight"].astype(np.float64)
        query, key, value = np.split(rows, 3)  # (hidden, hidden) each
        a, b, c = np.split(weights["head.attention.in_proj_bias"].astype(np.float64), 3)
        probe = weights["head.probe"][0].astype(np.float64)  # (1, hidden)
        x = mix(probe @ query.T + a, x @ key.T + b, x @ value.T + c)
        x = _linear(weights, x, "head.attention.out_proj")
        return x + mlp(norm(x, "head.layernorm"), "head.mlp")

    pixels = tile.astype(np.float64) / 255  # (size, size, 3)
    if mistake == "BGR":
        pixels = pixels[..., ::-1]
    if mistake == "ImageNet mean and deviation":
        pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    else:
        pixels = (pixels - 0.5) / 0.5
    side = len(pixels) // patch
    cells = pixels.reshape(side, patch, side, patch, 3)  # row, y, column, x, channel
    order = (0, 2, 1, 3, 4) if mistake == "channels last in a patch" else (0, 2, 4, 1, 3)
    if mistake == "column-major patches":
        order = (2, 0, 4, 1, 3)
    patches = cells.transpose(order).reshape(side * side, -1)  # (patches, 3 * patch * patch)
    kernel = weights["embeddings.patch_embedding.weight"].astype(np.float64)
    x = patches @ kernel.reshape(len(kernel), -1).T + weights["embeddings.patch_embedding.bias"]
    if mistake != "no position embedding":
        x = x + weights["embeddings.position_embedding.weight"]  # (patches, hidden)
    layers = config["num_hidden_layers"] - (mistake == "hidden layer -2")
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        x = x + attention(norm(x, f"{layer}.layer_norm1"), f"{layer}.self_attn")
        x = x + mlp(norm(x, f"{layer}.layer_norm2"), f"{layer}.mlp")
    if mistake not in ("hidden layer -2", "no post_layernorm"):
        x = norm(x, "post_layernorm")
    if mistake == "pooled by the head":
        x = np.repeat(head(x), len(x), axis=0)
    return x


def _linear(weights: Weights, x: Float64, name: str) -> Float64:
    """Return x W^T + b."""
    weight, bias = (weights[f"{name}.{kind}"].astype(np.float64) for kind in ("weight", "bias"))
    return x @ weight.T + bias


def _layer_norm(weights: Weights, x: Float64, name: str, eps: float) -> Float64:
    """Scale each row to mean 0 and deviation 1, then stretch and shift it."""
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return x * weights[f"{name}.weight"] + weights[f"{name}.bias"]


def _gelu_tanh(x: Float64) -> Float64:
    """Return the approximation that SigLIP was trained with."""
    tanh: Float64 = np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))
    return 0.5 * x * (1 + tanh)


def _gelu_erf(x: Float64) -> Float64:
    """Return the exact form."""
    erf: Float64 = np.vectorize(math.erf, otypes=[np.float64])(x / math.sqrt(2))
    return 0.5 * x * (1 + erf)


def _embed(
    folder: Path,
    items: Sequence[Item],
    role: Role,
    mean_state: Callable[[list[int], Pixels | None], Vectors],
) -> Float64:
    """Take each item through its prompt, tokenizer.json, the model's mean state and the norm."""
    from tokenizers import Tokenizer

    config, tokenizer = read_config(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    vectors = np.empty((len(items), config["llm_config"]["hidden_size"]))
    for row, item in zip(vectors, items, strict=True):
        mean = mean_state(tokenizer.encode(prompt(config, item, role)).ids, item[1])
        row[:] = mean / np.linalg.norm(mean)
    return vectors


def _parts(folder: Path) -> dict[str, Weights]:
    """Read the three parts of the model, each under names that do not depend on the layout."""
    parts: dict[str, Weights] = {"vision_model": {}, "mlp1": {}, "language_model": {}}
    for name, values in read_tensors(folder):
        part, _, rest = name.removeprefix("model.").partition(".")
        if part in parts:  # not the head of a reranker
            parts[part][rest.removeprefix("vision_model.").removeprefix("model.")] = values
    return parts


def _fill(model: torch.nn.Module, folder: Path) -> None:
    """Copy the folder's tensors into InternVL one at a time; none of its own may be left over."""
    import torch

    names = {"mlp1.0": "layer_norm", "mlp1.1": "linear_1", "mlp1.3": "linear_2"}
    empty = model.state_dict()
    for name, values in read_tensors(folder):
        part, _, rest = name.partition(".")
        match part:
            case "mlp1":
                layer, _, kind = name.rpartition(".")
                found = f"multi_modal_projector.{names[layer]}.{kind}"
            case "language_model":
                found = f"language_model.{rest.removeprefix('model.')}"
            case _:
                found = f"vision_tower.{rest.removeprefix('vision_model.')}"
        unused = found.startswith(("vision_tower.head.", "language_model.lm_head."))
        if not unused and not found.endswith(".inv_freq"):
            empty.pop(found).copy_(torch.tensor(values))
    assert not empty, list(empty)


def _stock(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says of the dimensions, without what names a class or a dtype."""
    named = ("architectures", "auto_map", "dtype", "model_type", "torch_dtype")
    return {key: value for key, value in config.items() if key not in named}
