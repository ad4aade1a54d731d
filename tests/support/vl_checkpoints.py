"""Checkpoint folders with the files and tensor names of NVIDIA's multimodal repo, random weights.

A fixture is a row of VL_SHAPES; `build_vl_checkpoint` writes it. Equal seeds give equal values for
tensors of equal name and size, so two layouts of one model must embed alike. `page` and `tiles`
draw something for it to see.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from tests.support.checkpoints import (
    GAIN,
    LLAMA3_ROPE,
    SHAPES,
    Shape,
    config_json,
    draw,
    file_sizes,
    save_tensors,
    stream_bfloat16,
    text_sizes,
    tokenizer,
    write_json,
    write_tokenizer,
)

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from tokenizers import Tokenizer

IMAGE_START, IMAGE_END, IMAGE_CONTEXT = "<img>", "</img>", "<IMG_CONTEXT>"

# Ten tokens follow Llama's vocabulary, the third of them the context token, as published. The
# other places and the other names were not seen, so nothing may rely on them.
ADDED_TOKENS = (
    *(IMAGE_START, "<quad>", IMAGE_CONTEXT, "</quad>", "<ref>"),
    *(IMAGE_END, "</ref>", "<box>", "</box>", "<|end_of_page|>"),
)

# The two forms of GELU differ by 1e-4 of what they give for inputs around 0, and by 2e-3 for inputs
# of this mean and deviation: enough to see which one was taken. What they give is small there.
BEFORE_GELU = (-1.5, 0.7)
GAIN_AFTER_GELU = 20.0

PARAMETERS_1B = 1_678_252_480  # published, and in agreement with TRUE_VL


@dataclass(frozen=True)
class VLShape:
    """All that varies between fixtures. The connector follows from the two hidden sizes."""

    text: Shape = field(default_factory=Shape)  # its dtype and shards are those given here
    vision_hidden_size: int = 48
    vision_intermediate_size: int = 100
    vision_layers: int = 3
    vision_heads: int = 4
    image_size: int = 32
    patch_size: int = 8  # (32 / 8)^2 / 4 = 4 context tokens a tile
    vision_eps: float = 1e-6
    # transformers 4 wrote vision_model.vision_model.*, transformers 5 writes vision_model.*
    vision_layout: Literal["nested", "flat"] = "nested"
    with_head: bool = True  # SigLIP's attention pooling, which no embedder uses
    shards: int = 1
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    added_tokens: tuple[str, ...] = ADDED_TOKENS
    max_input_tiles: int = 2
    dynamic_image_size: bool = True
    use_thumbnail: bool = True
    q_max_length: int = 512
    p_max_length: int = 4096
    # processor_config.json, whose entries win over those of config.json; None leaves it out.
    processor: Mapping[str, Any] | None = field(default=None, hash=False)
    # Entries that replace those of config.json and of its vision_config.
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)
    vision_config: Mapping[str, Any] = field(default_factory=dict, hash=False)

    @property
    def language(self) -> Shape:
        """The inner text model, with rows for the added tokens."""
        vocabulary = self.text.vocab_size or vl_tokenizer(self.added_tokens).get_vocab_size()
        return replace(self.text, vocab_size=vocabulary, dtype=self.dtype, shards=self.shards)

    @property
    def tokens_per_tile(self) -> int:
        """Context tokens that stand for one tile."""
        return (self.image_size // self.patch_size) ** 2 // 4

    @property
    def parameters(self) -> int:
        """Parameters of the published count: SigLIP's head is in it, an unused lm_head is not."""
        parts = (text_sizes(self.language), _vision_sizes(self), _connector_sizes(self))
        return sum(math.prod(size) for part in parts for size in part.values())


VL_SHAPES: dict[str, VLShape] = {
    "nested": VLShape(),
    "flat": VLShape(vision_layout="flat"),
    "no-head": VLShape(with_head=False),
    "flat-no-head": VLShape(vision_layout="flat", with_head=False, dtype="float32"),
    "16-a-tile": VLShape(image_size=64, vision_layers=2),
    "large-patches": VLShape(image_size=64, patch_size=16, vision_layout="flat"),
    "odd-heads": VLShape(vision_hidden_size=54, vision_heads=6),  # heads of 9
    "one-vision-layer": VLShape(vision_layers=1, vision_heads=3),
    "wide-vision": VLShape(vision_hidden_size=96, vision_heads=2, text=SHAPES["two-layers"]),
    "large-eps": VLShape(vision_eps=0.25, text=SHAPES["large-eps"]),
    "prefixed": VLShape(text=SHAPES["prefixed"]),
    "sharded": VLShape(shards=3),
    "training-export": VLShape(
        text=SHAPES["training-export"], vision_layout="flat", shards=2, dtype="float32"
    ),
    "rope-parameters": VLShape(text=SHAPES["rope-parameters"], vision_layout="flat"),
    "plain-rope": VLShape(text=SHAPES["plain-rope"]),
    "wide-text-heads": VLShape(text=SHAPES["wide-heads"]),
    "float16": VLShape(dtype="float16"),
    "spare-rows": VLShape(text=SHAPES["spare-rows"]),
    "other-token-order": VLShape(added_tokens=ADDED_TOKENS[::-1]),
    "processor-config": VLShape(
        processor={
            "processor_class": "LlamaNemotronVLProcessor",
            "min_input_tiles": 1,
            "max_input_tiles": 4,
            "dynamic_image_size": True,
            "use_thumbnail": True,
        }
    ),
    "single-tile": VLShape(dynamic_image_size=False, use_thumbnail=False),
}

