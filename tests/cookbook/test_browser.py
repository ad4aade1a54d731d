"""The web app in a browser, with the stand-in: what a person sees and does, and how well it finds.

Chromium is the system's own. Every request of every page is watched: none leaves the machine.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import handbook
import numpy as np
import pytest
from chat import Server
from pages.answer import Answerer
from pages.app import MAX_PAGES, create_app
from pages.files import Files
from pages.index import Index
from pages.jobs import Jobs
from pages.search import Query, Search

from cookbook.standin import build_multimodal
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine.server.run import build_server
from tests.conftest import CHROMIUM, ROOT
from tests.cookbook.questions import DEVELOPMENT, FROM_ELSEWHERE, HELD_OUT
from tests.support import pdfs
from tests.support.chat_server import serve_chat

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

PHONE = {"viewport": {"width": 390, "height": 780}, "has_touch": True, "device_scale_factor": 2}
PATIENCE = 60_000  # milliseconds; a busy machine embeds slowly


@pytest.fixture(scope="module")
def model(standin: Path) -> NeMoRetrieverEmbedding:
    return NeMoRetrieverEmbedding(model=str(build_multimodal()), device="cpu", truncate="END")


@pytest.fixture(scope="module")
def two_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PDF of two pages of the handbook: `wave` and `uuid`."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(handbook, "CHAPTERS", {"two": ("wave", "uuid")})
        (path,) = handbook.write(tmp_path_factory.mktemp("two"))
    return path


@contextmanager
def serving(folder: Path, model: NeMoRetrieverEmbedding, **options: Any) -> Iterator[str]:
    """Serve the app on a folder; give its address."""
    options = {"model": "the stand-in", "is_trained": False} | options
    app = create_app(Files(folder / "files"), Index(folder / "index", model), **options)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = build_server(app, log_level="warning")
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield "http://{}:{}".format(*listener.getsockname())
        finally:
            server.should_exit = True
            thread.join(60)


@pytest.fixture
def site(tmp_path: Path, model: NeMoRetrieverEmbedding) -> Iterator[str]:
    with serving(tmp_path / "web", model) as address:
        yield address


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    args = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=args)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Open a page; afterwards say what it asked of others or complained of, which is a failure."""
    contexts, outside, complaints = [], [], []

    def watch(request: Any) -> None:
        address = urlsplit(request.url)
        if address.scheme not in ("file", "data") and address.hostname != "127.0.0.1":
            outside.append(request.url)

    def open_page(address: str, **options: Any) -> Page:
        context = browser.new_context(**options)
        context.set_default_timeout(PATIENCE)
        contexts.append(context)
        page = context.new_page()
        page.on("request", watch)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console",
            lambda said: (
                complaints.append(said.text)
                if said.type == "error" and "the server responded with a status" not in said.text
                else None
            ),
        )
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not outside
    assert not complaints


def add(page: Page, *files: Path | dict[str, Any]) -> None:
    """Add files by the form, and wait until their pages are shown without loading anew."""
    sent = [upload(f.name, f.read_bytes()) if isinstance(f, Path) else f for f in files]
    page.set_input_files("#files", sent)
    page.click("form.drop button")


def upload(name: str, content: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "application/octet-stream", "buffer": content}


def names(page: Page) -> list[str]:
    """Return the names of what is found, best first."""
    return [re.sub(r"^\d+\. ", "", name) for name in page.locator("ol .name").all_inner_texts()]


def check_accessibility(page: Page) -> None:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    grave = [each for each in found if each["impact"] in ("serious", "critical")]
    assert not grave, [(each["id"], [node["html"] for node in each["nodes"]]) for each in grave]


def test_a_person_adds_a_file_searches_it_reads_it_and_deletes_it(
    site: str, open_page: Callable[..., Page], two_pages: Path, tmp_path: Path
) -> None:
    page = open_page(site)
    add(page, two_pages)
    page.wait_for_selector("text=two.pdf, page 2")

    page.fill("#q", "Create and write WAV sound files")
    page.press("#q", "Enter")
    page.wait_for_selector("text=the text layer is searched")
    assert page.evaluate("document.activeElement.id") == "results"
    assert names(page)[0] == "two.pdf, page 1"
    assert re.match(r"cosine 0\.\d{3}$", page.locator(".score").first.inner_text())
    assert page.locator(".switch a[aria-current]").inner_text() == "Text layer"

    picture = next((tmp_path / "web/files").glob("*/2.png"))
    page.set_input_files("#picture", upload("photo.jpg", pdfs.rephotograph(picture)))
    page.click("text=Search by picture")
    page.wait_for_selector("text=Found by photo.jpg")
    assert names(page) == ["two.pdf, page 2", "two.pdf, page 1"]
    page.click(".switch >> text=Both as one")
    page.wait_for_selector(".switch a[aria-current] >> text=Both as one")
    assert len(names(page)) == 2

    page.go_back()
    page.go_back()
    page.click("ol .card:first-child img")
    page.wait_for_selector("mark#passage")
    page.click("text=Back to the results")
    page.wait_for_selector("h2:has-text('Found for')")

    page.click("ol .card:first-child >> text=More like this")
    page.wait_for_selector("h2:has-text('More like')")
    assert len(names(page)) == 1
    page.click("ol .card img")
    page.wait_for_selector("pre")
    assert page.evaluate("document.querySelector('figure img').naturalWidth") > 1_000

    page.click("a.home")
    page.click(".delete summary")
    page.click("text=and its pages for good")
    page.wait_for_selector("text=None yet.")
    assert not list((tmp_path / "web/files").iterdir())


