"""Nemotron-3-Embed: vectors against transformers' own `Ministral3Model`, and what it must be told.

The original length is 32, so that YaRN and the scale of queries act in short texts.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, pre_tokenizers
from transformers import Ministral3Config, Ministral3Model, TokenizersBackend

from shared_engine import CheckpointError, Embedder, Options
from shared_engine.catalogue import lookup
from shared_engine.cli.main import main
from shared_engine.local.tokenizer import _TEKKEN_SPLIT
from tests.support.checkpoints import (
    PROMPTS,
    YARN_ROPE,
    Shape,
    text_sizes,
    tokenizer,
    write_json,
    write_tokenizer,
)

TEXTS = ["", "A text.", "The quick brown fox jumps over the lazy dog. " * 4, "many words " * 120]


def build(
    folder: Path, rope: dict[str, Any] | None = None, layers: int = 3, **changes: Any
) -> Path:
    """Write a checkpoint as transformers saves it, with the fields that NVIDIA's has besides."""
    torch.manual_seed(0)
    config = Ministral3Config(
        vocab_size=tokenizer().get_vocab_size(),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,  # 3 x 32 is not the hidden size
        max_position_embeddings=2048,
        rope_parameters={**YARN_ROPE, **(rope or {})},
        bos_token_id=0,
        pad_token_id=None,
        is_causal=False,
    )
    model = Ministral3Model(config)
    for name, weight in model.named_parameters():
        if weight.ndim == 2 and "embed" not in name:
            torch.nn.init.normal_(weight, std=2 / math.sqrt(weight.shape[1]))
        elif weight.ndim == 1:
            torch.nn.init.normal_(weight, 1.0, 0.3)
        else:
            torch.nn.init.normal_(weight)
    model.save_pretrained(folder)
    write_tokenizer(folder, tokenizer(), 2048)
    path = folder / "config.json"
    saved = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {**saved, "pooling": "avg", **changes})
    return folder


def expected(folder: Path, texts: list[str], prefix: str, causal: bool = False) -> np.ndarray:
    """Embed with transformers' class in float64, one text at a time."""
    model = Ministral3Model.from_pretrained(folder, dtype=torch.float64, is_causal=causal)
    made = Tokenizer.from_file(str(folder / "tokenizer.json"))
    vectors = []
    for text in texts:
        ids = torch.tensor([made.encode(prefix + text).ids])
        with torch.inference_mode():
            mean = model(ids, use_cache=False).last_hidden_state[0].mean(0)
        vectors.append(torch.nn.functional.normalize(mean, dim=0).numpy())
    return np.stack(vectors)


def embed(folder: Path, texts: list[str] = TEXTS, role: Any = "document", **options: Any) -> Any:
    options = {"device": "cpu", "dtype": "float32", **options}
    with Embedder(Options(model=str(folder), **options)) as embedder:
        return embedder.embed(texts, role)


@pytest.mark.parametrize(
    "rope",
    [
        {},
        {"mscale": 1.5, "mscale_all_dim": 0.5},
        {"beta_fast": 4.0, "beta_slow": 2.0, "factor": 4.0},
        {"original_max_position_embeddings": 100, "llama_4_scaling_beta": 0.7},
        {"rope_theta": 10_000.0},
    ],
    ids=["as published", "magnitude", "other range", "larger scale", "other base"],
)
def test_vectors_equal_those_of_transformers(rope, tmp_path):
    folder = build(tmp_path, rope)
    for role, prefix in PROMPTS.items():
        vectors = embed(folder, role=role)
        np.testing.assert_allclose(vectors, expected(folder, TEXTS, prefix), atol=1e-5)


def test_a_causal_mask_or_no_scale_of_queries_would_show(tmp_path):
    folder = build(tmp_path / "as published")
    right = expected(folder, TEXTS, PROMPTS["document"])
    causal = expected(folder, TEXTS, PROMPTS["document"], causal=True)
    assert np.abs(causal - right)[2:].max() > 0.05
    unscaled = embed(build(tmp_path / "unscaled", {"llama_4_scaling_beta": 0.0}))
    assert np.abs(unscaled - right)[:2].max() < 1e-5  # shorter than the original length
    assert np.abs(unscaled - right)[2:].max() > 1e-3