TRUE_VL = VLShape(
    text=Shape(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128_266,
        max_position_embeddings=131_072,
        rope={**LLAMA3_ROPE, "original_max_position_embeddings": 8192},
    ),
    vision_hidden_size=1152,
    vision_intermediate_size=4304,
    vision_layers=27,
    vision_heads=16,
    image_size=512,
    patch_size=16,
)


def build_vl_checkpoint(
    folder: Path, shape: VLShape = VL_SHAPES["nested"], seed: int = 0, **overrides: Any
) -> Path:
    """Write `shape`, with the fields named in `overrides` replaced, into `folder`; return it."""
    import torch

    shape = replace(shape, **overrides)
    _write_texts(folder, shape)
    tensors = {
        name: torch.cat(list(_draw(shape, name, size, seed))).reshape(size)
        for name, size in vl_file_sizes(shape).items()
    }
    save_tensors(folder, tensors, shape.shards)
    return folder


def true_shape_vl(folder: Path, seed: int = 0) -> Path:
    """Write a 3.36 GB checkpoint of the 1b model's true shape, holding little in memory.

    The tokenizer is the tiny one: its ids are the first of the 128,266 rows.
    """
    sizes = vl_file_sizes(TRUE_VL)
    assert sum(map(math.prod, sizes.values())) == TRUE_VL.parameters == PARAMETERS_1B
    _write_texts(folder, TRUE_VL)
    stream_bfloat16(folder, sizes, lambda name: _draw(TRUE_VL, name, sizes[name], seed))
    return folder


@cache
def vl_tokenizer(added_tokens: tuple[str, ...] = ADDED_TOKENS) -> Tokenizer:
    """Return the text fixture's tokenizer with `added_tokens` as specials after its last entry."""
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer().to_str())
    made.add_special_tokens(list(added_tokens))
    assert made.get_vocab_size() == tokenizer().get_vocab_size() + len(added_tokens)
    return made


def vl_file_sizes(shape: VLShape) -> dict[str, tuple[int, ...]]:
    """Name and size of each tensor as the file has them, with those that must be ignored."""
    vision = "vision_model." * (2 if shape.vision_layout == "nested" else 1)
    parts = {
        vision: _vision_sizes(shape),
        "mlp1.": _connector_sizes(shape),
        "language_model.": file_sizes(shape.language),
    }
    return {prefix + name: size for prefix, part in parts.items() for name, size in part.items()}