def test_a_restart_keeps_everything(
    tmp_path: Path,
    model: NeMoRetrieverEmbedding,
    open_page: Callable[..., Page],
    two_pages: Path,
) -> None:
    with serving(tmp_path, model) as address:
        page = open_page(address)
        add(page, two_pages)
        page.wait_for_selector("text=two.pdf, page 2")
    with serving(tmp_path, model) as address:
        page = open_page(f"{address}/?q=UUID objects")
        assert names(page)[0] == "two.pdf, page 2"
        add(page, two_pages)
        page.wait_for_selector("text=is here already, byte for byte")
        page.click("button:text-is('OK')")
        page.wait_for_selector("text=is here already", state="detached")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("empty.pdf", "empty.pdf is empty"),
        ("broken.pdf", "broken.pdf is a broken PDF"),
        ("locked.pdf", "locked.pdf is locked with a password"),
        ("letter.docx", "letter.docx is neither a PDF nor a picture"),
    ],
)
def test_what_cannot_be_used_gets_a_message_and_no_trace(
    site: str, open_page: Callable[..., Page], name: str, told: str
) -> None:
    content = {
        "empty.pdf": b"",
        "broken.pdf": b"%PDF-1.7\n" + b"?" * 4096,
        "locked.pdf": pdfs.lock(pdfs.scan("one")),
        "letter.docx": b"PK\3\4" + bytes(99),
    }[name]
    page = open_page(site)
    add(page, upload(name, content))
    page.wait_for_selector(f"[role=alert]:has-text('{told}')")
    check_accessibility(page)
    page.set_input_files("#picture", upload(name, content))
    page.click("text=Search by picture")
    page.wait_for_selector(f"[role=alert]:has-text('{told}')")
    assert "Traceback" not in page.content()
    check_accessibility(page)


def test_a_scan_says_how_it_can_be_found(site: str, open_page: Callable[..., Page]) -> None:
    page = open_page(site)
    add(page, upload("scan.pdf", pdfs.scan("Dear Sir", "Yours")))
    page.wait_for_selector("text=It has no text layer")
    page.wait_for_selector("text=ocrmypdf")


