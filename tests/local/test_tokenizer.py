"""Prefix, BOS and truncation, token by token."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from shared_engine import Embedder, InputTooLongError, Options
from shared_engine.local.checkpoint import resolve
from shared_engine.local.tokenizer import TEXTS_AT_ONCE, TextTokenizer
from tests.support.checkpoints import BOS, EOS, tokenizer

PREFIXES = {"query": "query: ", "document": "passage: "}
LONG = "In the beginning there were many words, and every word was different. " * 9


@pytest.fixture(scope="module")
def made(checkpoint):
    def with_limit(limit: int | None = None) -> TextTokenizer:
        return TextTokenizer(resolve(Options(model=checkpoint, max_tokens=limit)))

    return with_limit


@pytest.mark.parametrize("role", ["query", "document"])
def test_bos_and_prefix_and_no_eos(made, role):
    texts = ["", "hello", LONG]
    for text, ids in zip(texts, made().encode(texts, role, "NONE"), strict=True):
        assert list(ids) == tokenizer().encode(PREFIXES[role] + text).ids
        assert ids[0] == tokenizer().token_to_id(BOS)
        assert ids[-1] != tokenizer().token_to_id(EOS)


def test_the_prefix_is_added_also_where_the_text_begins_with_it(made):
    (ids,) = made().encode(["query: hello"], "query", "NONE")
    assert list(ids) == tokenizer().encode("query: query: hello").ids


@pytest.mark.parametrize("limit", [1, 2, 8, 9, 20, 100])
@pytest.mark.parametrize("role", ["query", "document"])
def test_truncation_keeps_bos_and_prefix_and_gives_exactly_the_limit(made, role, limit):
    (ids,) = made().encode([LONG], role, "NONE")
    head = tokenizer().encode(PREFIXES[role].rstrip()).ids[:limit]
    end, start = (made(limit).encode([LONG], role, how)[0] for how in ("END", "START"))
    assert len(end) == len(start) == limit
    assert list(end) == list(ids[:limit])
    assert list(start[: len(head)]) == head == list(ids[: len(head)])
    assert list(start[len(head) :]) == list(ids[len(ids) - limit + len(head) :])


def test_an_empty_text_without_prefix_and_bos_is_a_lone_bos(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "bare")
    path = tmp_path / "bare" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"post_processor": None}))
    path.with_name("config_sentence_transformers.json").write_text(
        json.dumps({"prompts": {"query": "", "document": ""}})
    )
    with Embedder(Options(model=path.parent)) as embedder:
        vectors = embedder.embed(["", "a", ""])
    assert np.isfinite(vectors).all()
    assert np.abs(vectors[0] - vectors[2]).max() <= 1e-6


def test_a_text_at_the_limit_is_left_alone(made):
    (ids,) = made().encode([LONG], "document", "NONE")
    for how in ("NONE", "START", "END"):
        assert np.array_equal(made(len(ids)).encode([LONG], "document", how)[0], ids)


def test_a_text_over_the_limit_is_an_error_in_its_place(made):
    (ids,) = made().encode([LONG], "document", "NONE")
    short, error, again = made(9).encode(["a", LONG, "a"], "document", "NONE")
    assert isinstance(error, InputTooLongError)
    assert str(error).startswith(f"has {len(ids)} tokens; the limit is 9")
    assert (error.tokens, error.limit, error.index) == (len(ids), 9, None)
    assert np.array_equal(short, again)


def test_many_texts_give_as_many_rows(made):
    texts = [f"text {i}" for i in range(2 * TEXTS_AT_ONCE + 3)]
    rows = made().encode(texts, "document", "NONE")
    assert [list(row) for row in rows] == [
        tokenizer().encode(f"passage: {text}").ids for text in texts
    ]