def page(seed: int, width: int, height: int) -> Image.Image:
    """Draw a page: a tilted gradient, framed boxes and discs, and lines of blocks like words."""
    from PIL import Image, ImageDraw

    random = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / max(width, height)
    slopes = random.uniform(-90, 90, (2, 3))
    ground = random.uniform(90, 240, 3) + x[..., None] * slopes[0] + y[..., None] * slopes[1]
    made = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    pen = ImageDraw.Draw(made)
    for kind in (pen.rectangle, pen.ellipse) * 3:
        left, top = random.uniform(0, 0.8, 2) * (width, height)
        wide, high = random.uniform(0.1, 0.5, 2) * (width, height)
        fill, edge = (tuple(map(int, color)) for color in random.integers(0, 256, (2, 3)))
        kind((left, top, left + wide, top + high), fill=fill, outline=edge, width=2)
    line = max(4, height // 24)
    for top in range(line, height - line, 2 * line):
        left = line
        for word in random.integers(1, 6, width // line):
            right = min(left + int(word) * line // 2, width - line)
            if left >= right:
                break
            pen.rectangle((left, top, right, top + line // 2), fill=(20, 20, 30))
            left = right + line // 2
    return made


def tiles(seed: int, count: int, size: int) -> NDArray[np.uint8]:
    """Return `count` square pages, different ones, as pixels (count, size, size, 3)."""
    return np.stack([np.asarray(page(1000 * seed + i, size, size)) for i in range(count)])


def _vision_sizes(shape: VLShape) -> dict[str, tuple[int, ...]]:
    """Name and size of each tensor of the tower, in file order, without prefix."""
    hidden, mlp, patch = shape.vision_hidden_size, shape.vision_intermediate_size, shape.patch_size
    sizes: dict[str, tuple[int, ...]] = {
        "embeddings.patch_embedding.weight": (hidden, 3, patch, patch),
        "embeddings.patch_embedding.bias": (hidden,),
        "embeddings.position_embedding.weight": ((shape.image_size // patch) ** 2, hidden),
    }
    feed_forward = {**_affine("mlp.fc1", mlp, hidden), **_affine("mlp.fc2", hidden, mlp)}
    layer = {
        **_affine("layer_norm1", hidden),
        **_affine("self_attn.k_proj", hidden, hidden),
        **_affine("self_attn.v_proj", hidden, hidden),
        **_affine("self_attn.q_proj", hidden, hidden),
        **_affine("self_attn.out_proj", hidden, hidden),
        **_affine("layer_norm2", hidden),
        **feed_forward,
    }
    for i in range(shape.vision_layers):
        sizes |= {f"encoder.layers.{i}.{name}": size for name, size in layer.items()}
    sizes |= _affine("post_layernorm", hidden)
    if shape.with_head:
        sizes |= {
            "head.probe": (1, 1, hidden),
            "head.attention.in_proj_weight": (3 * hidden, hidden),
            "head.attention.in_proj_bias": (3 * hidden,),
            **_affine("head.attention.out_proj", hidden, hidden),
            **_affine("head.layernorm", hidden),
            **{f"head.{name}": size for name, size in feed_forward.items()},
        }
    return sizes


def _connector_sizes(shape: VLShape) -> dict[str, tuple[int, ...]]:
    """Name and size of each tensor between the tower and Llama, in file order, without prefix."""
    wide, hidden = 4 * shape.vision_hidden_size, shape.text.hidden_size
    return {**_affine("0", wide), **_affine("1", hidden, wide), **_affine("3", hidden, hidden)}


def _affine(name: str, *size: int) -> dict[str, tuple[int, ...]]:
    """Name and size of a layer's weight and bias."""
    return {f"{name}.weight": size, f"{name}.bias": size[:1]}


def _draw(shape: VLShape, name: str, size: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    """Yield the values of a tensor in flat chunks, drawn from a generator of its own."""
    import torch

    part, _, rest = name.partition(".")
    if part == "language_model":
        yield from draw(shape.language, rest, size, seed)
        return
    name = name.replace("vision_model.vision_model.", "vision_model.")
    layer, _, kind = name.rpartition(".")
    mean, gain = 0.0, GAIN
    if layer.endswith(("mlp.fc1", "mlp1.1")):
        mean, gain = BEFORE_GELU
    elif layer.endswith(("mlp.fc2", "mlp1.3")):
        gain = GAIN_AFTER_GELU
    elif kind == "weight":  # of a norm: no other has one dimension
        mean = 1.0
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed} {name}".encode()))
    count, step = math.prod(size), 1 << 24
    for start in range(0, count, step):
        chunk = torch.randn(min(step, count - start), generator=generator)
        if len(size) == 1:
            chunk = chunk.mul_(0.3).add_(mean)
        elif not layer.endswith(("head", "position_embedding")):  # those are not linear
            chunk = chunk.mul_(gain / math.sqrt(math.prod(size[1:])))
        yield chunk.to(getattr(torch, shape.dtype))


def _write_texts(folder: Path, shape: VLShape) -> None:
    """Write everything but the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", _config(shape))
    if shape.processor is not None:
        write_json(folder / "processor_config.json", dict(shape.processor))
    limit = shape.text.max_position_embeddings
    write_tokenizer(folder, vl_tokenizer(shape.added_tokens), limit, padding_side="left")


def _config(shape: VLShape) -> dict[str, Any]:
    """Return config.json, with the fields of the public repo."""
    inner = config_json(shape.language)
    dtype = "torch_dtype" if "torch_dtype" in inner else "dtype"
    vision = {
        dtype: shape.dtype,
        "attention_dropout": 0.0,
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": shape.vision_hidden_size,
        "image_size": shape.image_size,
        "intermediate_size": shape.vision_intermediate_size,
        "layer_norm_eps": shape.vision_eps,
        "model_type": "siglip_vision_model",
        "num_attention_heads": shape.vision_heads,
        "num_channels": 3,
        "num_hidden_layers": shape.vision_layers,
        "patch_size": shape.patch_size,
    }
    code = "llama_nemotron_vl.LlamaNemotronVL"  # in files that are not there: never run them
    config: dict[str, Any] = {
        dtype: shape.dtype,
        "architectures": ["LlamaNemotronVLModel"],
        "auto_map": {
            "AutoConfig": f"configuration_{code}Config",
            "AutoModel": f"modeling_{code}Model",
        },
        "downsample_ratio": 0.5,
        "dynamic_image_size": shape.dynamic_image_size,
        "force_image_size": shape.image_size,
        "img_context_token_id": vl_tokenizer(shape.added_tokens).token_to_id(IMAGE_CONTEXT),
        "llm_config": inner,
        "max_input_tiles": shape.max_input_tiles,
        "model_type": "llama_nemotron_vl",
        "p_max_length": shape.p_max_length,
        "passage_prefix": "passage:",
        "pooling": "avg",
        "ps_version": "v2",
        "q_max_length": shape.q_max_length,
        "query_prefix": "query:",
        "select_layer": -1,
        "template": "bidirectional-llama-retriever",
        "transformers_version": inner["transformers_version"],
        "use_thumbnail": shape.use_thumbnail,
        "vision_config": dict(sorted({**vision, **shape.vision_config}.items())),
    }
    return dict(sorted({**config, **shape.config}.items()))
