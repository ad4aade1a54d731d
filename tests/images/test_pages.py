"""The reader of pages: forms, texts, very long pages, images and folders."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image

from shared_engine import PageError
from shared_engine.images import page_reader, pages
from shared_engine.images.pages import PIXELS, Place, open_pages, walk
from tests.support import pdfs
from tests.support.pdfs import Leaf

WIDGET = "/Subtype/Widget/Rect[20 {y} 280 {top}]"


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Write a PDF of leaves, or a file as it is; return its path."""

    def save(*content: Leaf | bytes) -> Path:
        path = tmp_path / "file"
        first, *_ = content
        path.write_bytes(first if isinstance(first, bytes) else pdfs.write(*content))
        return path

    return save


def field(entries: str, y: int = 100) -> str:
    return f"{WIDGET.format(y=y, top=y + 20)}{entries}"


def text(size: int, x: int, y: int, words: str) -> str:
    return f"BT /F1 {size} Tf {x} {y} Td ({words}) Tj ET "


def ink(picture: Image.Image | None, y: int, height: int = 200) -> bool:
    """Tell whether something is drawn between y and y + 20 points of a page."""
    assert picture is not None
    scale = picture.height / height
    rows = np.asarray(picture.convert("L"))[
        int((height - y - 20) * scale) : int((height - y) * scale)
    ]
    return bool((rows < 128).any())


# Forms


@pytest.mark.parametrize(
    ("entries", "shown"),
    [
        ("/FT/Tx/T(your.name)/V(A. Example)", "name: A. Example"),
        ("/FT/Tx/T(f1[0])/TU(Your name)/V(A. Example)", "Your name: A. Example"),
        ("/FT/Tx/T(name)/V<FEFF00C4>", "name: Ä"),
        ("/FT/Tx/T(lines)/Ff 4096/V(one\\rtwo)", "lines: one\ntwo"),
        ("/FT/Tx/T(boxes)/Ff 16777216/MaxLen 6/V(abcdef)", "boxes: abcdef"),
        ("/FT/Ch/T(land)/Ff 131072/Opt[[(de)(Germany)][(fr)(France)]]/V(de)", "land: Germany"),
        ("/FT/Ch/T(land)/Ff 393216/Opt[(Germany)(France)]/V(Peru)", "land: Peru"),
        ("/FT/Ch/T(lands)/Ff 2097152/Opt[(Peru)(Chad)(Oman)]/V[(Peru)(Oman)]", "lands: Peru, Oman"),
    ],
)
def test_a_field_without_an_appearance_is_drawn_and_in_the_text(
    save: Callable[..., Path], entries: str, shown: str
) -> None:
    path = save(Leaf(text(12, 20, 150, "Request"), fields=(field(entries),)))
    with open_pages(path) as opened:
        _, picture, found = opened.read(0)
    assert found == f"Request\n{shown}"
    assert ink(picture, 100)
    assert not ink(picture, 20)


def test_boxes_are_in_the_text_if_they_are_ticked(save: Callable[..., Path]) -> None:
    states = "/AP<</N<</Yes 99 0 R>>>>"
    boxes = (
        field(f"/FT/Btn/T(member)/V/Yes/AS/Yes{states}"),
        field(f"/FT/Btn/T(retired)/V/Off/AS/Off{states}", 60),
    )
    with open_pages(save(Leaf("", fields=boxes))) as opened:
        assert opened.read(0, "text").text == "member: Yes"


def test_what_a_page_does_not_show_is_not_in_its_text(save: Callable[..., Path]) -> None:
    fields = (
        field("/FT/Tx/T(hidden)/V(hidden)/F 2"),
        field("/FT/Tx/T(elsewhere)/V(elsewhere)/F 32"),
        field("/FT/Tx/T(secret)/Ff 8192/V(secret)"),
        field("/FT/Tx/T(outside)/V(outside)", 900),
        field("/FT/Tx/T(empty)/V( )"),
        field("/FT/Btn/Ff 65536/T(button)"),
    )
    content = text(12, 20, 150, "seen") + text(12, 20, 900, "outside")
    with open_pages(save(Leaf(content, fields=fields))) as opened:
        assert opened.read(0, "text").text == "seen"


