"""Prefix, BOS and truncation, token by token."""

from __future__ import annotations

import itertools
import json
import shutil
import time

import numpy as np
import pytest

from shared_engine import Embedder, InputTooLongError, Options
from shared_engine.local.checkpoint import resolve
from shared_engine.local.tokenizer import (
    CHARACTERS_PER_CALL,
    TEXTS_PER_CALL,
    TextTokenizer,
    shorten,
)
from tests.support.checkpoints import BOS, EOS, tokenizer
from tests.support.vl_checkpoints import build_vl_checkpoint, vl_tokenizer

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


def test_a_text_at_the_limit_is_not_cut(made):
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
    texts = [f"text {i}" for i in range(2 * TEXTS_PER_CALL + 3)]
    rows = made().encode(texts, "document", "NONE")
    assert [list(row) for row in rows] == [
        tokenizer().encode(f"passage: {text}").ids for text in texts
    ]


# Very long texts: a bounded part of them is tokenized, with the same result

LIMIT = 30
UNITS = [
    *("a", "ab", "abc", "abcde", "word ", "The quick brown fox, ", "https://example.org/x?id="),
    *(" ", "\n", "\r\n", " \n", "\n ", "\t", "\u3000", "  x"),
    *("1", "123", "1234567890", "12 ", "0.1,", "٣٤", "½²", "Ⅷ", "一"),
    *("abcdefghijk", "eleven letters, and some", "abcdefghijklmabcdefghijklzyxwvu"),
    *("é", "a\u0301", "日本語", "👩‍💻", "ﷺ", "क्ष"),
    *("!", "!? ", "-\n", "'s", "\x00", EOS, "<|end", "passage: "),
]
HUGE = 110_000
"""Characters from which these tokenizers cut, and more."""


def runs(count: int, seed: int) -> str:
    """A text of so many characters, of units that are said once or thousands of times."""
    random = np.random.default_rng(seed)
    text = ""
    while len(text) < count:
        most = random.choice([3, 50, 5_000, count])
        text += random.choice(UNITS) * int(random.integers(1, most + 1))
    return text[: 2 * count]


def cut_whole(ids: list[int], kept: int, limit: int, truncate: str) -> list[int]:
    if len(ids) <= limit:
        return ids
    return ids[:limit] if truncate == "END" else ids[:kept] + ids[len(ids) - (limit - kept) :]


def check(tokens: TextTokenizer, text: str, *truncations: str) -> None:
    """Compare with the ids of the whole text; "NONE" is always compared."""
    ids = tokenizer().encode(f"passage: {text}").ids
    both = zip(tokenizer().encode("passage:").ids, ids, strict=False)
    kept = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], both)))
    for truncate in truncations:
        (got,) = tokens.encode([text], "document", truncate)
        assert list(got) == cut_whole(ids, kept, tokens.limit, truncate)
    (error,) = tokens.encode([text], "document", "NONE")
    if len(ids) <= tokens.limit:
        assert list(error) == ids
        return
    assert tokens.limit < error.tokens <= len(ids)
    assert ("over" in str(error)) == (error.tokens < len(ids))


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_the_beginning_of_one_very_long_run_has_the_tokens_of_the_whole(made, unit):
    before = ["", "x", "some words, and then\n"][len(unit) % 3]
    text = before + unit * (HUGE // len(unit))
    check(made(LIMIT), text[:HUGE] + "and an end" * (len(unit) % 2), "END")


@pytest.mark.parametrize("unit", ["word ", "The quick brown fox, ", "12 ", "!? ", "letters, "])
def test_the_end_of_very_long_text_has_the_tokens_of_the_whole(made, unit):
    check(made(LIMIT), unit * (HUGE // len(unit)) + "and an end", "END", "START")


@pytest.mark.parametrize("unit", UNITS, ids=ascii)
def test_the_end_of_one_very_long_run_has_the_limit_and_the_last_characters(made, unit):
    """A run without white space may be split elsewhere, as its beginning is not read."""
    text = unit * (HUGE // len(unit)) + " and an end"
    (ids,) = made(LIMIT).encode([text], "document", "START")
    assert len(ids) == LIMIT
    assert tokenizer().decode(ids.tolist()).endswith(" and an end")


@pytest.mark.parametrize("seed", range(12))
def test_the_beginning_of_any_very_long_text_has_the_tokens_of_the_whole(made, seed):
    check(made(LIMIT + 40 * (seed % 3)), runs(HUGE, seed), "END")


@pytest.mark.parametrize("unit", ["word ", "a", " ", "1234567890", "日本語", "\n "], ids=ascii)
def test_tokenization_of_twenty_million_characters_is_bounded(made, unit):
    text = unit * (20_000_000 // len(unit))
    for truncate in ("NONE", "START", "END"):
        assert 40_000 <= len(shorten(text, 40_000, truncate)) <= 40_128
        began = time.perf_counter()
        made(2048).encode([text], "document", truncate)
        assert time.perf_counter() - began < 5  # tens of milliseconds; the whole takes 30 s


def test_one_call_of_the_tokenizer_is_bounded(made):
    """For many long texts too: the library holds some 70 bytes for a character."""
    tokens = made(200)
    real, calls = tokens._tokenizer, []

    class Spy:
        def encode_batch_fast(self, texts, **given):
            calls.append(texts)
            return real.encode_batch_fast(texts, **given)

    texts = ["word " * length for length in (3, 20_000, 100_000) * 9] + ["a"] * TEXTS_PER_CALL
    expected = [*tokens.encode(texts, "query", "END")]
    tokens._tokenizer = Spy()
    for ids, wanted in zip(tokens.encode(texts, "query", "END"), expected, strict=True):
        assert np.array_equal(ids, wanted)
    assert all(sum(map(len, texts)) <= 1.2 * CHARACTERS_PER_CALL for texts in calls)
    assert max(map(len, calls)) <= TEXTS_PER_CALL
    assert len(calls) < 10


def test_a_very_long_caption_is_cut_to_the_limit(tmp_path):
    folder = build_vl_checkpoint(tmp_path / "vl")
    tokens = TextTokenizer(resolve(Options(model=folder, max_tokens=LIMIT)))
    for seed in range(6):
        text = runs(HUGE, seed)
        words = vl_tokenizer().encode(f" {text}", add_special_tokens=False).ids
        image = tokens.encode_with_image(range(2), "", "NONE")[:-1]  # and the space
        got = tokens.encode_with_image(range(2), text, "END")
        assert list(got) == cut_whole([*image, *words], len(image), LIMIT, "END")
        start = tokens.encode_with_image(range(2), text, "START")
        assert (len(start), list(start[: len(image)])) == (LIMIT, [*image])
        with pytest.raises(InputTooLongError) as error:
            tokens.encode_with_image(range(2), text, "NONE")
        assert LIMIT < error.value.tokens <= len(image) + len(words)
