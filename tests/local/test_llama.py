"""The vectors are right: against independent implementations, and whatever runs beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared_engine import Embedder, Options
from shared_engine.local import attention
from shared_engine.local.llama import Encoder
from tests.support import oracles
from tests.support.checkpoints import SHAPES, build_checkpoint, tokenizer

TEXTS = [
    "hello world",
    "",
    "   ",
    "The quick brown fox jumps over the lazy dog.",
    "naïve café — 日本語のテキスト, العربية, 🙂🚀",
    "a literal <|end_of_text|> inside",
    "\n\ttabs and\r\nnewlines\n",
    "one text that is much longer than the others, " * 40,
]


@pytest.fixture(scope="module", params=list(SHAPES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name = str(request.param)
    return build_checkpoint(tmp_path_factory.mktemp(name) / name, SHAPES[name])


@pytest.fixture
def embedder(folder: Path) -> Iterator[Embedder]:
    with Embedder(Options(model=folder, device="cpu", dtype="float32")) as made:
        yield made


@pytest.mark.parametrize(("role", "prefix"), [("query", "query: "), ("document", "passage: ")])
def test_vectors_equal_the_float64_oracle(embedder, folder, role, prefix):
    ours = embedder.embed(TEXTS, role)
    assert ours.dtype == np.float32
    assert ours.shape == (len(TEXTS), SHAPES[folder.name].hidden_size)
    assert np.abs(ours - oracles.numpy_float64(folder, TEXTS, prefix)).max() <= 2e-6
    assert np.abs(np.linalg.norm(ours.astype(np.float64), axis=1) - 1).max() <= 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("name", ["eurobert", "llama_4d_mask", "sentence_transformers"])
def test_vectors_equal_other_implementations(embedder, folder, name):
    theirs = oracles.ORACLES[name](folder, TEXTS, "passage: ")
    assert np.abs(embedder.embed(TEXTS) - theirs).max() <= 1e-5


def test_long_texts_equal_the_float64_oracle(checkpoint):
    texts = ["seven words that are said once more. " * n for n in (40, 80)]
    assert min(len(tokenizer().encode(text).ids) for text in texts) < attention._LONG
    assert max(len(tokenizer().encode(text).ids) for text in texts) > attention._LONG
    ours = Embedder(Options(model=checkpoint, dtype="float32")).embed(texts)
    assert np.abs(ours - oracles.numpy_float64(checkpoint, texts, "passage: ")).max() <= 2e-6


@pytest.mark.slow
def test_a_causal_mask_changes_vectors(folder):
    causal = oracles.numpy_float64(folder, TEXTS, "passage: ", causal=True)
    assert np.abs(causal - oracles.numpy_float64(folder, TEXTS, "passage: ")).max() > 0.05


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2e-3)])
def test_a_vector_does_not_depend_on_neighbours(checkpoint, dtype, bound):
    """Alone, first, last, among copies, among long ones, in steps of any size: the same vector.

    In bfloat16 it is exactly the same on a CPU with AVX512_BF16. On others oneDNN may choose a
    kernel by the number of rows, which rounds otherwise.
    """
    text = TEXTS[3]
    options = Options(model=checkpoint, device="cpu", dtype=dtype)
    alone = Embedder(options).embed([text])[0]
    for max_batch_tokens in (1, 64, 700, 8192):
        embedder = Embedder(options.replace(max_batch_tokens=max_batch_tokens))
        for batch in ([text, *TEXTS], [*TEXTS, text], [text] * 9, [*TEXTS[::-1], text, *TEXTS]):
            rows = embedder.embed(batch)[[i for i, other in enumerate(batch) if other == text]]
            assert np.abs(rows - alone).max() <= bound


def test_rows_come_in_the_callers_order(checkpoint):
    texts = [f"text {i} " + "word " * (i * 37 % 101) for i in range(600)]
    vectors = Embedder(Options(model=checkpoint, max_batch_tokens=500)).embed(texts)
    some = np.random.default_rng(0).permutation(600)[:12]
    expected = oracles.numpy_float64(checkpoint, [texts[i] for i in some], "passage: ")
    assert np.abs(vectors[some] - expected).max() <= 2e-6


def test_shorter_vectors_are_cut_before_they_are_scaled(checkpoint):
    full = oracles.numpy_float64(checkpoint, TEXTS, "passage: ")
    cut = full[:, :16] / np.linalg.norm(full[:, :16], axis=1, keepdims=True)
    ours = Embedder(Options(model=checkpoint, dimensions=16)).embed(TEXTS)
    assert ours.shape == (len(TEXTS), 16)
    assert np.abs(ours - cut).max() <= 1e-5


def test_bfloat16_stays_close(checkpoint):
    exact = oracles.numpy_float64(checkpoint, TEXTS, "passage: ")
    ours = Embedder(Options(model=checkpoint, device="cpu", dtype="bfloat16")).embed(TEXTS)
    assert (ours * exact).sum(1).min() >= 0.9995
    assert np.abs(np.linalg.norm(ours, axis=1) - 1).max() <= 1e-6


def test_in_bfloat16_steps_of_many_sizes_have_few_numbers_of_rows(checkpoint, monkeypatch):
    """oneDNN makes a kernel for each, and keeps it: a server grew by 1.4 GB."""
    rows: set[int] = set()
    forward = Encoder._forward

    def watched(self: Encoder, x: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows.add(len(x))
        return forward(self, x, *rest)

    monkeypatch.setattr(Encoder, "_forward", watched)
    texts = ["word " * n for n in range(1, 330, 6)]
    found = {}
    for dtype in ("float32", "bfloat16"):
        rows.clear()
        with Embedder(Options(model=checkpoint, device="cpu", dtype=dtype)) as embedder:
            found[dtype] = np.concatenate([embedder.embed([text]) for text in texts])
        if dtype == "float32":
            assert len(rows) == len(texts)
        else:
            assert all(n % (16 if n <= 256 else 64) == 0 for n in rows)
    assert (found["float32"] * found["bfloat16"]).sum(1).min() >= 0.9995


@pytest.mark.slow
def test_a_text_of_8192_tokens(tmp_path):
    folder = build_checkpoint(tmp_path / "long", SHAPES["gqa"], max_position_embeddings=8192)
    text = "word " * 9000
    ids = tokenizer().encode("passage: " + text).ids
    assert len(ids) > 8192
    embedder = Embedder(Options(model=folder, truncate="END", device="cpu"))
    kept = tokenizer().decode(ids[1:8192]).removeprefix("passage: ")
    expected = oracles.llama_4d_mask(folder, [kept], "passage: ", attention="sdpa")
    assert np.abs(embedder.embed([text]) - expected).max() <= 1e-5


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_gpu_gives_the_same_vectors(checkpoint, dtype):
    exact = oracles.numpy_float64(checkpoint, TEXTS, "passage: ")
    ours = Embedder(Options(model=checkpoint, device="cuda", dtype=dtype)).embed(TEXTS)
    assert (ours * exact).sum(1).min() >= (0.9995 if dtype != "float32" else 0.999999)


@pytest.mark.true_shape
@pytest.mark.slow
def test_the_true_shape_of_the_300m_model(tmp_path):
    """9 layers, 2048 hidden, vocabulary 128256: loads under its own name, runs, and is right."""
    from tests.support.checkpoints import true_shape_300m

    folder = true_shape_300m(tmp_path / "300m")
    name = "nvidia/llama-3.2-nemoretriever-300m-embed-v2"
    options = Options(model=name, checkpoint=str(folder), device="cpu", dtype="float32")
    with Embedder(options) as embedder:
        full = embedder.embed(TEXTS[:4], "query")
        theirs = oracles.sentence_transformers(folder, TEXTS[:4], "query: ")
        assert np.abs(full - theirs).max() <= 1e-5
        for size in (384, 512, 768, 1024):
            with Embedder(options.model_copy(update={"dimensions": size})) as shorter:
                assert shorter.embed(TEXTS[:1], "query").shape == (1, size)
