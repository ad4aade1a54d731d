"""Pictures and pages of PDFs as rows."""

from __future__ import annotations

import base64
import io
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shared_engine.bulk import EmbedBatch, fragment
from shared_engine.bulk.job import Job
from shared_engine.bulk.run import begin, run_local
from shared_engine.errors import ConfigurationError
from shared_engine.images import pages
from tests.support import pdfs
from tests.support.image_files import write_tiff
from tests.support.nim import Nim

VL = "nvidia/llama-nemotron-embed-vl-1b-v2"


def picture(shade: int) -> bytes:
    data = io.BytesIO()
    Image.new("RGB", (32, 24), (shade, 10, 10)).save(data, "PNG")
    return data.getvalue()


def write_pdf(path: Path, texts: list[str], heights: list[int] | None = None) -> None:
    """A page with a line of text for each."""
    pages = [
        pdfs.Leaf(f"BT /F1 24 Tf 20 100 Td ({text}) Tj ET", f"0 0 300 {height}")
        for text, height in zip(texts, heights or [200] * len(texts), strict=True)
    ]
    path.write_bytes(pdfs.write(*pages))


@pytest.fixture
def run(tmp_path):
    nim = Nim(models=(VL,))

    def do(source: Path, **more):
        with nim.embedder(model=VL) as embedder:
            job = Job((str(source),), str(tmp_path / "out"), embedder.options, **more)
            summary = run_local(job, embedder, show_progress=False)
        table = pq.read_table(tmp_path / "out" / "vectors").sort_by("id")
        errors = tmp_path / "out" / "errors.parquet"
        return summary, table, pq.read_table(errors).to_pylist() if errors.exists() else []

    do.nim = nim
    return do


def test_a_folder_of_pictures(run, tmp_path):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    for n in range(40):
        (tmp_path / "in" / "sub" / f"{n:02}.png").write_bytes(picture(n))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no picture")
    (tmp_path / "in" / "notes.txt").write_text("not looked at")
    summary, table, errors = run(tmp_path / "in", columns=("path",), rows_per_file=18)
    assert (summary.rows, summary.failed) == (40, 1)
    assert table["id"].to_pylist() == [f"sub/{n:02}.png" for n in range(40)]
    assert table["path"][0].as_py() == str(tmp_path / "in" / "sub" / "00.png")
    assert [(e["id"], e["kind"]) for e in errors] == [("broken.jpg", "ImageError")]
    assert run(tmp_path / "in", columns=("path",), rows_per_file=18)[0].skipped == 40
    (tmp_path / "in" / "sub" / "39.png").write_bytes(picture(99) + b" ")
    with pytest.raises(ConfigurationError, match="changed since"):
        run(tmp_path / "in", columns=("path",), rows_per_file=18)


