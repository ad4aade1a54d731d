"""What is a document, an image or a text, and what is neither."""

from __future__ import annotations

import base64
import time

import pytest

from shared_engine.documents import is_data_url
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
def test_a_data_url_is_told_from_a_text(text, answer):
    assert is_data_url(text) is answer


def test_telling_a_data_url_reads_no_megabytes():
    long = "data:image/png" + ";x" * 10_000_000
    start = time.perf_counter()
    for _ in range(1000):
        assert not is_data_url(long)
    assert time.perf_counter() - start < 0.5