def test_a_note_typed_onto_a_page_is_in_its_text(save: Callable[..., Path]) -> None:
    note = "/Subtype/FreeText/Contents(A. Example)/DA(/F1 12 Tf)/Rect[20 100 200 120]"
    with open_pages(save(pdfs.write(Leaf(text(12, 20, 150, "Name"), fields=(note,))))) as opened:
        assert opened.read(0, "text").text == "Name\nA. Example"


def test_a_form_that_pdfium_cannot_draw_is_refused_by_name(
    save: Callable[..., Path], capfd: pytest.CaptureFixture[str]
) -> None:
    with (
        pytest.raises(PageError, match=r"^tax\.pdf is a dynamic XFA form.*save"),
        open_pages(save(pdfs.xfa(is_dynamic=True)), "tax.pdf"),
    ):
        pytest.fail("it must not open")
    with open_pages(save(pdfs.xfa(is_dynamic=False))) as opened:
        assert "name: A. Example" in opened.read(0).text
    assert capfd.readouterr().err == ""


# Texts


def test_a_word_hyphenated_at_a_line_end_is_joined_and_controls_are_removed(
    save: Callable[..., Path],
) -> None:
    content = (
        "BT /F1 12 Tf 14 TL 20 150 Td (hard to com-) Tj T* (pile, \001a\177 long-term) Tj "
        "T* (aim) Tj ET"
    )
    with open_pages(save(Leaf(content))) as opened:
        assert opened.read(0, "text").text == "hard to compile, a long-term\naim"


# Very long pages


@pytest.mark.parametrize(
    ("turn", "box", "matrix"),
    [
        (0, "-100 50 100 6050", "1 0 0 1 -100 50"),
        (90, "0 0 6000 200", "0 1 -1 0 6000 0"),
        (180, "0 0 200 6000", "-1 0 0 -1 200 6000"),
        (270, "0 0 6000 200", "0 -1 1 0 0 200"),
    ],
)
def test_a_receipt_is_cut_into_pages_that_show_all_of_it(
    save: Callable[..., Path], turn: int, box: str, matrix: str
) -> None:
    lines = [f"item {number:03}" for number in range(200)]
    content = "".join(text(12, 20, 5_980 - 30 * row, line) for row, line in enumerate(lines))
    receipt = Leaf(f"{matrix} cm {content}", box, more=f"/Rotate {turn}")
    with open_pages(save(receipt, Leaf("", "0 0 595 842"))) as opened:
        assert opened.places == [*(Place(1, part, 7) for part in range(1, 8)), Place(2)]
        assert [str(place) for place in opened.places[6:]] == ["page 1, part 7", "page 2"]
        parts = [opened.read(index) for index in range(7)]
    found = [part.text.split("\n") for part in parts]
    assert [line for part in found for line in part] == lines
    for part, shown in zip(parts, found, strict=True):
        assert part.picture is not None
        assert PIXELS - 1 <= part.picture.height <= PIXELS
        assert part.picture.width > 350
        drawn = (np.asarray(part.picture.convert("L")) < 128).any(axis=1)
        begun = (np.diff(drawn.astype(int)) == 1).sum()
        assert len(shown) <= begun <= len(shown) + 2  # and of its neighbours what a line is high


