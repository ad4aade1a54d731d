"""The prompts of rerankers, token by token.

They are written out, so that a space, a line end or a token that moves is seen. NVIDIA's code puts
images into the prompt by the text `<image>`, and deletes its first occurrence in a prompt without
an image; here it is text like any other.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from shared_engine import RerankOptions
from shared_engine.local.checkpoint import resolve
from shared_engine.local.tokenizer import TextTokenizer
from tests.support.rerankers import build_reranker, build_vl_reranker

BOS = "<|begin_of_text|>"
QUESTION = "qu e st io n :"
IMAGE = "Ġ < i m age >"
PASSAGE = "Ġ Ċ Ġ Ċ Ġ passage :"
CONTEXT = "Ġ < I M G _ C O N T E X T >"

PAIRS = {
    ("a dog?", "the dog"): f"{BOS} {QUESTION} a Ġdog ? {PASSAGE} t he Ġdog",
    (" a", "b"): f"{BOS} {QUESTION} Ġa {PASSAGE} b",
    ("a dog?", ""): f"{BOS} {QUESTION} a Ġdog ? {PASSAGE}",
    ("a <image> dog?", "the"): f"{BOS} {QUESTION} a {IMAGE} Ġdog ? {PASSAGE} t he",
    ("a dog?", "the <image>"): f"{BOS} {QUESTION} a Ġdog ? {PASSAGE} t he {IMAGE}",
    ("a dog?", "the <IMG_CONTEXT>"): f"{BOS} {QUESTION} a Ġdog ? {PASSAGE} t he {CONTEXT}",
}


@pytest.fixture(scope="module")
def text_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return make(build_reranker(tmp_path_factory.mktemp("text")))


@pytest.fixture(scope="module")
def vl_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return make(build_vl_reranker(tmp_path_factory.mktemp("vl")))


def make(folder: Path) -> TextTokenizer:
    return TextTokenizer(resolve(RerankOptions(model=str(folder))))


def tokens(tokenizer: TextTokenizer, ids: list[int]) -> str:
    """Return the names of the tokens; those of images without their random endings."""
    names = (tokenizer._tokenizer.id_to_token(number) for number in ids)
    return " ".join(f"{name.partition('>')[0]}>" if len(name) > 32 else name for name in names)


@pytest.mark.parametrize(("query", "passage"), PAIRS)
def test_a_pair_of_texts(query, passage, text_tokenizer, vl_tokenizer):
    for tokenizer in (text_tokenizer, vl_tokenizer):
        (ids,) = tokenizer.encode_pairs(query, [passage], "NONE")
        assert tokens(tokenizer, ids.tolist()) == PAIRS[query, passage]


@pytest.mark.parametrize("tiles", [1, 3])
@pytest.mark.parametrize(("passage", "end"), [("", ""), ("the dog", " t he Ġdog")])
def test_an_image_comes_first(passage, end, tiles, vl_tokenizer):
    ids = vl_tokenizer.encode_with_image(range(tiles), passage, "NONE", "a <image> dog?").tolist()
    context = " ".join(["<IMG_CONTEXT>"] * 4 * tiles)
    pair = f"Ġqu e st io n : a {IMAGE} Ġdog ? {PASSAGE}{end}"
    assert tokens(vl_tokenizer, ids) == f"{BOS} <img> {context} </img> {pair}"
