"""The callable for pipelines of others: a column in, vectors beside it, and bad rows named."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest

from shared_engine import (
    ConfigurationError,
    Embedder,
    EmbeddingInput,
    Options,
    PartialResultError,
)
from shared_engine.bulk import EmbedBatch
from shared_engine.errors import InputTypeError
from tests.support.vl_checkpoints import build_vl_checkpoint, page

TEXTS = ["a first text", "", "東京は日本の首都です。", "another " * 9]
LONG = "word " * 3000  # over the tiny checkpoint's 2048 tokens


@pytest.fixture
def options(checkpoint) -> Options:
    return Options(model=str(checkpoint), device="cpu")


@pytest.fixture(params=["arrow", "numpy"])
def convert(request):
    """What makes a batch of columns, and a plain list of a column of it."""
    if request.param == "arrow":
        return pa.table, lambda batch, name: batch[name].to_pylist()
    arrays = lambda columns: {k: np.array(v, dtype=object) for k, v in columns.items()}  # noqa: E731
    return arrays, lambda batch, name: list(batch[name])


@pytest.mark.parametrize("kind", ["float", "int8", "ubinary"])
def test_a_batch_gets_the_vectors_of_embed(options, convert, kind):
    make, read = convert
    options = options.replace(embedding_type=kind, dimensions=16)
    batch = make({"id": list("abcd"), "text": TEXTS})
    out = pickle.loads(pickle.dumps(EmbedBatch(options=options)))(batch)
    with Embedder(options) as embedder:
        expected = embedder.embed(TEXTS)
    got = np.array(read(out, "vector"), expected.dtype)
    np.testing.assert_array_equal(got, expected)
    assert read(out, "id") == list("abcd")
    assert type(out) is type(batch)
    if isinstance(out, pa.Table):
        assert pa.types.is_fixed_size_list(out.schema.field("vector").type)
        assert out.schema.field("vector").type.list_size == expected.shape[1]
    else:
        assert out["vector"].dtype == expected.dtype


def test_columns_and_role_are_as_named(options, convert):
    make, read = convert
    embed = EmbedBatch("question", options=options, role="query", vector_column="question")
    out = embed(make({"question": TEXTS}))
    with Embedder(options) as embedder:
        expected = embedder.embed(TEXTS, "query")
    np.testing.assert_array_equal(np.array(read(out, "question"), np.float32), expected)


@pytest.mark.parametrize("text_column", ["caption", None])
def test_images_are_embedded_with_their_texts_or_alone(convert, text_column, tmp_path):
    make, read = convert
    images = []
    for seed in range(2):
        images.append(str(tmp_path / f"{seed}.png"))
        page(seed, 40, 30).save(images[-1])
    captions = ["a caption", "another one"]
    model = build_vl_checkpoint(tmp_path / "vl")
    embed = EmbedBatch(text_column, "scan", options=Options(model=str(model), device="cpu"))
    out = embed(make({"scan": images, "caption": captions}))
    texts = captions if text_column else [None, None]
    with Embedder(Options(model=str(model), device="cpu")) as embedder:
        expected = embedder.embed(list(map(EmbeddingInput, texts, images)))
    np.testing.assert_array_equal(np.array(read(out, "vector"), np.float32), expected)


@pytest.mark.parametrize("kind", ["float", "int8"])
@pytest.mark.parametrize("texts", [["good", LONG, "fine", None], [LONG]], ids=["some", "only"])
def test_a_bad_row_ends_the_work_or_is_named(options, convert, texts, kind):
    make, read = convert
    options = options.replace(embedding_type=kind)
    batch = make({"text": texts})
    with pytest.raises((PartialResultError, ValueError), match="2048"):
        EmbedBatch(options=options)(batch)
    out = EmbedBatch(options=options, error_column="error")(batch)
    vectors, errors = read(out, "vector"), read(out, "error")
    bad = [not (text and len(text) < 99) for text in texts]
    assert [error is not None for error in errors] == bad
    good = [text for text, is_bad in zip(texts, bad, strict=True) if not is_bad]
    with Embedder(options) as embedder:
        expected = list(embedder.embed(good)) if good else []
    for vector, is_bad in zip(vectors, bad, strict=True):
        if not is_bad:
            np.testing.assert_array_equal(vector, expected.pop(0))
        elif isinstance(out, pa.Table):
            assert vector is None
        else:
            assert np.isnan(vector).all() if kind == "float" else not np.any(vector)


def test_a_good_batch_has_an_empty_column_of_errors(options, convert):
    make, read = convert
    out = EmbedBatch(options=options, error_column="error")(make({"text": TEXTS}))
    assert read(out, "error") == [None] * len(TEXTS)
    if isinstance(out, pa.Table):  # the same schema in every batch, bad rows or not
        assert out.schema.field("error").type == pa.string()


def test_an_empty_batch_keeps_its_schema(options):
    embed = EmbedBatch(options=options)
    empty = embed(pa.table({"text": pa.array([], pa.string())}))
    assert empty.schema == embed(pa.table({"text": TEXTS})).schema


def test_what_is_no_batch_is_refused(options):
    embed = EmbedBatch("passage", options=options)
    with pytest.raises(ConfigurationError, match="no column 'passage'; it has text"):
        embed(pa.table({"text": TEXTS}))
    with pytest.raises(InputTypeError, match='batch_format="pyarrow"'):
        embed(TEXTS)
