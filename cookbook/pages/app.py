"""The pages in a browser: what each address answers.

    GET  /                             the files; with ?q=, ?picture= or ?like=, what is found
    POST /files                        send PDFs and pictures
    GET  /progress                     what goes on, as a piece of a page
    POST /messages/{id}/dismiss        put a message away
    POST /jobs/{id}/cancel             give a file up that is not finished
    GET  /files/{id}                   all pages of a file; /original is what was sent
    POST /files/{id}/delete
    GET  /files/{id}/{number}          read a page; .png and .webp are its pictures
    POST /pictures                     send a picture to search with; /pictures/{id}.webp shows it
    POST /answer                       let a vision LLM look at what was found

Everything works with forms alone; static/pages.js adds what is nicer with a script.
"""

from __future__ import annotations

import io
import logging
import re
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from anyio import CapacityLimiter, to_thread
from demo import escape, ordinal
from pages.access import HEADERS, VIEWED, RequireOrigin, SecureHeaders
from pages.answer import Answerer
from pages.files import THUMB, File, Files, Page, clean
from pages.index import Index
from pages.jobs import Jobs
from pages.search import Query, Results, Search
from PIL import Image
from relevance import NO_ANSWER
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates

from shared_engine import NeMoRetrieverError, PageError, Reranker
from shared_engine.images.formats import FORMATS
from shared_engine.images.pages import SUFFIXES, open_pages
from shared_engine.server.access import RequireHost

MAX_BYTES = 100 * 2**20  # of all files sent at once
MAX_FILES = 100
MAX_PAGES = 500  # of one file
MAX_WORDS = 2_000  # characters
SHOWN = 12  # pages of a file on the first page
ANSWERED_FROM = 3  # pages
ANSWERS = 4  # at a time; each waits in a thread for a language model

KINDS = {"text": "Text layer", "picture": "Picture", "both": "Both as one"}
_HERE = Path(__file__).parent
_NO_REPLY = (
    "The vision LLM gave no answer; the terminal says why. Check its address (--llm-url), its name "
    "(--llm-model) and NVIDIA_API_KEY, then ask again."
)
_FOREVER = {"Cache-Control": "private, max-age=31536000, immutable"}  # the id names the content

_log = logging.getLogger(__name__)


def create_app(
    files: Files,
    index: Index,
    *,
    model: str,
    is_trained: bool,
    reranker: Reranker | None = None,
    min_score: float | None = None,
    answerer: Answerer | None = None,
    allowed_hosts: tuple[str, ...] = (),
    max_pages: int = MAX_PAGES,
) -> Starlette:
    """Return the app; `model` is what it says of the model that runs."""
    jobs = Jobs(files, index, max_pages)
    search = Search(files, index, is_trained=is_trained, reranker=reranker, min_score=min_score)
    pages = _Pages(files, jobs, search, answerer, model)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        yield
        await run_in_threadpool(jobs.close)

    app = Starlette(
        routes=[
            Route("/", pages.show_home),
            Route("/files", pages.receive, methods=["POST"]),
            Route("/progress", pages.show_progress),
            Route("/messages/{id:int}/dismiss", pages.dismiss, methods=["POST"]),
            Route("/jobs/{id:int}/cancel", pages.cancel, methods=["POST"]),
            Route("/files/{id}", pages.show_file),
            Route("/files/{id}/original", pages.send_original),
            Route("/files/{id}/delete", pages.delete, methods=["POST"]),
            Route("/files/{id}/{number:int}", pages.show_page),
            Route("/files/{id}/{number:int}.{kind}", pages.send_picture),
            Route("/pictures", pages.receive_picture, methods=["POST"]),
            Route("/pictures/{id}.webp", pages.send_query_picture),
            Route("/answer", pages.answer, methods=["POST"]),
            Mount("/static", StaticFiles(directory=_HERE / "static")),
        ],
        middleware=[
            Middleware(RequireHost, hosts=allowed_hosts),
            Middleware(SecureHeaders),
            Middleware(RequireOrigin),
        ],
        exception_handlers={
            HTTPException: pages.show_refusal,
            PageError: pages.show_unusable,
            NeMoRetrieverError: pages.show_engine_error,
            Exception: pages.show_failure,
        },
        lifespan=lifespan,
    )
    app.state.jobs = jobs
    return app


