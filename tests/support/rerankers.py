"""Reranker folders with the tensor names of NVIDIA's, and the score of a pair in numpy.

They are the text and multimodal fixtures with a head, `score.weight`, and keys under `model.`. The
temperature is not 1, so that a forgotten division shows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shared_engine import images
from tests.support.checkpoints import SHAPES, Shape, build_checkpoint, write_json
from tests.support.oracles import Float64, last_hidden_float64, read_config, read_tensors
from tests.support.vl_checkpoints import VL_SHAPES, VLShape, build_vl_checkpoint
from tests.support.vl_oracles import Item, mean_float64

TEMPERATURE = 0.5
TEXT = "LlamaBidirectionalForSequenceClassification"
MULTIMODAL = "LlamaNemotronVLForSequenceClassification"


def build_reranker(
    folder: Path, shape: Shape = SHAPES["gqa"], seed: int = 0, **config: Any
) -> Path:
    """Write a text reranker; `config` replaces entries of config.json."""
    build_checkpoint(folder, shape, seed)
    return add_head(folder, {"architectures": [TEXT], **config}, seed)


def build_vl_reranker(
    folder: Path, shape: VLShape = VL_SHAPES["nested"], seed: int = 0, **config: Any
) -> Path:
    """Write a multimodal reranker; `config` replaces entries of config.json."""
    build_vl_checkpoint(folder, shape, seed)
    kind = {"model_type": "llama_nemotron_vl_rerank", "prompt_template": "v1"}
    return add_head(folder, {"architectures": [MULTIMODAL], **kind, **config}, seed)


def add_head(folder: Path, config: Mapping[str, Any], seed: int = 0) -> Path:
    """Make a reranker of an embedding model's folder; `config` replaces entries of config.json."""
    import torch
    from safetensors.torch import load_file, save_file

    path = folder / "config.json"
    old = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**old, "temperature": TEMPERATURE, "id2label": {"0": "LABEL_0"}, **config})
    hidden = old.get("llm_config", old)["hidden_size"]
    file = folder / "model.safetensors"
    tensors = {f"model.{name.removeprefix('model.')}": t for name, t in load_file(file).items()}
    random = torch.Generator().manual_seed(seed)
    head = torch.randn(1, hidden, generator=random) / math.sqrt(hidden)
    dtype = next(iter(tensors.values())).dtype
    save_file({**tensors, "score.weight": head.to(dtype)}, file, metadata={"format": "pt"})
    return folder


def prompt(query: str, item: Item, tokens_per_tile: int = 0) -> str:
    """Return the string that the tokenizer gets; BOS is the tokenizer's to add."""
    text, tiles = item
    pair = f"question:{query} \n \n passage:{text or ''}"
    if tiles is None:
        return pair
    return f"<img>{'<IMG_CONTEXT>' * (tokens_per_tile * len(tiles))}</img> {pair}"


def score_float64(folder: Path, query: str, items: Sequence[Item | str]) -> Float64:
    """Return the logit of each item, (n,), with the model written out in numpy."""
    from tokenizers import Tokenizer

    config, tokenizer = read_config(folder), Tokenizer.from_file(str(folder / "tokenizer.json"))
    head = dict(read_tensors(folder))["score.weight"].astype(np.float64)[0]
    tokens_per_tile = 0
    if "vision_config" in config:
        vision = config["vision_config"]
        tokens_per_tile = (vision["image_size"] // vision["patch_size"]) ** 2 // 4
        mean = mean_float64(folder)
    else:
        last_hidden = last_hidden_float64(folder)

        def mean(ids: list[int], _: Any) -> Float64:
            states: Float64 = last_hidden(ids).mean(axis=0)
            return states

    def score(item: Item) -> float:
        ids = tokenizer.encode(prompt(query, item, tokens_per_tile)).ids
        return float(mean(ids, item[1]) @ head / config["temperature"])

    pairs: list[Item] = [(item, None) if isinstance(item, str) else item for item in items]
    return np.array([score(item) for item in pairs])


def score_pages(folder: Path, query: str, *items: tuple[str | None, bytes | None]) -> Float64:
    """Return the logit of each pair of a text and the bytes of an image, either may be None."""
    return score_float64(
        folder,
        query,
        [(text, png if png is None else images.cut_tiles(png, 2, 32)) for text, png in items],
    )
