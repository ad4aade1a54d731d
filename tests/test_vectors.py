"""Cutting, scaling and number types."""

from __future__ import annotations

import numpy as np
import pytest
from sentence_transformers.util import quantize_embeddings

from shared_engine import (
    ConfigurationError,
    Embedder,
    NonFiniteVectorError,
    Options,
    PartialResultError,
    quantize,
)
from shared_engine.vectors import unit


@pytest.fixture(scope="module")
def vectors():
    return unit(np.random.default_rng(0).normal(size=(200, 32)).astype(np.float32))


@pytest.mark.parametrize("kind", ["binary", "ubinary"])
def test_bits_are_those_of_sentence_transformers(vectors, kind):
    theirs = quantize_embeddings(vectors, precision=kind)
    ours = quantize(vectors, kind)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_calibrated_bytes_are_those_of_sentence_transformers(vectors, kind):
    ranges = np.vstack([vectors.min(0), vectors.max(0)])
    theirs = quantize_embeddings(vectors, precision=kind, ranges=ranges)
    ours = quantize(vectors, kind, ranges)
    assert ours.dtype == theirs.dtype
    assert np.array_equal(ours, theirs)


def test_calibrated_bytes_clip_instead_of_wrapping(vectors):
    ranges = np.vstack([np.full(32, -0.01), np.full(32, 0.01)]).astype(np.float32)
    assert set(np.unique(quantize(vectors, "uint8", ranges)[np.abs(vectors) > 0.02])) == {0, 255}


@pytest.mark.parametrize("kind", ["int8", "uint8"])
def test_uncalibrated_bytes_keep_the_cosine_and_ignore_neighbours(vectors, kind):
    ours = quantize(vectors, kind)
    assert np.array_equal(ours[3:4], quantize(vectors[3:4], kind))
    back = ours.astype(np.float32) - (128 if kind == "uint8" else 0)
    assert (unit(back) * vectors).sum(1).min() > 0.9999


def test_another_number_type_is_refused(vectors):
    with pytest.raises(ConfigurationError, match=r"embedding_type='float32': expected float, int8"):
        quantize(vectors, "float32")


def test_the_embedder_returns_the_type_asked_for(checkpoint):
    exact = Embedder(Options(model=checkpoint)).embed(["a", "b"])
    for kind, dtype, width in [
        ("int8", np.int8, 64),
        ("uint8", np.uint8, 64),
        ("binary", np.int8, 8),
        ("ubinary", np.uint8, 8),
    ]:
        out = Embedder(Options(model=checkpoint, embedding_type=kind)).embed(["a", "b"])
        assert (out.dtype, out.shape) == (dtype, (2, width))
        assert np.array_equal(out, quantize(exact, kind))


def test_zero_rows_stay_zero_and_input_is_cut_first():
    rows = np.array([[3, 4, 100], [0, 0, 7]], np.float32)
    assert np.allclose(unit(rows, 2), [[0.6, 0.8], [0, 0]])


def test_nan_is_an_error_that_keeps_the_other_rows(checkpoint, tmp_path):
    """A checkpoint whose embedding of one token is NaN: only texts that hold it fail."""
    import shutil

    from safetensors.torch import load_file, save_file

    from tests.support.checkpoints import tokenizer

    folder = tmp_path / "nan"
    shutil.copytree(checkpoint, folder)
    weights = load_file(folder / "model.safetensors")
    weights["embed_tokens.weight"][tokenizer().token_to_id("q")] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    embedder = Embedder(Options(model=folder))
    with pytest.raises(PartialResultError, match="1 of 3 inputs failed") as failed:
        embedder.embed(["fine", "q q q", "too"])
    assert isinstance(failed.value.errors[1], NonFiniteVectorError)
    good = Embedder(Options(model=checkpoint)).embed(["fine", "too"])
    assert np.abs(failed.value.vectors[[0, 2]] - good).max() <= 1e-6
    assert np.isnan(failed.value.vectors[1]).all()
    with pytest.raises(NonFiniteVectorError):
        embedder.embed(["q q q"])


@pytest.mark.parametrize("size", [3e38, 1e30, 1e19, 1e-12, 1e-18, 1e-30, 1e-37])
def test_a_vector_whose_squares_float32_does_not_hold_is_of_unit_length(size):
    row = np.array([1, -0.5, 0.25, 0], np.float32)
    out = unit(np.stack([row * np.float32(size), row, 0 * row]))
    assert np.abs(out[0] - row / np.linalg.norm(row)).max() <= 1e-6
    assert np.abs(out[1] - out[0]).max() <= 1e-6
    assert not out[2].any()