def test_progress_is_updated_in_place_and_only_changes_are_announced(
    site: str, open_page: Callable[..., Page], two_pages: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pages.jobs.BATCH", 1)
    add_pages, batches = Index.add, threading.Semaphore(1)

    def add_when_allowed(index: Index, new: Any) -> None:
        assert batches.acquire(timeout=60)
        add_pages(index, new)

    monkeypatch.setattr(Index, "add", add_when_allowed)
    page = open_page(site)
    add(page, two_pages)
    page.wait_for_selector(".job label:has-text('of 2 pages')")
    button = page.locator(".job button").element_handle()
    page.focus(".job button")
    page.evaluate(
        """() => {
            window.announced = [];
            const note = ({target, addedNodes}) => [target, ...addedNodes].forEach((node) => {
                const element = node.nodeType === 1 ? node : node.parentElement;
                const live = element?.closest("[aria-live]")?.getAttribute("aria-live");
                if (live === "polite") announced.push(element.closest("p")?.textContent);
            });
            const watcher = new MutationObserver((changes) => changes.forEach(note));
            watcher.observe(document.getElementById("progress"), {childList: true, subtree: true});
        }"""
    )
    page.wait_for_selector(".job label:has-text('1 of 2 pages')")
    page.wait_for_timeout(1200)  # two polls
    assert page.evaluate("button => button === document.activeElement", button)
    assert page.evaluate("announced") == []
    batches.release()
    page.wait_for_selector("text=two.pdf, page 2")
    assert "Files in progress: 0" in page.evaluate("announced")


def test_files_can_be_dropped(site: str, open_page: Callable[..., Page], two_pages: Path) -> None:
    page = open_page(site)
    page.evaluate(
        """bytes => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([new Uint8Array(bytes)], "dropped.pdf"));
            const drop = new DragEvent("drop", {dataTransfer: transfer, bubbles: true});
            document.querySelector("form.drop").dispatchEvent(drop);
        }""",
        list(two_pages.read_bytes()),
    )
    page.wait_for_selector("text=dropped.pdf, page 2")


def test_all_of_it_works_without_a_script(
    site: str, open_page: Callable[..., Page], two_pages: Path
) -> None:
    page = open_page(site, java_script_enabled=False)
    add(page, two_pages)
    deadline = time.monotonic() + 60
    while not page.locator("text=two.pdf, page 2").count():
        assert time.monotonic() < deadline
        page.click("text=Show how far it is") if page.locator(
            "text=Show how far it is"
        ).count() else page.goto(site)
        time.sleep(0.5)
    page.fill("#q", "UUID objects")
    page.click("button >> text=Search", strict=False)
    assert names(page)[0] == "two.pdf, page 2"


def test_it_is_used_by_keyboard_alone(
    site: str, open_page: Callable[..., Page], two_pages: Path
) -> None:
    page = open_page(site)
    add(page, two_pages)
    page.wait_for_selector("text=two.pdf, page 2")
    page.goto(site)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    box = page.locator(".skip").bounding_box()
    assert box
    assert box["x"] >= 0
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "q"
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert page.evaluate(outline) == "solid"
    page.keyboard.type("UUID objects")
    page.keyboard.press("Enter")
    page.wait_for_selector("ol .card")
    page.focus("ol .card a")
    page.keyboard.press("ArrowRight")
    assert "page 1" in page.evaluate("document.activeElement.textContent")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    page.wait_for_selector("h1:has-text('page 2')")
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("h1:has-text('page 1')")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("h1:has-text('page 2')")


@pytest.mark.parametrize(
    "screen",
    [{**screen, "color_scheme": scheme} for screen in ({}, PHONE) for scheme in ("light", "dark")],
    ids=["desk-light", "desk-dark", "phone-light", "phone-dark"],
)
def test_every_view_is_accessible_and_fits_the_screen(
    site: str,
    open_page: Callable[..., Page],
    two_pages: Path,
    tmp_path: Path,
    screen: dict[str, Any],
) -> None:
    page = open_page(site, **screen)
    check_accessibility(page)  # while it is empty
    add(page, two_pages, upload("scan.pdf", pdfs.scan("Dear Sir")), upload("bad.pdf", b"bad"))
    page.wait_for_selector("text=scan.pdf, page 1")
    page.wait_for_selector("text=bad.pdf is neither")
    (id_,) = (path.parent.name for path in (tmp_path / "web/files").glob("*/2.png"))
    words, unanswered = "/?q=UUID objects", "/?q=recipe for onion soup"
    like = f"/?like={id_}-1"
    for path in (
        "/",
        words,
        unanswered,
        like,
        f"/files/{id_}",
        f"/files/{id_}/1?q=UUID&passage=0-9",
        "/nowhere",
    ):
        page.goto(site + path)
        check_accessibility(page)
        width = page.evaluate("document.documentElement.scrollWidth")
        assert width <= page.evaluate("document.documentElement.clientWidth")
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))
    )
    assert (red + green + blue > 600) == (screen["color_scheme"] == "light")


def test_a_page_of_another_site_cannot_use_it(
    site: str, open_page: Callable[..., Page], tmp_path: Path
) -> None:
    (tmp_path / "evil.html").write_text(
        f"<form method=post action='{site}/files' enctype=multipart/form-data>"
        "<input name=files></form><script>document.forms[0].submit()</script>"
    )
    page = open_page("about:blank")
    page.goto((tmp_path / "evil.html").as_uri())
    page.wait_for_selector("text=Only a page of this app may send this")


def test_an_answer_names_its_pages_and_a_failure_says_what_to_do(
    tmp_path: Path,
    model: NeMoRetrieverEmbedding,
    open_page: Callable[..., Page],
    two_pages: Path,
) -> None:
    with (
        serve_chat() as chat,
        serving(tmp_path, model, answerer=Answerer(Server(chat.url, None, None))) as address,
    ):
        chat.answer = "<b>It reads WAV</b> [1]."
        page = open_page(address)
        add(page, two_pages)
        page.wait_for_selector("text=two.pdf, page 2")
        page.goto(f"{address}/?q=sound")
        page.click("text=Answer from the first 3 pages")
        page.wait_for_selector("#answer >> text=<b>It reads WAV</b> [1].")
        assert "[1] two.pdf, page" in page.inner_text("#answer")
        check_accessibility(page)
        parts = chat.asked[0]["messages"][1]["content"]
        urls = [part["image_url"]["url"] for part in parts if "image_url" in part]
        assert len(urls) == 2
        assert all(len(url) < 180_000 for url in urls)
        chat.status = 500
        page.click("text=Answer from the first 3 pages")
        page.wait_for_selector("text=The vision LLM gave no answer")


