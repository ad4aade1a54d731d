"""Checkpoints of NVIDIA's Model Optimizer in FP8: the numbers they hold, and what is refused.

The expected weights are decoded from the bits in float64, without torch's FP8 type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared_engine import CheckpointError, Embedder, EmbeddingInput, Options
from shared_engine.cli.main import main
from tests.support.checkpoints import PROMPTS, SHAPES, build_checkpoint, write_json
from tests.support.oracles import numpy_float64
from tests.support.vl_checkpoints import VL_SHAPES, build_vl_checkpoint, page

TEXTS = ["", "A text.", "The quick brown fox jumps over the lazy dog. " * 4]
IGNORED = ("embed_tokens", "norm", "vision", "mlp1", "lm_head")
MIXED = "MIXED_PRECISION"


def decode(bits: np.ndarray) -> np.ndarray:
    """Return the values of float8_e4m3fn: a sign, 4 bits of exponent (bias 7), 3 of fraction."""
    sign, exponent, fraction = bits >> 7, (bits >> 3 & 15).astype(int), bits & 7
    normal = (1 + fraction / 8) * 2.0 ** (exponent - 7)
    return np.where(sign, -1.0, 1.0) * np.where(exponent == 0, fraction / 8 * 2.0**-6, normal)


def quantize(folder: Path) -> Path:
    """Quantize a checkpoint as Model Optimizer exports it; return a plain one of equal numbers."""
    tensors = load_file(folder / "model.safetensors")
    plain, quantized = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if weight.ndim == 2 and not any(part in name for part in IGNORED):
            scale = weight.abs().max().float() / 448
            stored = (weight.float() / scale).to(torch.float8_e4m3fn)
            exact = decode(stored.view(torch.uint8).numpy()) * np.float64(scale.item())
            plain[name] = torch.from_numpy(exact.astype(np.float32))
            quantized[name], quantized[f"{name}_scale"] = stored, scale
            module = name.removesuffix(".weight")
            quantized[f"{module}.input_scale"] = torch.tensor(0.5)
            if module.endswith(("k_proj", "v_proj")):
                quantized[f"{module}.{module[-6]}_scale"] = torch.tensor(0.25)
    assert len(quantized) > len(tensors)
    other = folder.parent / "plain"
    other.mkdir()
    for path in folder.glob("*.json"):
        (other / path.name).write_bytes(path.read_bytes())
    save_file(plain, other / "model.safetensors", metadata={"format": "pt"})
    save_file(quantized, folder / "model.safetensors", metadata={"format": "pt"})
    ignore = ["lm_head", "vision_model*", "mlp1*"]
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": scheme, "weights": scheme, "targets": ["Linear"]}
    producer = {"name": "modelopt", "version": "0.39.0"}
    edit(
        folder,
        quantization_config={
            "config_groups": {"group_0": group},
            "ignore": ignore,
            "quant_algo": "FP8",
            "kv_cache_scheme": scheme,
            "producer": producer,
            "quant_method": "modelopt",
        },
    )
    algorithms = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ignore}
    write_json(folder / "hf_quant_config.json", {"producer": producer, "quantization": algorithms})
    return other


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    write_json(path, {name: value for name, value in config.items() if value is not None})


def embed(folder: Path, inputs: Any = TEXTS) -> np.ndarray:
    options = Options(model=str(folder), device="cpu", dtype="float32")
    with Embedder(options) as embedder:
        return embedder.embed(inputs, "document")


def test_vectors_are_those_of_the_dequantized_weights(tmp_path, capsys):
    folder = build_checkpoint(tmp_path / "fp8", SHAPES["prefixed"])
    before = embed(folder)
    plain = quantize(folder)
    vectors = embed(folder)
    np.testing.assert_array_equal(vectors, embed(plain))
    np.testing.assert_allclose(vectors, numpy_float64(plain, TEXTS, PROMPTS["document"]), atol=1e-5)
    assert np.abs(vectors - before).max() > 1e-3  # FP8 is not exact, so equality says something
    assert main(["check", "--model", str(folder), "--reference", "--dtype", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "weights dequantized from FP8" in printed
    assert re.search(r"and transformers: interchangeable: smallest cosine (1\.|0\.999999)", printed)


def test_the_vision_tower_of_a_multimodal_model_stays_as_it_is(tmp_path):
    folder = build_vl_checkpoint(tmp_path / "fp8", VL_SHAPES["flat"])
    plain = quantize(folder)
    inputs = [EmbeddingInput(image=page(0, 90, 70)), EmbeddingInput("A text.")]
    np.testing.assert_array_equal(embed(folder, inputs), embed(plain, inputs))


def test_the_file_of_the_optimizer_alone_is_enough(tmp_path):
    folder = build_checkpoint(tmp_path / "fp8", SHAPES["gqa"])
    plain = quantize(folder)
    edit(folder, quantization_config=None)
    np.testing.assert_array_equal(embed(folder), embed(plain))
    (folder / "hf_quant_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"float8_e4m3fn; expected .* quant_algo FP8"):
        embed(folder)


def without_scale(folder: Path) -> None:
    change_weights(folder, lambda tensors: tensors.pop("layers.0.mlp.up_proj.weight_scale"))


def per_channel(folder: Path) -> None:
    name = "layers.0.mlp.up_proj.weight"
    change_weights(
        folder,
        lambda tensors: tensors.update({f"{name}_scale": torch.ones(len(tensors[name]), 1)}),
    )


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def edit_to(**quantization: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder, quantization_config=quantization)


def mixed(folder: Path) -> None:
    edit(folder, quantization_config=None)
    write_json(folder / "hf_quant_config.json", {"quantization": {"quant_algo": MIXED}})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_scale, r"no tensor 'layers\.0\.mlp\.up_proj\.weight_scale'"),
        (per_channel, r"up_proj\.weight_scale' has shape \(160, 1\); expected \(\)"),
        (edit_to(quant_method="modelopt", quant_algo="NVFP4"), "quant_algo is 'NVFP4'.*'FP8'"),
        (edit_to(quant_method="fp8", weight_block_size=[128, 128]), "quant_method is 'fp8'"),
        (edit_to(quant_method="compressed-tensors"), "quant_method is 'compressed-tensors'"),
        (mixed, rf"hf_quant_config\.json: quantization\.quant_algo is '{MIXED}'; expected 'FP8'"),
    ],
)
def test_another_quantization_is_refused_by_name(change, message, tmp_path):
    folder = build_checkpoint(tmp_path / "fp8", SHAPES["gqa"])
    quantize(folder)
    change(folder)
    with pytest.raises(CheckpointError, match=message):
        embed(folder)
