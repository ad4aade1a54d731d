"""The web app without a browser: what is kept, refused, found and told.

The weights are random, so nothing is said of what words find; a page is still nearest to itself.
"""

from __future__ import annotations

import io
import os
import re
import socket
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import handbook
import httpx
import pages.app
import pages.index
import pages.jobs
import pytest
import uvicorn
from chat import Server
from pages.__main__ import find_files, send_first
from pages.answer import Answerer
from pages.app import create_app
from pages.files import Files
from pages.index import KINDS, Index
from pages.keywords import Keywords
from PIL import Image
from relevance import NO_ANSWER
from starlette.testclient import TestClient

from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import EmbeddingInput, Reranker, RerankOptions
from tests.support import pdfs
from tests.support.chat_server import serve_chat
from tests.support.image_files import write_tiff
from tests.support.rerankers import build_reranker, build_vl_reranker
from tests.support.vl_checkpoints import VLShape, build_vl_checkpoint

ORIGIN = "http://localhost"


class App:
    """The app on a folder, as a browser meets it."""

    def __init__(self, folder: Path, model: NeMoRetrieverEmbedding, **options: Any) -> None:
        options = {"model": "tiny", "is_trained": True, "max_pages": 20} | options
        self.files = Files(folder / "files")
        self.index = Index(folder / "index", model)
        self.app = create_app(self.files, self.index, **options)
        self.jobs = self.app.state.jobs
        self.client = TestClient(self.app, ORIGIN, headers={"Origin": ORIGIN})

    def send(self, *files: tuple[str, bytes], to: str = "/files", field: str = "files") -> str:
        """Send files as a form does; return the page that is shown then, when all is done."""
        sent = [(field, file) for file in files]
        reply = self.client.post(to, files=sent)
        self.wait()
        return self.client.get("/").text if to == "/files" else reply.text

    def wait(self) -> None:
        deadline = time.monotonic() + 60
        while any(job.is_active for job in self.jobs):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def ids(self, kind: str) -> list[str]:
        found: list[str] = self.index._collections[kind].get(include=[])["ids"]
        return found

    def look(self, address: str, **params: str) -> str:
        return self.client.get(address, params=params).text


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> NeMoRetrieverEmbedding:
    """One that sees tiles of 64 x 64 pixels."""
    folder = build_vl_checkpoint(tmp_path_factory.mktemp("vl") / "vl", VLShape(image_size=64))
    return NeMoRetrieverEmbedding(model=str(folder), device="cpu", truncate="END")


@pytest.fixture(scope="module")
def multimodal_reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    folder = build_vl_reranker(tmp_path_factory.mktemp("rerank") / "vl", VLShape(image_size=64))
    return Reranker(RerankOptions(model=str(folder), device="cpu", truncate="END"))


@pytest.fixture(scope="module")
def text_reranker(tmp_path_factory: pytest.TempPathFactory) -> Reranker:
    folder = build_reranker(tmp_path_factory.mktemp("rerank") / "text")
    return Reranker(RerankOptions(model=str(folder), device="cpu", truncate="END"))


@pytest.fixture
def start(tmp_path: Path, model: NeMoRetrieverEmbedding) -> Callable[..., Any]:
    """Start the app on the test's own folder; the end of the context stops it."""

    @contextmanager
    def start(**options: Any) -> Iterator[App]:
        app = App(tmp_path / "web", model, **options)
        with app.client:
            yield app

    return start


@pytest.fixture
def app(start: Callable[..., Any]) -> Iterator[App]:
    with start() as app:
        yield app