# How well it finds


@pytest.fixture(scope="module")
def library(
    tmp_path_factory: pytest.TempPathFactory, model: NeMoRetrieverEmbedding
) -> tuple[Files, Index]:
    """The handbook, indexed."""
    folder = tmp_path_factory.mktemp("library")
    files, index = Files(folder / "files"), Index(folder / "index", model)
    jobs = Jobs(files, index, MAX_PAGES)
    for path in handbook.write(folder / "handbook"):
        if path.suffix == ".pdf":
            with path.open("rb") as file:
                jobs.receive(path.name, file)
    deadline = time.monotonic() + 600
    while any(job.is_active for job in jobs):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    jobs.close()
    return files, index


def test_a_sentence_finds_its_page_first(
    library: tuple[Files, Index], record_property: Callable[[str, object], None]
) -> None:
    files, index = library
    pages = [page for file in files for page in file.pages.values()]
    asked = [(page, words) for page in pages for words in sentences(page.text)]
    assert len(asked) >= 100
    first = [index.search(index.embed_words(words), "text", 1)[0] for _, words in asked]
    right = np.mean(
        [
            hit.file == page.file and hit.number == page.number
            for hit, (page, _) in zip(first, asked, strict=True)
        ]
    )
    record_property("sentence_first", float(right))
    print(f"{right:.3f} of {len(asked)} sentences find their page first")
    assert right >= 0.9


def sentences(text: str) -> list[str]:
    """Return the sentences of a text layer that stand on one page only by being prose."""
    parts = (" ".join(part.split()) for part in re.split(r"(?<=[.!?])\s+|\n\s*\n", text))
    return [
        part for part in parts if 40 <= len(part) <= 300 and part[0].isupper() and part[-1] == "."
    ]


def test_questions_that_no_page_answers_are_refused(
    library: tuple[Files, Index], record_property: Callable[[str, object], None]
) -> None:
    search = Search(*library, is_trained=False)

    def count_answered(questions: Sequence[str]) -> float:
        found = filter(None, (search.find(Query(question)) for question in questions))
        return sum(each.is_answered for each in found) / len(questions)

    names = {file.name for file in library[0]}
    asked = [
        question
        for question, section in (*HELD_OUT, *DEVELOPMENT)
        if section.partition("#")[0] in names
    ]
    assert len(asked) >= 8
    answered, refused = count_answered(asked), 1 - count_answered(FROM_ELSEWHERE)
    record_property("answered", answered)
    record_property("refused, from elsewhere", refused)
    print(f"{answered:.2f} of what the pages answer, {refused:.2f} of other questions refused")
    assert answered >= 0.9
    assert refused >= 0.8


def test_a_rephotographed_page_finds_itself_first(
    library: tuple[Files, Index],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    files, index = library
    pages = [page for file in files for page in file.pages.values()]
    assert len(pages) >= 20
    photo = tmp_path / "photo.jpg"
    right = 0
    for page in pages:
        photo.write_bytes(pdfs.rephotograph(page.picture))
        (hit,) = index.search(index.embed_picture(photo), "picture", 1)
        right += hit.file == page.file and hit.number == page.number
    record_property("rephotographed_first", right / len(pages))
    print(f"{right} of {len(pages)} re-photographed pages find themselves first")
    assert right >= 0.9 * len(pages)


def test_the_command_prints_its_address_and_keeps_the_handbook(
    tmp_path: Path, standin: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import httpx

    for name in ("NVIDIA_BASE_URL", "NVIDIA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    command = [sys.executable, str(ROOT / "cookbook/pages"), "--port", "0", "--device", "cpu"]
    command += ["--allowed-host", "myserver"]
    for start in ("first", "second"):
        begun = time.monotonic()
        with subprocess.Popen(
            [*command, "--store", str(tmp_path / "store")], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout
            lines = iter(process.stdout.readline, "")
            line = next(line for line in lines if line.startswith("Open"))
            address = line.split()[1]
            while "page 6" not in (home := httpx.get(address).text):
                assert time.monotonic() < begun + 300
                time.sleep(0.2)
            seconds = time.monotonic() - begun
            print(f"{start} start: the handbook's pages are shown after {seconds:.1f} s")
            named = httpx.get(address, headers={"Host": "myserver"})
            process.send_signal(signal.SIGINT)
            process.stdout.read()
        assert "files.pdf" in home
        assert named.status_code == 200
        assert process.returncode == 1
    assert seconds < 40
