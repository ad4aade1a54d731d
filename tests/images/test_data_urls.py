"""Data URLs recognised as such, alone or at the end of a text."""

from __future__ import annotations

import base64
import time
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared_engine import EmbeddingInput
from shared_engine.images.data_urls import is_data_url, split_data_url
from tests.support.image_files import PNG, PNG64


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (f"data:image/png;base64,{PNG64}", True),
        (f"DATA:Image/PNG,{PNG64}", True),
        ("data:image/svg+xml;charset=utf-8,%3Csvg/%3E", True),
        ("data:image/png;base64," + base64.encodebytes(PNG * 9).decode(), True),
        ("data:image/png;base64,", True),
        ("data:image/png;base64", False),
        ("data:image/png, and then", False),
        (f"data:image/png;base64,{PNG64} is how it begins", False),
        (f"see data:image/png;base64,{PNG64}", False),
        ("data:text/plain,hello", False),
        ("data: image/png,x", False),
        ("image/png", False),
        ("", False),
    ],
)
def test_a_data_url_is_recognised(text, answer):
    assert is_data_url(text) is answer


def test_a_long_head_is_not_scanned():
    long = "data:image/png" + ";x" * 10_000_000
    start = time.perf_counter()
    for _ in range(1000):
        assert not is_data_url(long)
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png;base64,iVBORw0KGgo=)",
        "data:image/png;base64,iVBORw0KGgo=.",
        "data:image/png;base64,iVBORw0KGgo= ",
        "data:image/png;base64,iVBORw0KGgo==\n\n# A title",
        "data:image/png;base64,iVBORw0KGgo=\nand a sentence",
        f"data:image/png;base64,{PNG64}\n\nA caption",
        f"data:image/png;base64,{PNG64}\nCaption",
        f"data:image/png;base64,{PNG64}\n![next](data:image/png;base64,{PNG64})",
        f"data:image/png;base64,{PNG64} data:image/png;base64,{PNG64}",
        f"data:image/png;base64,{PNG64}\ndata:image/png;base64,{PNG64}",
        f"data:image/png,{PNG64}.",
        "data:image/png,the words after a comma",
        "data:image/png;base64,iVBO Rw0K",
        "data:image/png;base64,iVBO%4",
        "data:image/png;base64,iVBO%zz",
        "data:image/png;base64,ïVBORw0KGgo=",
        "data:image/png;base64,====",
        " data:image/png;base64,iVBORw0KGgo=",
        "(data:image/png;base64,iVBORw0KGgo=",
        "data:image/png;base64,http://127.0.0.1/",
    ],
)
def test_a_text_that_begins_with_a_data_url_is_a_text(text):
    assert not is_data_url(text)


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png;base64,iVBORw0KGgo=\n",
        "data:image/png;base64,iVBORw0KGgo=\r\n",
        "data:image/png;base64,iVBORw0KGgo%3D",
        "data:image/png;base64,iVBORw0KGgo%3d",
        "data:image/png;base64,iVBO%52w0K%2B%2F",
        "data:image/png;name=a.png;base64,iVBORw0KGgo=",
        "data:image/png," + quote(PNG),
        "data:image/png;base64," + quote(PNG64),
        "data:image/png;base64," + base64.encodebytes(PNG).decode().replace("\n", "\r\n"),
    ],
)
def test_a_data_url_may_have_escapes_and_lines(text):
    assert is_data_url(text)


@pytest.mark.parametrize("one", [None, 1, b"a", [], EmbeddingInput("data:image/png;base64,iVBO")])
def test_only_a_text_is_a_data_url(one):
    assert not is_data_url(one)


@given(st.binary(min_size=1, max_size=300), st.text(min_size=1, max_size=40))
def test_a_text_after_a_data_url_makes_it_a_text(data, text):
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    assert is_data_url(url)
    assert not is_data_url(f"{url}\n\n{text} .")
    assert not is_data_url(f"{text} .{url}")


@pytest.mark.parametrize(
    "end",
    ["", "=", ")", " and more", "\n\ntext", "%", "%4", "=" * 1_000_000, "\n" * 1_000_000 + "!"],
)
@pytest.mark.parametrize("body", ["A" * 20_000_000, "QUJD\n" * 4_000_000, "%41" * 7_000_000])
def test_long_texts_are_scanned_in_linear_time(body, end):
    text = f"data:image/png;base64,{body}{end}"
    start = time.process_time()
    is_data_url(text)
    assert time.process_time() - start < 2


@given(st.text(alphabet="a \n<img src='\"/>;,:dt=", max_size=60), st.booleans())
def test_splitting_inverts_joining(text, in_tag):
    url = f"data:image/png;base64,{PNG64}"
    joined = f"{text}\n<img src='{url}'/>" if in_tag else f"{text}\n{url}"
    assert split_data_url(joined) == (text, url)
    assert split_data_url(text) is None