def test_a_link_to_no_file_costs_its_row_only(run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(picture(1))
    for name, target in (
        ("gone.png", "nowhere"),
        ("gone.tif", "nowhere"),
        ("loop.png", "loop.png"),
    ):
        (tmp_path / "in" / name).symlink_to(target)
    summary, table, _ = run(tmp_path / "in")
    assert (summary.failed, summary.unread) == (3, ())
    assert table["id"].to_pylist() == ["a.png"]


def test_the_name_of_a_folder_of_pictures_may_look_like_that_of_a_file(run, tmp_path):
    (tmp_path / "scan.pdf").mkdir()
    (tmp_path / "scan.pdf" / "1.png").write_bytes(picture(1))
    summary, table, errors = run(tmp_path / "scan.pdf")
    assert (summary.rows, errors) == (1, [])
    assert table["id"].to_pylist() == ["1.png"]


@pytest.mark.parametrize("layer", ["picture", "text", "both"])
def test_a_row_per_page_of_a_pdf(layer, run, tmp_path):
    write_pdf(tmp_path / "a.pdf", [f"page number {n}" for n in range(5)])
    summary, table, errors = run(tmp_path / "a.pdf", pdf=layer, columns=("page",), rows_per_file=2)
    assert (summary.rows, errors) == (5, [])
    assert table["id"].to_pylist() == [f"a.pdf#page={n}" for n in range(1, 6)]
    assert table["page"].to_pylist() == [1, 2, 3, 4, 5]
    sent = [item for body in run.nim.bodies for item in body["input"] if item != "?"]
    assert any("page number 3" in item for item in sent) == (layer != "picture")
    assert any("data:image" in item for item in sent) == (layer != "text")


def test_a_pdf_that_cannot_be_read_and_a_page_without_text_are_reported(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "broken.pdf").write_bytes(b"%PDF-1.4 nothing")
    (folder / "dynamic.pdf").write_bytes(pdfs.xfa(is_dynamic=True))
    (folder / "locked.pdf").write_bytes(pdfs.lock(pdfs.scan("one")))
    write_pdf(folder / "good.pdf", ["", "words"])
    summary, table, errors = run(folder, pdf="text")
    assert (summary.rows, summary.failed, len(summary.unread)) == (1, 1, 3)
    assert not summary.is_complete
    assert table["id"].to_pylist() == ["good.pdf#page=2"]
    assert [(e["id"], e["source"], e["index"]) for e in errors] == [
        ("good.pdf#page=1", "good.pdf", 0),
        (None, "broken.pdf", None),
        (None, "dynamic.pdf", None),
        (None, "locked.pdf", None),
    ]
    reasons = [
        "has no text",
        "is a broken PDF",
        "is a dynamic XFA form",
        "is locked with a password",
    ]
    assert all(reason in e["reason"] for reason, e in zip(reasons, errors, strict=True))
    (folder / "broken.pdf").unlink()  # was copied again
    write_pdf(folder / "broken.pdf", ["whole"])
    summary, table, errors = run(folder, pdf="text")
    assert table["id"].to_pylist() == ["broken.pdf#page=1", "good.pdf#page=2"]
    assert len(errors) == 3


def test_pages_of_a_tiff_are_rows_as_those_of_a_pdf(run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(picture(1))
    (folder / "one.tif").write_bytes(write_tiff(0))
    (folder / "broken.tif").write_bytes(b"II*\0")
    pages = [Image.new("L", (30, 40), shade) for shade in (10, 90, 170)]
    pages[0].save(folder / "scan.TIFF", save_all=True, append_images=pages[1:])
    summary, table, errors = run(folder, columns=("path", "page"), pdf="text")  # is for PDFs
    assert (summary.rows, summary.failed) == (5, 1)
    assert table["id"].to_pylist() == ["a.png", "one.tif"] + [
        f"scan.TIFF#page={number}" for number in (1, 2, 3)
    ]
    assert table["page"].to_pylist() == [1, 1, 1, 2, 3]
    assert set(table["path"][2:].to_pylist()) == {str(folder / "scan.TIFF")}
    assert len({tuple(row) for row in table["vector"][2:].to_pylist()}) == 3
    assert [e["id"] for e in errors] == ["broken.tif"]


def test_a_very_long_page_is_several_rows(run, tmp_path):
    write_pdf(tmp_path / "a.pdf", ["top", "short"], heights=[3_000, 200])
    summary, table, errors = run(tmp_path / "a.pdf", columns=("page",), rows_per_file=2)
    assert (summary.rows, errors) == (4, [])
    assert table["id"].to_pylist() == [
        *(f"a.pdf#page=1&part={part}" for part in (1, 2, 3)),
        "a.pdf#page=2",
    ]
    assert table["page"].to_pylist() == [1, 1, 1, 2]


def test_a_pdf_of_many_pages_is_opened_once(run, tmp_path, monkeypatch):
    opened = []

    class Counted(pages.Pages):
        def __init__(self, *given):
            opened.append(given)
            super().__init__(*given)

    write_pdf(tmp_path / "a.pdf", [f"page number {n}" for n in range(100)])
    monkeypatch.setattr(pages, "Pages", Counted)
    summary, _, _ = run(tmp_path / "a.pdf", rows_per_file=10, pdf="text")
    assert summary.rows == 100
    assert len(opened) == 1 + 1  # to count the pages, and to read them


def test_an_interrupt_ends_the_reading_of_a_page_that_never_ends(run, tmp_path):
    good = pdfs.Leaf("BT /F1 24 Tf 20 100 Td (good) Tj ET")
    (tmp_path / "a.pdf").write_bytes(pdfs.write(*[good] * 5, *[pdfs.ENDLESS] * 3))

    def interrupt():
        reader = pdfs.find_reader(os.getpid())
        os.kill(os.getpid(), signal.SIGINT)
        return reader

    with ThreadPoolExecutor(1) as pool:
        reader = pool.submit(interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "a.pdf", pdf="text", rows_per_file=5)
        assert not reader.result().is_running()
    assert not [each for each in threading.enumerate() if "fragment" in each.name]
    assert not list(tmp_path.glob("out/errors/a-*"))


@pytest.mark.parametrize("way", ["bytes", "path", "url", "base64", "lines", "struct"])
def test_a_column_of_images(way, run, tmp_path):
    (tmp_path / "pictures").mkdir()
    images = [picture(n) for n in range(5)]
    for n, data in enumerate(images):
        (tmp_path / "pictures" / f"{n}.png").write_bytes(data)
    columns = {
        "bytes": images,
        "path": [f"pictures/{n}.png" for n in range(5)],  # from the table's folder
        "url": ["data:image/png;base64," + base64.b64encode(data).decode() for data in images],
        "base64": [base64.b64encode(data).decode() for data in images],
        "lines": [base64.encodebytes(data).decode() for data in images],
        "struct": [{"bytes": data, "path": None} for data in images],
    }
    table = pa.table({"image": [*columns[way], None], "title": ["a", None, "c", "d", "e", None]})
    pq.write_table(table, tmp_path / "in.parquet")
    summary, _, errors = run(tmp_path / "in.parquet", image_column="image", text_column="title")
    assert (summary.rows, summary.failed) == (5, 1)
    assert errors[0]["reason"] == "has no text and no image"
    assert errors[0]["index"] == 5
    sent = [item for body in run.nim.bodies for item in body["input"] if "data:image" in item]
    assert len(sent) == 5
    assert sum(item.startswith("a ") or " a" in item[:3] for item in sent) <= 1


_BYTES = pa.array([b"a.png", b"caf\xe9.png", b"a.png", b"", b"a.png"], pa.binary())
_NOT_UTF_8 = pa.Array.from_buffers(pa.string(), 5, _BYTES.buffers())


@pytest.mark.parametrize(
    ("images", "bad"),
    [
        (_NOT_UTF_8, {1: "column 'image' holds a value that is no string: it is not UTF-8"}),
        (pa.StructArray.from_arrays([_NOT_UTF_8], ["path"]), {1: "column 'image' holds a value"}),
        ([picture(0), b"", b"no picture", None, picture(1)], {2: "cannot be used"}),
        ([{"bytes": picture(n), "path": None} for n in range(5)], {}),
        ([{"bytes": b"", "path": "a.png"}] * 5, {}),
        ([""] * 5, {4: "neither text nor image|no text and no image"}),
    ],
    ids=["path", "path in a struct", "bytes", "struct", "struct of a path", "nothing"],
)
def test_a_batch_for_ray_takes_images_as_a_job_does(images, bad, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(picture(7))
    images = images if isinstance(images, pa.Array) else pa.array(images)
    table = pa.table({"image": images, "title": ["a", "b", "c", "d", " "]})
    pq.write_table(table, tmp_path / "in.parquet")
    _, rows, errors = run(tmp_path / "in.parquet", image_column="image", text_column="title")
    options = run.nim.embedder(model=VL).options
    batch = EmbedBatch("title", "image", options=options, error_column="error")(table)
    reasons = {n: why for n, why in enumerate(batch["error"].to_pylist()) if why}
    for found in (reasons, {row["index"]: row["reason"] for row in errors}):
        assert found.keys() == bad.keys()
        assert all(re.search(bad[row], found[row]) for row in bad), found
    assert [v for v in batch["vector"].to_pylist() if v] == rows["vector"].to_pylist()


@pytest.mark.parametrize(("size", "windows"), [(10_000, [8]), (400_000, [2] * 4), (10**9, [8])])
def test_large_images_of_a_table_are_read_a_few_at_a_time(
    size, windows, run, tmp_path, monkeypatch
):
    """Row groups of 3 rows, and one that is empty; the size is that of a row, or of all."""
    monkeypatch.setattr(fragment, "_IMAGE_BYTES", 1_000_000)
    images = [picture(n) + bytes(min(size, 500_000)) for n in range(8)]
    if size == 10**9:  # each row has the same, which Parquet holds once
        images = [images[0]] * 8
    table = pa.table({"image": images})
    with pq.ParquetWriter(tmp_path / "in.parquet", table.schema) as writer:
        writer.write_table(table.slice(0, 0))
        writer.write_table(table, row_group_size=3 if size < 10**9 else 8)
    found = []
    with run.nim.embedder(model=VL) as embedder:
        source = str(tmp_path / "in.parquet")
        job = Job((source,), str(tmp_path / "out"), embedder.options, image_column="image")
        with begin(job) as work:
            fragment.embed_fragment(
                job, embedder, *work.missing, on_rows=lambda rows, *_: found.append(rows)
            )
    assert found == windows


@pytest.mark.parametrize(
    ("column", "value"),
    [("text_column", "name"), ("image_column", "name"), ("id_column", "name"), ("quotes", False)],
)
def test_columns_of_tables_are_refused_for_images(column, value, run, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "1.png").write_bytes(picture(1))
    with pytest.raises(ConfigurationError, match=f"{column}: only for tables"):
        run(tmp_path / "in", **{column: value})


@pytest.mark.parametrize(
    ("value", "reason"),
    [("no/such.png", "neither an existing file nor"), ("photo", "its base64 is invalid")],
)
def test_an_image_that_is_neither_a_file_nor_base64_is_a_bad_row(
    value, reason, run, tmp_path, monkeypatch
):
    """Nor is it a file in the folder where the command runs."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "photo").write_bytes(picture(1))
    monkeypatch.chdir(tmp_path / "other")
    pq.write_table(pa.table({"image": [value]}), tmp_path / "in.parquet")
    summary, _, errors = run(tmp_path / "in.parquet", image_column="image")
    assert summary.failed == 1
    assert reason in errors[0]["reason"]


def test_a_folder_of_pictures_that_lost_its_times_goes_on_when_told(run, tmp_path):
    (tmp_path / "in").mkdir()
    for n in range(3):
        (tmp_path / "in" / f"{n}.png").write_bytes(picture(n))
    assert run(tmp_path / "in")[0].rows == 3
    os.utime(tmp_path / "in" / "1.png", ns=(1, 1))
    with pytest.raises(ConfigurationError, match="--trust-sizes"):
        run(tmp_path / "in")
    assert run(tmp_path / "in", trust_sizes=True)[0].skipped == 3
    (tmp_path / "in" / "1.png").write_bytes(b"another size")
    with pytest.raises(ConfigurationError, match="changed since"):
        run(tmp_path / "in", trust_sizes=True)