def test_a_vector_does_not_depend_on_other_texts(tmp_path):
    """Positions begin at 0 in each sequence: the scale of queries depends on them."""
    folder = build(tmp_path)
    texts = TEXTS * 5
    together = embed(folder, texts, max_batch_tokens=2048)
    alone = np.concatenate([embed(folder, [text]) for text in TEXTS])
    np.testing.assert_allclose(together, np.concatenate([alone] * 5), atol=1e-5)


def test_words_are_split_as_mistrals_where_the_tokenizers_config_says_so(tmp_path, capsys):
    texts = ["eBay's pH of NaOH is 12345 mL", "Ein Text.", "東京 2026"]
    made = Tokenizer.from_str(tokenizer().to_str())  # the other is shared by all tests
    wrong = embed(build(tmp_path / "wrong"), texts)
    flagged = build(tmp_path / "flagged")
    write_tokenizer(flagged, made, 2048, fix_mistral_regex=True)
    assert _TEKKEN_SPLIT in inspect.getsource(TokenizersBackend).replace('"\n', "")
    characters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(Regex(_TEKKEN_SPLIT), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, characters])
    right = build(tmp_path / "right")
    write_tokenizer(right, made, 2048)
    np.testing.assert_array_equal(embed(flagged, texts), embed(right, texts))
    assert np.abs(embed(flagged, texts) - wrong).max() > 0.01
    assert main(["check", "--model", str(flagged), "--reference", "--device", "cpu"]) == 0
    assert "interchangeable" in capsys.readouterr().out
    write_tokenizer(flagged, tokenizer(), 2048, fix_mistral_regex="yes")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: fix_mistral_regex"):
        embed(flagged, texts)


def remove(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda config: config.pop(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("is_causal"), "is_causal is missing"),
        (lambda config: config.update(is_causal=True), "is_causal is True; expected False"),
        (lambda config: config.update(sliding_window=1024), "sliding_window is 1024"),
        (remove("rope_parameters"), "rope"),
        (
            lambda config: config["rope_parameters"].update(rope_type="linear"),
            "rope_type is 'linear'; expected 'yarn'",
        ),
        (
            lambda config: config["rope_parameters"].update(attention_factor=1.2),
            "attention_factor is 1.2",
        ),
        (lambda config: config.update(pooling="last"), "pooling is 'last'; expected 'avg'"),
    ],
)
def test_a_config_that_is_computed_otherwise_is_refused(change, message, tmp_path):
    folder = build(tmp_path)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    change(config)
    write_json(path, config)
    with pytest.raises(CheckpointError, match=message):
        embed(folder)


@pytest.mark.parametrize(
    ("name", "parameters", "inner", "heads"),
    [
        ("nvidia/nemotron-3-embed-1b", 1_140_918_272, 6144, 24),
        ("nvidia/nemotron-3-embed-8b", 7_952_683_008, 14_336, 32),
    ],
)
def test_the_published_number_of_parameters_follows_from_the_row(name, parameters, inner, heads):
    spec = lookup(name)
    shape = Shape(
        hidden_size=spec.hidden_size,
        intermediate_size=inner,
        num_hidden_layers=spec.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=131_072,
    )
    assert sum(map(math.prod, text_sizes(shape).values())) == parameters


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize(("dtype", "least"), [("float32", 0.999999), ("bfloat16", 0.999)])
def test_a_gpu_gives_the_same_vectors(tmp_path, dtype, least):
    folder = build(tmp_path)
    with Embedder(Options(model=folder, device="cuda", dtype=dtype)) as embedder:
        assert (embedder.embed(TEXTS) * expected(folder, TEXTS, "passage: ")).sum(1).min() >= least


@pytest.mark.slow
def test_a_long_text_takes_a_bounded_memory(tmp_path, python):
    """32,768 tokens, the model's limit: attention is not written out."""
    rope = {"original_max_position_embeddings": 16_384}
    folder = build(tmp_path, rope, layers=1, max_position_embeddings=32_768)
    lines = [
        "import resource",
        "from shared_engine import Embedder, Options",
        f"options = Options(model={str(folder)!r}, device='cpu', dtype='float32', truncate='END')",
        "embedder = Embedder(options)",
        "embedder.embed(['short'])",
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss",
        "embedder.embed(['a ' * 40_000])",
        "assert embedder.usage > 32_768",
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)",
    ]
    code = "\n".join(lines)
    assert int(python(code)) < 400  # MB; one head's scores would take 4,096