@pytest.fixture(scope="module")
def two_pages(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A PDF of two pages of the handbook."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(handbook, "CHAPTERS", {"two": ("wave", "uuid")})
        (path,) = handbook.write(tmp_path_factory.mktemp("two"))
    return path.read_bytes()


def picture(kind: str = "PNG", size: tuple[int, int] = (40, 60), **options: Any) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", size, "navy").save(out, kind, **options)
    return out.getvalue()


def found_pages(html: str) -> list[tuple[str, int]]:
    """Return the pages in the results, best first."""
    results = html.partition('id="results"')[2].partition("</section>")[0]
    found = re.findall(r'<a href="/files/(\w+)/(\d+)[^"]*">\s*<img', results)
    return [(file, int(number)) for file, number in found]


def test_a_file_is_kept_as_text_picture_and_both_and_outlives_a_restart(
    start: Callable[..., Any], two_pages: bytes
) -> None:
    with start() as app:
        home = app.send(("two.pdf", two_pages))
        (file,) = app.files
        ids = {f"{file.id}-1", f"{file.id}-2"}
        assert set(app.ids("picture")) == set(app.ids("both")) == ids
        assert {id_.partition("#")[0] for id_ in app.ids("text")} == ids
    with start() as app:
        assert app.look("/") == home
        assert "two.pdf, page 2" in home
        page = app.look(f"/files/{file.id}/2")
        assert "UUID objects" in page
        for kind, media in {"png": "image/png", "webp": "image/webp"}.items():
            reply = app.client.get(f"/files/{file.id}/2.{kind}")
            assert reply.headers["content-type"] == media
        assert len(found_pages(app.look("/", q="uuid", kind="text"))) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_searched_by_words_and_by_page(app: App, two_pages: bytes, kind: str) -> None:
    app.send(("two.pdf", two_pages))
    (file,) = app.files
    html = app.look("/", q="sound", kind=kind)
    assert sorted(found_pages(html)) == [(file.id, 1), (file.id, 2)]
    assert f'kind={kind}#results" aria-current="true"' in html
    assert found_pages(app.look("/", like=f"{file.id}-1", kind=kind)) == [(file.id, 2)]


def leaf(*lines: str) -> pdfs.Leaf:
    """Return a page with these lines of text."""
    return pdfs.Leaf(
        "".join(
            f"BT /F1 9 Tf 9 {180 - 12 * row} Td ({line}) Tj ET " for row, line in enumerate(lines)
        )
    )


def test_contents_and_page_numbers_are_no_passages(app: App) -> None:
    dots = ". . . . . . . ."
    contents = leaf("Contents", f"Apples {dots} 2", f"Pears {dots} 3", f"Plums {dots} 9", "iv", ".")
    prices = leaf(f"Apples {dots} 3", f"Pears {dots} 1", f"Plums {dots} 2", "17")
    app.send(("fruit.pdf", pdfs.write(contents, prices, leaf(dots, "12"))))
    stored = app.index._collections["text"].get(include=["documents"])["documents"]
    assert {text for text in stored if "Contents" in text} == {"Contents"}
    assert all(re.search("[A-Za-z]{2}", text) for text in stored)
    assert any("Pears" in text for text in stored), "the lines of a price list stay"


def test_pages_are_found_by_their_words_too_and_the_passage_is_marked(app: App) -> None:
    fruit = [leaf("The list of fruit", f"The {name} is on this page") for name in ("apple", "pear")]
    others = [leaf(f"Nothing of note, {n}") for n in range(9)]
    app.send(("fruit.pdf", pdfs.write(*others, *fruit)))
    (file,) = app.files
    html = app.look("/", q="where is a pear", kind="text")
    assert found_pages(html)[0] == (file.id, 11)
    (address,) = set(re.findall(rf'"(/files/{file.id}/11\?[^"]+)"', html))
    page = app.client.get(address.replace("&amp;", "&")).text
    assert re.search('<mark id="passage">[^<]*pear[^<]*</mark>', page)
    assert page.count('<rect x="3.') == 2  # the lines on the picture
    assert "<rect" not in app.look(f"/files/{file.id}/11")
    assert "Back to the results" in page
    assert '/?q=where+is+a+pear&amp;kind=text#results"' in page
    for passage in ("9999999-99999999", "4-2", "-1-2", "x", "\u0661-\u0662"):
        reply = app.client.get(f"/files/{file.id}/11", params={"passage": passage})
        assert reply.status_code == 200
        assert "is on this page" in reply.text


def test_a_number_alone_on_its_line_is_found(app: App) -> None:
    app.send(("a.pdf", pdfs.write(leaf("Letter", "Greetings"), leaf("Invoice", "2024-0815", "17"))))
    hits = Keywords(app.files).search("2024-0815", 9)
    assert [page.number for page in hits.pages] == [2]
    assert hits.excerpt(hits.pages[0]) == "Invoice 2024-0815"


@pytest.mark.parametrize("kind", KINDS)
def test_no_answer_is_told_and_the_nearest_pages_are_there(
    start: Callable[..., Any], kind: str
) -> None:
    fruit = pdfs.write(*(leaf(f"The colour of fruit {n}") for n in range(3)))
    with serve_chat() as chat:
        answerer = Answerer(Server(chat.url, None, None))
        with start(min_score=1.1, answerer=answerer) as app:
            app.send(("fruit.pdf", fruit))
            html = app.look("/", q="recipe for onion soup", kind=kind)
            assert NO_ANSWER in html
            assert len(found_pages(html)) == 3
            assert "Answer from the first" not in html
            asked = {"q": "recipe for onion soup", "kind": kind}
            assert app.client.post("/answer", data=asked).status_code == 400
            by_its_words = app.look("/", q="which colour?", kind=kind)
            assert (NO_ANSWER in by_its_words) == (kind == "picture")
            (file,) = app.files
            assert NO_ANSWER not in app.look("/", like=f"{file.id}-1", kind=kind)
        assert not chat.asked
        with start(min_score=-1, answerer=answerer) as app:
            assert NO_ANSWER not in app.look("/", q="recipe for onion soup", kind=kind)


def test_the_bound_is_measured_with_questions_from_elsewhere(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    app.send(("fruit.pdf", pdfs.write(*(leaf(f"The colour of fruit {n}") for n in range(3)))))
    assert NO_ANSWER in app.look("/", q="recipe for onion soup", kind="text")
    monkeypatch.setattr(pages.index.Index, "measure", lambda *_: [-1.0, -0.9])
    assert NO_ANSWER not in app.look("/", q="recipe for onion soup", kind="text")


def test_a_photographed_page_finds_itself(app: App, two_pages: bytes) -> None:
    app.send(("two.pdf", two_pages))
    (file,) = app.files
    for number, page in file.pages.items():
        sent = ("photo.jpg", pdfs.rephotograph(page.picture))
        html = app.send(sent, to="/pictures", field="picture")
        assert found_pages(html)[0] == (file.id, number)
        assert "Found by photo.jpg" in html
        shown = re.search(r"/pictures/[\w-]+\.webp", html)
        assert shown
        assert app.client.get(shown[0]).headers["content-type"] == "image/webp"
    assert "Send it again" in app.look("/", picture="gone")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reads", ["text_reranker", "multimodal_reranker"])
def test_a_reranker_orders_what_words_find_and_both_orders_are_shown(
    start: Callable[..., Any], request: pytest.FixtureRequest, reads: str, kind: str
) -> None:
    reranker: Reranker = request.getfixturevalue(reads)
    leaves = [pdfs.Leaf(f"BT /F1 9 Tf 9 9 Td (item {word}) Tj ET") for word in "abcdefghijklmn"]
    with start() as app:
        app.send(("letters.pdf", pdfs.write(*leaves)))
        (file,) = app.files
        hits = app.index.search(app.index.embed_words("sound"), kind, 40)
        assert "reranked" not in app.look("/", q="sound", kind=kind)
    found = [file.pages[hit.number] for hit in hits]
    assert len(found) == 14
    documents = [EmbeddingInput(page.text) for page in found]
    if reads == "multimodal_reranker" and kind != "text":
        texts = [page.text if kind == "both" else None for page in found]
        documents = [
            EmbeddingInput(text, page.picture) for text, page in zip(texts, found, strict=True)
        ]
    order = [index for index, _ in reranker.rank("sound", documents)]
    assert order != list(range(14))
    with start(reranker=reranker) as app:
        html = app.look("/", q="sound", kind=kind)
        assert "14 pages found, then reranked" in html
        best = reranker.rank("sound", documents)[0][1]
        assert (NO_ANSWER in html) == (best < 0)
        assert found_pages(html) == [(file.id, found[index].number) for index in order[:12]]
        ranks = re.findall(r"was (\d+)(?:st|nd|rd|th), cosine", html)
        assert [int(rank) - 1 for rank in ranks] == order[:12]
        assert "reranked" not in app.look("/", like=f"{file.id}-1", kind=kind)


def test_a_search_in_nothing_is_reranked_as_well(
    start: Callable[..., Any], text_reranker: Reranker
) -> None:
    with start(reranker=text_reranker) as app:
        assert "Nothing is found" in app.look("/", q="sound", kind="text")


def test_an_untrained_model_says_what_words_cannot_find(
    start: Callable[..., Any], two_pages: bytes
) -> None:
    with start(is_trained=False) as app:
        app.send(("two.pdf", two_pages))
        html = app.look("/", q="sound", kind="picture")
        assert "the text layer is searched" in html
        assert 'kind=text#results" aria-current="true"' in html
        assert html.count("(not with this model)") == 2
        sent = ("photo.png", picture())
        assert "finds pictures only" in app.send(sent, to="/pictures", field="picture")


def test_nothing_is_embedded_twice(
    app: App, two_pages: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    embedded: list[int] = []
    add = Index.add
    monkeypatch.setattr(Index, "add", lambda *a: (embedded.append(len(a[1])), add(*a))[1])
    app.send(("two.pdf", two_pages))
    html = app.send(("C:\\\u202eother.pdf", two_pages), ("two.pdf", two_pages))
    assert embedded == [2]
    assert html.count("two.pdf is here already, byte for byte") == 2
    assert "You sent it as other.pdf." in html
    for number in re.findall(r"/messages/(\d+)/dismiss", html):
        app.client.post(f"/messages/{number}/dismiss")
    assert "here already" not in app.look("/")
    (file,) = app.files
    before = {kind: app.ids(kind) for kind in KINDS}
    app.index.add(list(file.pages.values()))
    assert before == {kind: app.ids(kind) for kind in KINDS}


def test_a_deleted_file_leaves_nothing(app: App, two_pages: bytes, tmp_path: Path) -> None:
    app.send(("two.pdf", two_pages), ("blue.png", picture()))
    file = next(file for file in app.files if file.name == "two.pdf")
    app.client.post(f"/files/{file.id}/delete")
    assert "two.pdf" not in app.look("/")
    assert app.client.get(f"/files/{file.id}").status_code == 404
    assert app.client.get(f"/files/{file.id}/1.png").status_code == 404
    (left,) = app.files
    assert app.ids("picture") == app.ids("both") == [f"{left.id}-1"]
    assert app.ids("text") == []
    assert [path.name for path in (tmp_path / "web/files").iterdir()] == [left.id]
    assert "has been deleted" in app.look("/", like=f"{file.id}-1")


def test_what_is_stopped_goes_on_at_the_next_start(
    start: Callable[..., Any], two_pages: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pages.jobs, "BATCH", 1)
    at_work, add = threading.Event(), Index.add

    def slowly(index: Index, new: Any) -> None:
        add(index, new)
        at_work.set()
        assert app.jobs._closing.wait(30)

    with monkeypatch.context() as patched, start() as app:
        patched.setattr(Index, "add", slowly)
        app.client.post("/files", files=[("files", ("two.pdf", two_pages))])
        assert at_work.wait(30)
        assert "0 of 2 pages" in app.look("/progress")
        app.jobs.close()
        assert not list(app.files)
    left = tmp_path / "web/files"
    (left / ".gone-0").mkdir()
    (left / ".new-0").mkdir()
    with start() as app:
        app.wait()
        (file,) = app.files
        assert list(file.pages) == [1, 2]
        assert sorted(app.ids("both")) == sorted(page.id for page in file.pages.values())
        assert [path.name for path in left.iterdir()] == [file.id]


@cache
def unusable() -> dict[str, tuple[bytes, str]]:
    good = pdfs.scan("one")
    return {
        "empty.pdf": (b"", "is empty"),
        "empty.png": (b"", "is empty"),
        "locked.pdf": (pdfs.lock(good), "locked with a password"),
        "broken.pdf": (b"%PDF-1.7\n" + b"?" * 4096, "is a broken PDF"),
        "half.pdf": (good[: len(good) // 3], "is a broken PDF"),
        "dynamic.pdf": (pdfs.xfa(is_dynamic=True), "is a dynamic XFA form"),
        "none.pdf": (pdfs.without_pages(), "one without pages"),
        "long.pdf": (pdfs.scan(*"abcdefghijklmnopqrstu"), "over 20 pages, the most"),
        "long.tiff": (write_tiff(*[0] * 100_000), "pages, the most for one file"),
        "text.pdf": (b"Dear Sir or Madam", "neither a PDF nor a picture"),
        "half.png": (picture(size=(900, 900))[:-200], "truncated"),
        "half.jpg": (picture("JPEG", (900, 900))[:200], "neither a PDF nor a picture"),
        "bomb.png": (pdfs.claim_size(picture(), 10_000, 8_001), "million pixels"),
        "page.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "neither a PDF nor a picture"),
        "what.zip": (b"PK\3\4" + bytes(100), "neither a PDF nor a picture"),
    }


@pytest.mark.parametrize("name", list(unusable()))
def test_an_unusable_file_says_what_is_wrong_and_leaves_nothing(
    app: App, name: str, tmp_path: Path
) -> None:
    content, told = unusable()[name]
    html = app.send((name, content))
    (message,) = re.findall(r'role="alert">\s*<p>(.*?)</p>', html, re.DOTALL)
    assert name in message
    assert told in message
    assert re.search(r"[Ss]end|Split|save", message), "what to do"
    assert "Traceback" not in html
    assert not list((tmp_path / "web/files").iterdir())
    if name != "long.pdf":  # of a PDF to search with, the first page counts
        html = app.send((name, content), to="/pictures", field="picture")
        assert told in html


def test_a_page_that_never_ends_is_left_out_and_told(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    pdfs.limit_pages(monkeypatch, seconds=0.5)
    html = app.send(("a.pdf", pdfs.write(leaf("good"), pdfs.ENDLESS, leaf("fine"))))
    (file,) = app.files
    assert sorted(file.pages) == [1, 3]
    (note,) = file.notes
    assert note.startswith("a.pdf, page 2, took more than 0.5 s of processor time, the limit")
    assert note in html


@pytest.mark.parametrize("way", ["cancel", "close"])
def test_a_page_that_never_ends_is_given_up(app: App, way: str, tmp_path: Path) -> None:
    sent = [("files", ("a.pdf", pdfs.write(pdfs.ENDLESS)))]
    app.client.post("/files", files=sent)
    reader = pdfs.find_reader(os.getpid())
    (job,) = app.jobs
    before = time.monotonic()
    if way == "cancel":
        app.client.post(f"/jobs/{job.id}/cancel")
        app.wait()
        assert not list(app.jobs)
    else:
        app.jobs.close()
    assert not reader.is_running()
    assert time.monotonic() - before < 20
    assert len(list((tmp_path / "web/files").iterdir())) == (way == "close")


@pytest.mark.parametrize(
    ("name", "content", "count"),
    [
        ("a.png", picture(), 1),
        ("a.jpg", picture("JPEG"), 1),
        ("a.webp", picture("WEBP"), 1),
        ("a.bmp", picture("BMP"), 1),
        ("a.gif", picture("GIF", save_all=True, append_images=[Image.new("RGB", (40, 60))]), 1),
        ("a.tiff", picture("TIFF", save_all=True, append_images=[Image.new("L", (9, 9))]), 2),
        ("copies.tiff", write_tiff(0, 1, 4, 1), 1),
        ("line.png", picture(size=(3_000, 1)), 1),
        ("wrong.pdf", picture(), 1),
        ("wrong.png", pdfs.scan("one", "two"), 2),
    ],
)
def test_a_scan_or_picture_is_shown_and_says_that_it_has_no_text(
    app: App, name: str, content: bytes, count: int
) -> None:
    html = app.send((name, content))
    (file,) = app.files
    assert len(file.pages) == count
    assert "no text layer" in html
    assert "This page has none" in app.look(f"/files/{file.id}/1")
    assert "has no text layer" in app.look("/", like=f"{file.id}-1", kind="text")


def test_what_is_filled_into_a_form_is_shown_and_found(app: App) -> None:
    app.send(("form.pdf", pdfs.xfa(is_dynamic=False)))
    (file,) = app.files
    assert "name: A. Example" in app.look(f"/files/{file.id}/1")
    with Image.open(file.pages[1].picture) as shown:
        scale = shown.width / 300
        field = shown.convert("L").crop([int(scale * at) for at in (20, 80, 200, 100)])
    assert field.getextrema()[0] < 128, "its value is drawn"


def test_a_very_long_page_is_shown_in_parts(start: Callable[..., Any]) -> None:
    lines = "".join(f"BT /F1 12 Tf 20 {5_980 - 30 * n} Td (item {n}) Tj ET " for n in range(199))
    receipt = pdfs.write(pdfs.Leaf(lines, "0 0 200 6000"), pdfs.Leaf("", "0 0 595 842"))
    with start() as app:
        app.send(("receipt.pdf", receipt))
        (file,) = app.files
        assert [page.title for page in file.pages.values()] == [
            *(f"page 1, part {part}" for part in range(1, 8)),
            "page 2",
        ]
        assert all(page.width > 350 for page in file.pages.values())
        home = app.look("/")
        assert "receipt.pdf, page 1, part 7" in home
    with start() as app:
        assert app.look("/") == home


def test_files_of_other_types_are_named_and_hidden_ones_are_not_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in (".git/a.pdf", "._b.pdf", "sub/c.PDF", "d.tif", "e.HEIC", "e.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.touch()
    assert [path.name for path in find_files(tmp_path)] == ["d.tif", "c.PDF"]
    assert capsys.readouterr().out == (
        "Left out files such as e.HEIC, e.txt; expected PDF, PNG, JPEG, WEBP, GIF, TIFF, BMP\n"
    )


def test_a_folder_without_pages_is_an_error(app: App, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.docx").write_bytes(b"PK")
    args = Namespace(pdf=tmp_path / "docs", store=tmp_path)
    with pytest.raises(FileNotFoundError, match="docs has no PDF or picture in it"):
        send_first(args, tmp_path, app.jobs)


def test_only_pages_without_a_text_are_named(app: App, two_pages: bytes, tmp_path: Path) -> None:
    import pypdfium2

    with (
        pypdfium2.PdfDocument(two_pages) as first,
        pypdfium2.PdfDocument(pdfs.scan("three")) as second,
    ):
        first.import_pages(second)
        first.save(tmp_path / "three.pdf")
    html = app.send(("three.pdf", (tmp_path / "three.pdf").read_bytes()))
    assert "Of its pages, 3 have no text layer" in html


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../../etc/passwd", "passwd"),
        ("C:\\Users\\me\\a.pdf", "a.pdf"),
        ("<script>alert(1)</script>.pdf", "script&gt;.pdf"),
        ('"><img src=x onerror=alert(1)>.pdf', "&gt;&lt;img src=x onerror=alert(1)&gt;.pdf"),
        ("{{ 7 * 7 }}.pdf", "{{ 7 * 7 }}.pdf"),
        ("x" * 300 + ".pdf", "x" * 120),
    ],
)
def test_a_name_is_shown_and_nothing_else(
    app: App, two_pages: bytes, tmp_path: Path, name: str, shown: str
) -> None:
    html = app.send((name, two_pages))
    assert shown in html
    assert not re.search("<script>|<img src=x", html)
    (file,) = app.files
    known = {"name.json", "original", "pages.json", "1.png", "1.webp", "2.png", "2.webp"}
    assert {path.name for path in (tmp_path / "web/files" / file.id).iterdir()} == known


def test_no_other_file_can_be_had(app: App, two_pages: bytes) -> None:
    app.send(("two.pdf", two_pages))
    (file,) = app.files
    for address in (
        "/files/..%2f..%2findex/1.png",
        "/files/%2e%2e/1",
        "/files/name.json",
        "/files/{id}/../name.json",
        "/files/{id}/original.json",
        "/files/{id}/1.json",
        "/files/{id}/99",
        "/static/..%2fapp.py",
        "/static/%2e%2e/app.py",
        "/pictures/x.webp",
        "/nowhere",
    ):
        reply = app.client.get(address.format(id=file.id))
        assert reply.status_code == 404, address
        assert "That did not work" in reply.text, address


@pytest.mark.parametrize("origin", [None, "null", "http://evil.example", "http://localhost:81"])
@pytest.mark.parametrize("address", ["/files", "/pictures", "/answer", "/messages/1/dismiss"])
def test_another_page_of_the_browser_can_change_nothing(
    app: App, origin: str | None, address: str
) -> None:
    with TestClient(app.app, ORIGIN, headers={"Origin": origin} if origin else {}) as client:
        assert client.post(address, files={"files": ("a.png", picture())}).status_code == 403
    assert not list(app.jobs)


def test_another_name_of_this_machine_is_not_answered(app: App) -> None:
    headers = {"Host": "evil.example", "Origin": "http://evil.example"}
    for method in ("GET", "POST"):
        reply = app.client.request(method, "/", headers=headers)
        assert reply.status_code == 421
        assert reply.json()["message"].endswith("start the server with --allowed-host NAME")


@pytest.mark.parametrize("address", ["/", "/nowhere", "/static/pages.css", "/progress"])
def test_every_response_is_kept_to_this_app(app: App, address: str) -> None:
    headers = app.client.get(address).headers
    assert headers["content-security-policy"].startswith("default-src 'self';")
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_what_is_too_large_or_no_form_gets_a_page_that_says_so(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    reply = app.client.post(
        "/files", content=iter([b"x"]), headers={"Transfer-Encoding": "chunked"}
    )
    assert reply.status_code == 411
    reply = app.client.post("/files", content=b"")
    assert reply.status_code == 400
    assert "No file came" in reply.text
    headers = {"Content-Type": "multipart/form-data; boundary=b"}
    reply = app.client.post("/files", content=b"--b\r\nno header", headers=headers)
    assert reply.status_code == 400
    monkeypatch.setattr(pages.app, "MAX_BYTES", 2**20)
    reply = app.client.post("/files", files={"files": ("a.pdf", bytes(2**20))})
    assert reply.status_code == 413
    assert "more than 1 MB at once" in reply.text
    assert not list(app.jobs)


def test_a_fault_of_the_program_is_told_without_its_trace(
    start: Callable[..., Any], two_pages: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("secret detail")

    with start() as app:
        monkeypatch.setattr(Index, "add", fail)
        html = app.send(("two.pdf", two_pages))
        assert "two.pdf could not be indexed; the terminal says why" in html
        assert "secret detail" not in html
        monkeypatch.undo()
    with start() as app:  # the file was not at fault, so it was kept
        app.wait()
        assert len(list(app.files)) == 1
        monkeypatch.setattr(Index, "search", fail)
        client = TestClient(app.app, ORIGIN, raise_server_exceptions=False)
        reply = client.get("/?q=sound")
        assert reply.status_code == 500
        assert "That did not work" in reply.text
        assert "secret detail" not in reply.text
        assert reply.headers["content-security-policy"].startswith("default-src 'self';")


def test_the_original_is_opened_as_what_it_is(app: App, two_pages: bytes) -> None:
    jpeg = picture("JPEG")
    app.send(("two.pdf", two_pages), ("photo.html", jpeg))
    kinds = {"two.pdf": ("application/pdf", two_pages), "photo.html": ("image/jpeg", jpeg)}
    for file in app.files:
        assert f'href="/files/{file.id}/original#page=1"' in app.look(f"/files/{file.id}/1")
        reply = app.client.get(f"/files/{file.id}/original")
        assert (reply.headers["content-type"], reply.content) == kinds[file.name]
        assert reply.headers["x-content-type-options"] == "nosniff"
        assert reply.headers["content-security-policy"].startswith("default-src 'none'")


def test_a_browser_offers_files_that_can_be_read(app: App) -> None:
    """A phone turns its HEIC photographs into JPEGs for such a form."""
    html = app.look("/")
    assert html.count('accept=".pdf,.bmp,.gif,.jpeg,.jpg,.png,.tif,.tiff,.webp"') == 2


def test_a_page_has_a_search_of_all_pages(app: App, two_pages: bytes) -> None:
    app.send(("two.pdf", two_pages))
    (file,) = app.files
    for address in (f"/files/{file.id}", f"/files/{file.id}/1?q=uuid"):
        html = app.client.get(address).text
        assert '<form method="get" action="/#results" role="search"' in html
    assert 'value="uuid"' in html


def hold_back(app: App, monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event]:
    """Let the first batch of pages wait; return what tells of it, and what lets it go on."""
    monkeypatch.setattr(pages.jobs, "BATCH", 1)
    begun, released, add = threading.Event(), threading.Event(), Index.add

    def slowly(index: Index, new: Any) -> None:
        begun.set()
        assert released.wait(30)
        add(index, new)

    monkeypatch.setattr(Index, "add", slowly)
    return begun, released


def test_a_file_is_looked_at_when_it_arrives(
    app: App, two_pages: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, released = hold_back(app, monkeypatch)
    try:
        app.client.post("/files", files=[("files", ("two.pdf", two_pages))])
        assert begun.wait(30)
        sent = [("files", (name, b"no pages")) for name in ("bad.pdf", "bad.pdf", "worse.pdf")]
        html = app.client.post("/files", files=sent).text
        assert html.count("is neither a PDF nor a picture") == 3
        assert "already" not in html
        again = [("files", ("two.pdf", two_pages))]
        assert "two.pdf is being added already" in app.client.post("/files", files=again).text
    finally:
        released.set()
    app.wait()


def test_a_file_can_be_given_up_while_it_waits_or_is_worked_on(
    app: App, two_pages: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    begun, released = hold_back(app, monkeypatch)
    try:
        sent = [("files", ("two.pdf", two_pages)), ("files", ("blue.png", picture()))]
        app.client.post("/files", files=sent)
        assert begun.wait(30)
        first, second = (job.id for job in app.jobs)
        assert "blue.png" not in app.client.post(f"/jobs/{second}/cancel").text
        assert "stopping" in app.client.post(f"/jobs/{first}/cancel").text
    finally:
        released.set()
    app.wait()
    assert not list(app.jobs)
    assert not list(app.files)
    assert not any(app.ids(kind) for kind in KINDS)
    assert not list((tmp_path / "web/files").iterdir())
    assert app.client.post(f"/jobs/{first}/cancel").status_code == 200


@pytest.mark.parametrize(
    ("done", "seconds", "told"),
    [(0, 5, ""), (10, 5, "45 s left"), (10, 60, "about 9 min left")],
)
def test_the_time_left_is_told(
    done: int, seconds: float, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    job = pages.jobs.Job(1, "a", "working", done=done, total=100, started=1000.0 - seconds)
    assert job.left == told


# Bad luck and load


def test_a_file_is_deleted_once_however_often_it_is_asked(app: App, two_pages: bytes) -> None:
    app.send(("two.pdf", two_pages))
    (file,) = app.files
    threads = [threading.Thread(target=app.jobs.remove, args=(file,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _ in range(2):
        reply = app.client.post(f"/files/{file.id}/delete", follow_redirects=False)
        assert reply.status_code == 303
    app.send(("two.pdf", two_pages))
    assert len(list(app.files)) == 1


def test_a_picture_that_is_gone_is_not_found(app: App, two_pages: bytes) -> None:
    app.send(("two.pdf", two_pages))
    (file,) = app.files
    file.pages[1].picture.unlink()
    file.pages[1].thumb.unlink()
    for name in ("1.png", "1.webp"):
        assert app.client.get(f"/files/{file.id}/{name}").status_code == 404
    assert app.client.get(f"/files/{file.id}/1").status_code == 200


@pytest.mark.parametrize("number", ["\u0663", "1e3", "-1", "%00"])
def test_an_odd_number_in_an_address_is_not_found(app: App, two_pages: bytes, number: str) -> None:
    app.send(("two.pdf", two_pages))
    (file,) = app.files
    for end in (number, f"{number}.png"):
        assert app.client.get(f"/files/{file.id}/{end}").status_code == 404
    assert app.client.post(f"/messages/{number}/dismiss").status_code == 404
    assert "has been deleted" in app.look("/", like=f"{file.id}-{number}")


@pytest.mark.parametrize("content", ["", '{"name": "two', "[]", '{"name": 1}', "null"])
def test_a_damaged_entry_of_the_store_is_skipped_or_made_anew(
    start: Callable[..., Any],
    two_pages: bytes,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: str,
) -> None:
    with start() as app:
        app.send(("two.pdf", two_pages))
        (file,) = app.files
    (file.folder / "pages.json").write_text(content, encoding="utf-8")
    with start() as app:
        app.wait()
        assert [len(each.pages) for each in app.files] == [2]
    (file.folder / "name.json").write_text(content, encoding="utf-8")
    with start() as app:
        assert not list(app.files)
        assert "name.json is damaged" in " ".join(capsys.readouterr().out.split())
        app.send(("again.pdf", two_pages))
        assert [(each.name, len(each.pages)) for each in app.files] == [("again.pdf", 2)]


def test_a_lost_index_is_built_again(
    start: Callable[..., Any], two_pages: bytes, tmp_path: Path
) -> None:
    with start() as app:
        app.send(("two.pdf", two_pages))
        (file,) = app.files
        for collection in app.index._collections.values():
            collection.delete(where={"file": file.id})
    with start() as app:
        app.wait()
        assert len(app.ids("both")) == 2
        assert len(found_pages(app.look("/", q="uuid", kind="text"))) == 2


@contextmanager
def serving(app: App) -> Iterator[int]:
    """Serve an app that was started; give its port."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app.app, lifespan="off", log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join(30)


def test_a_language_model_that_is_away_leaves_what_was_found(
    start: Callable[..., Any], two_pages: bytes
) -> None:
    with start(answerer=Answerer(Server("http://127.0.0.1:9/v1", None, None))) as app:
        app.send(("two.pdf", two_pages))
        reply = app.client.post("/answer", data={"q": "uuid", "kind": "text"})
        assert reply.status_code == 502
        assert "The vision LLM gave no answer" in reply.text
        assert found_pages(reply.text) == found_pages(app.look("/", q="uuid", kind="text"))


def test_a_language_model_that_hangs_holds_up_nobody(
    start: Callable[..., Any], two_pages: bytes
) -> None:
    with serve_chat() as chat, start(answerer=Answerer(Server(chat.url, None, None))) as app:
        app.send(("two.pdf", two_pages))
        asked = {"q": "uuid", "kind": "text"}
        with serving(app) as port, ThreadPoolExecutor(pages.app.ANSWERS) as pool:
            origin = f"http://127.0.0.1:{port}"
            with httpx.Client(base_url=origin, headers={"Origin": origin}, timeout=30) as client:
                chat.released.clear()
                waiting = [
                    pool.submit(client.post, "/answer", data=asked)
                    for _ in range(pages.app.ANSWERS)
                ]
                while len(chat.asked) < pages.app.ANSWERS:
                    time.sleep(0.01)
                refused = client.post("/answer", data=asked)
                assert refused.status_code == 503
                assert "Ask again" in refused.text
                assert client.get("/").status_code == 200
                chat.released.set()
                assert all("It is red [1]." in each.result().text for each in waiting)