@pytest.mark.parametrize("box", ["0 0 595 842", "0 0 842 595", "0 0 227 1600", "0 0 2000000000 9"])
def test_other_pages_are_whole(save: Callable[..., Path], box: str) -> None:
    """One of an absurd size too."""
    with open_pages(save(Leaf("", box))) as opened:
        assert opened.places == [Place(1)]


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("is_turned", [False, True])
def test_a_very_long_image_is_cut_too(tmp_path: Path, kind: str, is_turned: bool) -> None:
    grey = np.linspace(0, 255, 9_000).astype(np.uint8)
    picture = Image.fromarray(np.tile(grey[:, None], (1, 300)))
    if is_turned:  # to be shown turned back, by 90 degrees to the right
        picture = picture.transpose(Image.Transpose.ROTATE_90)
        picture.getexif()[ExifTags.Base.Orientation] = 6
    path = tmp_path / "long"
    picture.save(path, kind, exif=picture.getexif())
    with open_pages(path) as opened:
        assert opened.places == [Place(1, part, 5) for part in range(1, 6)]
        parts = [np.asarray(opened.read(index).picture)[:, 0, 0].astype(int) for index in range(5)]
    assert (parts[0][0], parts[-1][-1]) == (0, 255)
    for above, below in pairwise(parts):
        assert 0 <= above[-1] - below[0] <= 2  # they overlap by a line


# Files


def test_a_tiff_has_as_many_pages_as_were_scanned(tmp_path: Path) -> None:
    path = tmp_path / "scan.tif"
    scans = [Image.new("I;16", (30, 40), 40_000), Image.new("RGB", (50, 40), "red")]
    scans[0].save(path, save_all=True, append_images=scans[1:])
    with open_pages(path) as opened:
        assert opened.places == [Place(1), Place(2)]
        second, first = opened.read(1), opened.read(0)
    assert (first.picture and first.picture.getpixel((9, 9))) == (156, 156, 156)
    assert (second.picture and second.picture.size) == (50, 40)
    assert first.text == second.text == ""