class _Pages:
    """What the addresses answer."""

    def __init__(
        self, files: Files, jobs: Jobs, search: Search, answerer: Answerer | None, model: str
    ) -> None:
        self._files = files
        self._jobs = jobs
        self._search = search
        self._answerer = answerer
        self._answering = CapacityLimiter(ANSWERS)
        self._drawing = CapacityLimiter(1)
        self._templates = Jinja2Templates(_HERE / "templates")
        self._templates.env.globals.update(
            model=model,
            kinds=KINDS,
            accept=",".join([".pdf", *sorted(SUFFIXES)]),
            formats=", ".join(FORMATS),
            max_bytes=MAX_BYTES,
            max_words=MAX_WORDS,
            shown=SHOWN,
            answered_from=ANSWERED_FROM,
            can_answer=answerer is not None,
            ordinal=ordinal,
            no_answer=NO_ANSWER,
        )

    def _render(self, request: Request, name: str, status: int = 200, **context: Any) -> Response:
        return self._templates.TemplateResponse(request, name, context, status)

    # Looking

    def show_home(self, request: Request) -> Response:
        query = _read_query(request)
        return self._show(request, query, self._search.find(query))

    def _show(
        self,
        request: Request,
        query: Query,
        results: Results | None,
        answer: str = "",
        status: int = 200,
    ) -> Response:
        return self._render(
            request,
            "home.html",
            status,
            query=query,
            results=results,
            picture=self._search.get_picture(query.picture),
            like=self._search.get_page(query.like),
            files=list(self._files),
            jobs=list(self._jobs),
            answer=answer,
        )

    def show_progress(self, request: Request) -> Response:
        return self._render(request, "progress.html", jobs=list(self._jobs))

    def show_file(self, request: Request) -> Response:
        return self._render(request, "file.html", file=self._find_file(request))

    def show_page(self, request: Request) -> Response:
        file, page = self._find_page(request)
        numbers = list(file.pages)
        at = numbers.index(page.number)
        start, end = _read_span(request.query_params.get("passage", ""))
        return self._render(
            request,
            "page.html",
            file=file,
            page=page,
            query=_read_query(request),
            texts=(page.text[:start], page.text[start:end], page.text[end:]),
            areas=file.find(page, page.text[start:end]),
            previous=numbers[at - 1] if at else None,
            next=numbers[at + 1] if at + 1 < len(numbers) else None,
        )

    def send_picture(self, request: Request) -> Response:
        _, page = self._find_page(request)
        paths = {"png": page.picture, "webp": page.thumb}
        kind = request.path_params["kind"]
        try:
            content = paths[kind].read_bytes()
        except (KeyError, FileNotFoundError):
            raise HTTPException(404) from None
        return Response(content, media_type=f"image/{kind}", headers=_FOREVER)

    def send_original(self, request: Request) -> Response:
        file = self._find_file(request)
        try:
            with file.original.open("rb") as opened:
                kind = "application/pdf"
                if b"%PDF-" not in opened.read(1024):
                    with Image.open(opened, formats=FORMATS) as picture:
                        kind = picture.get_format_mimetype() or "application/octet-stream"
        except OSError:
            raise HTTPException(404) from None
        return FileResponse(
            file.original,
            media_type=kind,
            filename=file.name,
            content_disposition_type="inline",
            headers={"Content-Security-Policy": VIEWED},
        )

    def send_query_picture(self, request: Request) -> Response:
        picture = self._search.get_picture(request.path_params["id"])
        if picture is None:
            raise HTTPException(404)
        return Response(picture.thumb, media_type="image/webp", headers=_FOREVER)

    def _find_file(self, request: Request) -> File:
        file = self._files.get(request.path_params["id"])
        if file is None:
            raise HTTPException(404)
        return file

    def _find_page(self, request: Request) -> tuple[File, Page]:
        file = self._find_file(request)
        page = file.pages.get(request.path_params["number"])
        if page is None:
            raise HTTPException(404)
        return file, page

    # Changing

    async def receive(self, request: Request) -> Response:
        async with _reading(request) as form:
            uploads = _uploads(form)
            if not uploads:
                raise HTTPException(400, "No file came. Choose one or more, then send them.")
            for upload in uploads:
                await run_in_threadpool(self._jobs.receive, upload.filename or "", upload.file)
        return RedirectResponse("/#progress", 303)

    def dismiss(self, request: Request) -> Response:
        self._jobs.dismiss(request.path_params["id"])
        return RedirectResponse("/#progress", 303)

    def cancel(self, request: Request) -> Response:
        self._jobs.cancel(request.path_params["id"])
        return RedirectResponse("/#progress", 303)

    async def delete(self, request: Request) -> Response:
        if file := self._files.get(request.path_params["id"]):  # else it was done already
            await run_in_threadpool(self._jobs.remove, file)
        return RedirectResponse("/#files-here", 303)

    async def receive_picture(self, request: Request) -> Response:
        async with _reading(request) as form:
            uploads = _uploads(form)
            if not uploads:
                raise HTTPException(400, "No picture came. Choose one to search with.")
            id_ = await to_thread.run_sync(self._take_picture, uploads[0], limiter=self._drawing)
        return RedirectResponse(f"/?picture={id_}#results", 303)

    def _take_picture(self, upload: UploadFile) -> str:
        name = clean(upload.filename or "The picture")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "sent")
            with path.open("wb") as out:
                shutil.copyfileobj(upload.file, out)
            with open_pages(path, name, MAX_PAGES) as source:
                picture = source.read(0, "picture").picture
            drawn = Path(folder, "drawn.png")
            picture.save(drawn, compress_level=1)
            return self._search.keep_picture(name, drawn, _shrink(picture))

    async def answer(self, request: Request) -> Response:
        async with _reading(request) as form:
            words, kind = (str(form.get(key, "")) for key in ("q", "kind"))
        query = Query(words.strip()[:MAX_WORDS], kind=kind)
        if not self._answering.available_tokens:
            raise HTTPException(
                503, f"{ANSWERS} answers are being written already. Ask again in a minute."
            )
        return await to_thread.run_sync(self._show_answer, request, query, limiter=self._answering)

    def _show_answer(self, request: Request, query: Query) -> Response:
        results = self._search.find(query)
        if not (self._answerer and results and results.found and results.is_answered):
            raise HTTPException(400, "There is nothing to answer, or nobody who could.")
        pages = [found.page for found in results.found[:ANSWERED_FROM]]
        try:
            answer = self._answerer.answer(query.words, pages)
        except Exception as exc:  # of its HTTP library, of LangChain, of the adapter
            _log.warning("the vision LLM gave no answer: %s", escape(str(exc)))
            notices = (*results.notices, _NO_REPLY)
            return self._show(request, query, results._replace(notices=notices), status=502)
        return self._show(request, query, results, answer or "The model answered with nothing.")

    # What goes wrong

    def show_refusal(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        told = {404: "There is no such page, or it has been deleted."}
        detail = told.get(error.status_code, error.detail)
        return self._render(request, "message.html", error.status_code, message=detail)

    def show_unusable(self, request: Request, error: Exception) -> Response:
        return self._render(request, "message.html", 422, message=str(error))

    def show_engine_error(self, request: Request, error: Exception) -> Response:
        message = f"The model could not do this: {error}"
        return self._render(request, "message.html", 502, message=message)

    def show_failure(self, request: Request, _: Exception) -> Response:
        message = "This went wrong, and it is the app's fault. The terminal says why."
        reply = self._render(request, "message.html", 500, message=message)
        reply.headers.update(HEADERS)  # Starlette answers outside of SecureHeaders
        return reply


def _read_query(request: Request) -> Query:
    given = request.query_params
    words = given.get("q", "").strip()[:MAX_WORDS]
    return Query(words, *(given.get(key, "") for key in ("picture", "like", "kind")))


def _read_span(text: str) -> tuple[int, int]:
    """Return where a passage begins and ends; nothing where an address has it otherwise.

    >>> _read_span("12-40"), _read_span("40-12"), _read_span("x")
    ((12, 40), (0, 0), (0, 0))
    """
    found = re.fullmatch(r"([0-9]{1,9})-([0-9]{1,9})", text)
    start, end = map(int, found.groups()) if found else (0, 0)
    return (start, end) if start < end else (0, 0)


@asynccontextmanager
async def _reading(request: Request) -> AsyncIterator[FormData]:
    """Give the form of a request that says how large it is, and is not too large."""
    length = request.headers.get("content-length", "")
    if not re.fullmatch("[0-9]{1,15}", length):
        raise HTTPException(411, "The request does not say how long it is.")
    if int(length) > MAX_BYTES:
        async for _ in request.stream():  # a browser reads no reply before all is sent
            pass
        raise HTTPException(
            413,
            f"That is more than {MAX_BYTES // 2**20} MB at once. Send fewer files, or split a "
            "large one.",
        )
    form = await request.form(max_files=MAX_FILES, max_fields=20)
    try:
        yield form
    finally:
        await form.close()


def _uploads(form: FormData) -> list[UploadFile]:
    sent = (value for _, value in form.multi_items() if isinstance(value, UploadFile))
    return [upload for upload in sent if upload.filename]  # a form without a choice sends one of ""


def _shrink(picture: Image.Image) -> bytes:
    small = picture.copy()
    small.thumbnail((THUMB, THUMB))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return buffer.getvalue()
