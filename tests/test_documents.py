"""Inputs of every type, valid and invalid."""

from __future__ import annotations

from collections import deque
from enum import Enum
from io import BytesIO, StringIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from shared_engine import InputTypeError
from shared_engine.documents import EmbeddingInput, Modality, validate, wrap_images
from tests.support.image_files import PNG


class Scalar:
    """As of Arrow: a value that says what it is in Python."""

    def __init__(self, value: object) -> None:
        self.value = value

    def as_py(self) -> object:
        return self.value


class Color(str, Enum):  # noqa: UP042  as older programs have them
    RED = "red"


TEXT: frozenset[Modality] = frozenset({"text"})
EVERY: frozenset[Modality] = frozenset({"text", "image", "text_image"})


@pytest.mark.parametrize(
    "item", ["red", np.str_("red"), Scalar("red"), Color.RED, np.array(["red"], object)[0]]
)
def test_all_kinds_of_strings_are_texts(item):
    for given_ in (item, EmbeddingInput(item)):
        (document,) = validate([given_], "query", TEXT)
        assert (document, type(document.text)) == (EmbeddingInput("red"), str)
    (document,) = validate([EmbeddingInput(item, PNG)], "document", EVERY)
    assert (document, type(document.text)) == (EmbeddingInput("red", PNG), str)


@pytest.mark.parametrize(
    "items",
    [
        ("a", "b"),
        np.array(["a", "b"]),
        np.array(["a", "b"], object),
        dict.fromkeys("ab").keys(),
        StringIO("a\nb"),
        iter(["a", "b"]),
        (letter for letter in "ab"),
        deque("ab"),
    ],
    ids=lambda items: type(items).__name__,
)
def test_all_kinds_of_collections_are_lists(items):
    assert [document.text.strip() for document in validate(items, "document", TEXT)] == ["a", "b"]


LANGCHAIN = SimpleNamespace(page_content="a", metadata={})
LLAMAINDEX = SimpleNamespace(get_content=lambda: "a")


@pytest.mark.parametrize(
    ("items", "words"),
    [
        (1, "expected a list of documents, got one int; wrap"),
        (None, "expected a list of documents, got one NoneType"),
        (1.5, "got one float"),
        (object(), "got one object"),
        ("a text", "got one str"),
        (np.str_("a text"), "got one numpy.str_"),
        (Scalar("a text"), "got one .*Scalar; wrap"),
        (EmbeddingInput("a"), "got one shared_engine.documents.EmbeddingInput"),
        (b"a text", "got one bytes"),
        (bytearray(b"a text"), "got one bytearray"),
        (Path("a.txt"), r"got one pathlib\.PosixPath"),
        (LANGCHAIN, r"got one types\.SimpleNamespace; embed its `page_content`"),
        (LLAMAINDEX, r"got one types\.SimpleNamespace; embed its `get_content\(\)`"),
        ({"a": "b"}, "got a dict; pass one column or its values"),
        (np.array([["a"], ["b"]]), "got a numpy.ndarray; pass one column"),
        (np.array("a"), "got a numpy.ndarray"),
    ],
)
def test_a_single_item_is_not_a_list(items, words):
    with pytest.raises(InputTypeError, match=words) as caught:
        validate(items, "document", TEXT)
    assert caught.value.index is None
    with pytest.raises(InputTypeError, match="expected a list of images"):
        wrap_images(items)


@pytest.mark.parametrize("one", [BytesIO(PNG), Image.new("L", (1, 1)), memoryview(PNG)])
def test_a_single_image_is_not_a_list(one):
    with pytest.raises(InputTypeError, match="expected a list of images, got one"):
        wrap_images(one)


@pytest.mark.parametrize(
    ("item", "words"),
    [
        (1, "input 1 is of type int; expected a str or a shared_engine.EmbeddingInput"),
        (
            None,
            "NoneType; expected a str or a .*EmbeddingInput; remove missing values first",
        ),
        (float("nan"), "type float; .*; remove missing values first"),
        (Scalar(None), "Scalar; expected a str.*; remove missing values first"),
        (type("NAType", (), {})(), "NAType; .*; remove missing values first"),  # of pandas
        (b"a", "bytes; .*; decode it if it is a text, or use EmbeddingInput"),
        (["a"], "type list"),
        ({"text": "a"}, "type dict"),
        (Path("a.txt"), r"type pathlib\.PosixPath"),
        (np.array(["a", "b"]), r"type numpy\.ndarray"),
        (LANGCHAIN, r"types\.SimpleNamespace; .*; embed its `page_content`"),
        (LLAMAINDEX, r"; embed its `get_content\(\)`"),
        (EmbeddingInput(1), "has a text of type int; expected a str"),
        (EmbeddingInput(b"a"), "has a text of type bytes"),
        (EmbeddingInput(Scalar(1)), "has a text of type .*Scalar"),
        (EmbeddingInput(), "has neither text nor image"),
    ],
)
def test_an_invalid_input_is_refused_by_index(item, words):
    with pytest.raises(InputTypeError, match=words) as caught:
        validate(["a", item], "document", EVERY)
    assert caught.value.index == 1


def test_documents_of_the_frameworks_are_refused_by_full_name():
    schema = pytest.importorskip("langchain_core.documents")
    name = r"langchain_core\.documents\.base\.Document"
    with pytest.raises(InputTypeError, match=rf"{name}; .* its `page_content`"):
        validate([schema.Document("a")], "document", TEXT)
    with pytest.raises(InputTypeError, match=f"got one {name}"):
        validate(schema.Document("a"), "document", TEXT)
    schema = pytest.importorskip("llama_index.core.schema")
    with pytest.raises(InputTypeError, match=r"llama_index\.core\.schema\.TextNode; .*get_content"):
        validate([schema.TextNode(text="a")], "document", TEXT)


def test_a_file_object_is_read_once():
    """An open file, whose owner may close it."""
    file = BytesIO(PNG)
    (document,) = validate([EmbeddingInput(image=file)], "document", EVERY)
    file.close()
    assert document.image == PNG
    (again,) = validate([document], "document", EVERY)
    assert again.image is document.image