def test_a_broken_page_fails_alone(save: Callable[..., Path]) -> None:
    good = pdfs.write(Leaf(text(12, 20, 150, "one")), Leaf(text(12, 20, 150, "two")))
    path = save(good.replace(b"3 0 obj <</Type/Page/", b"3 0 obj <</Type/Nothing/"))
    with open_pages(path, "a.pdf") as opened:
        with pytest.raises(
            PageError, match=r"^a\.pdf, page 1, cannot be read: .*; .*save it again"
        ):
            opened.read(0)
        assert opened.read(1).text == "two"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is empty"),
        (b"Dear Sir", "is neither a PDF nor a picture that can be read: it is not a PNG"),
        (b"<!DOCTYPE html><title>Log in", "is neither .*: it is a web page"),
        (b"\0\0\0\x18ftypheic", "is neither .*: it is a HEIC, which is not supported"),
        (b"II*\0" + bytes(30), "is neither .*: its header is broken"),
        (b"%PDF-1.7 nothing", "is a broken PDF"),
        (pdfs.without_pages(), "is a broken PDF.* or one without pages"),
        (pdfs.lock(pdfs.scan("one")), "is locked with a password"),
        (pdfs.scan("one", "two", "three"), "has over 2 pages"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_what_to_do(
    save: Callable[..., Path], content: bytes, reason: str
) -> None:
    with (
        pytest.raises(PageError, match=f"^a {reason}.*; .*(save|copy)") as caught,
        open_pages(save(content), "a", max_pages=2),
    ):
        pytest.fail("it must not open")
    assert not re.search("/|<", str(caught.value)), "a path of this machine, or an object"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(PageError, match=r"^none\.pdf cannot be read: No such file"),
        open_pages(tmp_path / "none.pdf"),
    ):
        pytest.fail("it must not open")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("in/own/a.csv", "elsewhere/b.csv"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "in" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in" / "own" / "up").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "twice").symlink_to(tmp_path / "elsewhere")
    found = [Path(path).relative_to(tmp_path).as_posix() for path in pages.walk(tmp_path / "in")]
    assert found == ["in/linked/b.csv", "in/own/a.csv"]


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    for name in ("a/b.pdf", "a/.c.pdf", ".git/d.pdf", "_e/f.pdf", "g.pdf", ".DS_Store"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    names = [Path(path).relative_to(tmp_path).as_posix() for path in walk(tmp_path)]
    assert names == ["g.pdf", "_e/f.pdf", "a/b.pdf"]
    shown = [Path(path).name for path in walk(tmp_path, lambda name: name[0] in "._")]
    assert shown == ["g.pdf", "b.pdf"]


def test_a_folder_that_cannot_be_read_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    (tmp_path / "c.pdf").touch()
    found = walk(tmp_path)
    assert next(found) == str(tmp_path / "c.pdf")
    for name in ("a", "b"):
        (tmp_path / name).rmdir()  # also root cannot read it now
    assert not list(found)
    (message,) = caplog.messages
    assert (
        message == f"2 folders cannot be read, the first: {tmp_path}/a (No such file or directory)"
    )


def test_its_examples_hold() -> None:
    found = doctest.testmod(page_reader)
    assert found.attempted
    assert not found.failed


# Where a passage is


def rub_out(opened: pages.Pages, index: int, passage: str) -> np.ndarray:
    """Return the brightness of a page's picture after the areas of a passage are made white."""
    picture = opened.read(index).picture
    assert picture is not None
    page = np.array(picture.convert("L"))
    size = np.array([picture.width, picture.height] * 2)
    for area in opened.find(index, passage):
        left, top, right, bottom = (np.array(area) * size).astype(int)
        page[top - 3 : bottom + 3, left - 3 : right + 3] = 255
    return page


def test_the_areas_of_a_passage_cover_it_and_nothing_else(save: Callable[..., Path]) -> None:
    lines = ("A red apple", "falls on the", "green grass")
    content = "".join(text(20, 20, 150 - 50 * row, line) for row, line in enumerate(lines))
    turned = Leaf(content, more="/Rotate 90")
    cropped = Leaf(content, more="/CropBox[10 30 300 200]")
    long = Leaf("".join(text(40, 20, y, f"Line {y}") for y in range(50, 3000, 70)), "0 0 300 3000")
    with open_pages(save(Leaf(content), turned, cropped, long, Leaf(""))) as opened:
        assert len(opened) == 7
        for index in range(6):
            whole = opened.read(index, "text").text
            end = whole.rindex("\n")
            assert (rub_out(opened, index, "") < 128).any()
            assert (rub_out(opened, index, whole[:end]) < 128).any()
            rest = rub_out(opened, index, whole)
            edge = 60 if index > 2 else 0  # a part shows lines that belong to its neighbours
            assert not (rest[edge : len(rest) - edge] < 128).any()
        assert opened.find(6, "apple") == opened.find(0, "pear") == opened.find(0, " \n") == []


def test_a_word_that_a_hyphen_divides_is_found(save: Callable[..., Path]) -> None:
    content = text(20, 20, 150, "the straw-") + text(20, 20, 120, "berry is red")
    encoding = "/Encoding<</Differences[45/uni2010]>>"  # what browsers print for a soft hyphen
    font = f"/Resources<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica{encoding}>>>>>>"
    with open_pages(save(Leaf(content), Leaf(content, more=font))) as opened:
        for index in range(2):
            assert opened.read(index, "text").text == "the strawberry is red"
            assert not (rub_out(opened, index, "the strawberry is red") < 128).any()


def test_a_picture_of_unsupported_pixels_is_not_called_broken(tmp_path: Path) -> None:
    Image.new("F", (9, 9)).save(tmp_path / "a.tif")
    with open_pages(tmp_path / "a.tif") as opened, pytest.raises(PageError) as caught:
        opened.read(0)
    assert "convert it to 8-bit grey or RGB" in str(caught.value)
    assert "broken" not in str(caught.value)


def test_an_image_file_shows_no_passage(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "file", "PNG")
    with open_pages(tmp_path / "file") as opened:
        assert opened.find(0, "apple") == []
