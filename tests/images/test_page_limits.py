"""Pages that never end, fill memory or crash the reader: each fails alone, and nothing is left."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shared_engine import EngineClosedError, PageError
from shared_engine.images import pages
from shared_engine.images.pages import open_pages
from tests.support import pdfs

GOOD = pdfs.Leaf("BT /F1 12 Tf 20 150 Td (good) Tj ET")


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Write a PDF of leaves; its readers are new ones, with small limits."""

    def save(*leaves: pdfs.Leaf, **limits: Any) -> Path:
        pdfs.limit_pages(monkeypatch, **limits)
        path = tmp_path / "in.pdf"
        path.write_bytes(pdfs.write(*leaves))
        return path

    return save


@pytest.mark.parametrize(
    ("bad", "layer", "limits", "reason"),
    [
        (
            pdfs.ENDLESS,
            "picture",
            {"seconds": 0.2},
            r"took more than 0\.2 s of processor time, the",
        ),
        (pdfs.ENDLESS, "text", {"memory": 1 << 26}, r"needs more than 0\.0625 GB of memory"),
        (pdfs.HUGE, "picture", {"memory": 1 << 26}, r"needs more than 0\.0625 GB of memory"),
        (pdfs.HUGE, "text", {"seconds": 0.2}, r"took more than 0\.2 s of processor time, the"),
    ],
)
def test_a_page_beyond_a_limit_fails_alone(save, bad, layer, limits, reason):
    with open_pages(save(GOOD, bad, GOOD, **limits), "a.pdf") as opened:
        assert opened.read(0).text == "good"
        with pytest.raises(PageError, match=rf"^a\.pdf, page 2, .*{reason}.*; leave it out"):
            opened.read(1, layer)
        assert opened.read(2).text == "good"


def test_a_picture_beyond_the_limit_of_memory_fails(save, tmp_path):
    from PIL import Image

    save(GOOD, memory=1 << 26)
    Image.new("RGB", (8_000, 9_000)).save(tmp_path / "a.png", compress_level=1)
    with (
        open_pages(tmp_path / "a.png") as opened,
        pytest.raises(PageError, match=r"^a\.png, page 1, needs more than 0\.0625 GB of memory"),
    ):
        opened.read(0)


@pytest.mark.parametrize("sides", [(10_000, 8_001), (16_320, 12_240)])  # the second of a phone
def test_a_picture_beyond_the_limit_of_pixels_is_not_called_broken(tmp_path, sides):
    from PIL import Image

    path = tmp_path / "a.png"
    Image.new("L", (9, 9)).save(path)
    path.write_bytes(pdfs.claim_size(path.read_bytes(), *sides))
    with open_pages(path) as opened, pytest.raises(PageError) as caught:
        opened.read(0)
    assert str(caught.value) == (
        "a.png, page 1, has more than 80 million pixels, the limit; save a smaller picture"
    )


def test_a_file_of_many_such_pages_ends(save, monkeypatch):
    monkeypatch.setattr(pages, "_MOST_ENDED", 2)
    with open_pages(save(*[pdfs.ENDLESS] * 2, GOOD, seconds=0.1)) as opened:
        for index in range(2):
            with pytest.raises(PageError, match="took more than"):
                opened.read(index, "text")
        with pytest.raises(PageError, match=r"page 3, was not read, because 2 pages of the file"):
            opened.read(2)


def test_a_reader_that_crashed_is_replaced(save):
    with open_pages(save(GOOD, GOOD), "a.pdf") as opened:
        opened._reader._process.kill()
        with pytest.raises(PageError, match=r"^a\.pdf, page 1, is broken.* ended \(SIGKILL\)"):
            opened.read(0)
        assert opened.read(1).text == "good"


def test_a_file_that_is_gone_when_its_reader_is_replaced_is_named_at_every_page(save):
    path = save(GOOD, GOOD, GOOD)
    with open_pages(path, "a.pdf") as opened:
        opened._reader._process.kill()
        with pytest.raises(PageError, match="SIGKILL"):
            opened.read(0)
        path.unlink()
        for index in (1, 2):
            with pytest.raises(PageError, match=rf"page {index + 1}, cannot be read: No such file"):
                opened.read(index)


def test_a_read_is_ended_by_another_thread(save):
    with open_pages(save(pdfs.ENDLESS)) as opened:
        threading.Timer(0.2, opened.stop).start()
        start = time.monotonic()
        for _ in range(2):
            with pytest.raises(EngineClosedError, match=r"^in\.pdf, page 1, was not read"):
                opened.read(0)
        assert time.monotonic() - start < 10


def test_a_reader_serves_file_after_file_and_threads_have_one_each(save, monkeypatch):
    path = save(GOOD)
    monkeypatch.setattr(pages, "_MOST_IDLE", 1)
    with open_pages(path) as first, open_pages(path) as second:
        taken = {each._reader._process.pid for each in (first, second)}
        assert first.read(0).text == second.read(0).text == "good"
    with open_pages(path) as third:
        pid = third._reader._process.pid
    assert len(taken) == 2
    assert pid in taken
    assert [each._process.pid for each in pages._idle[os.getpid()]] == [pid]


def test_a_fork_has_readers_that_its_parent_does_not_use(save, python):
    assert python(f"""if True:
        import os
        from shared_engine.images.pages import open_pages
        def read():
            with open_pages({str(save(GOOD))!r}) as opened:
                return opened.read(0).text, opened._reader._process.pid
        _, first = read()
        if child := os.fork():
            assert os.waitpid(child, 0)[1] == 0
            assert read() == ("good", first)
            print("done")
        else:
            text, second = read()
            os._exit(0 if text == "good" and second != first else 1)
    """).split() == ["done"]


def test_a_reader_that_cannot_start_says_so(save, monkeypatch, capfd):
    path = save(GOOD)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(pages.EngineError, match=r"did not start \(exit code 1\)"):
        open_pages(path)
    assert "No module named" in capfd.readouterr().err
