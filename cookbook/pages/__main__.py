"""Search pages of PDFs and pictures in a browser.

    files.py ....... what was sent, in a folder         access.py .... who may use the app
    index.py ....... LlamaIndex over Chroma             app.py ....... what each address answers
    keywords.py .... BM25                               answer.py .... a vision LLM looks at pages
    passages.py .... what of a text is one              search.py .... by words, picture or page
    jobs.py ........ one file after the other           model.py ..... the models that run

`make pages` sets everything up and runs this; `make pages ARGS=--help` lists the options.
"""

from __future__ import annotations

import os
import socket
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __name__ == "__main__":
    # Python puts this folder first; what is imported lies beside it, in the cookbook.
    sys.path[0] = str(Path(__file__).resolve().parents[1])

if TYPE_CHECKING:
    from pages.answer import Answerer
    from pages.jobs import Jobs

PORT = 8090
LLM = "nvidia/nemotron-nano-12b-v2-vl"  # in NVIDIA's catalogue


def main(argv: Sequence[str] | None = None) -> None:
    """Run with the options of a command line."""
    from demo import add_rerank, parser, start

    options = parser((__doc__ or "").splitlines()[0], "maximum pages of one file (default: 500)")
    options.add_argument("--pdf", type=Path, help="PDF or picture, or a folder of them")
    options.add_argument(
        "--max-tiles",
        type=int,
        choices=range(1, 13),
        metavar="1..12",
        help="maximum tiles of a page (default: that of the model)",
    )
    add_rerank(options)
    options.add_argument(
        "--host", default="127.0.0.1", help="interface to bind (default: %(default)s)"
    )
    options.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="host name by which browsers reach the app, in addition to IP addresses and names "
        "without a dot; repeatable (default: none)",
    )
    options.add_argument(
        "--port", type=int, default=PORT, help="port to bind (default: %(default)s)"
    )
    options.add_argument("--llm-url", help="address of a NIM with a vision language model")
    options.add_argument(
        "--llm-model",
        help=f"language model; without --llm-url, one of NVIDIA's catalogue, such as {LLM}",
    )
    start(serve, options, argv)


def serve(args: Namespace) -> None:
    """Say what runs and where, bring the first files in, and serve until Ctrl-C."""
    from chromadb.errors import ChromaError
    from demo import show
    from pages.app import create_app
    from pages.files import Files
    from pages.index import Index
    from pages.model import find_store, load_model, load_reranker

    from shared_engine.server.run import build_server

    with listen(args.host, args.port) as listener:
        model = load_model(args)
        folder = find_store(args, model) / "web"
        show("Store", f"Chroma and pictures in {os.path.relpath(folder)}")
        try:
            index = Index(folder / "index", model.embed_model)
        except ChromaError as exc:
            sys.exit(
                f"\nThe index does not work ({exc}). Delete the folder {folder / 'index'}; the "
                "next start builds it again from the files."
            )
        app = create_app(
            Files(folder / "files"),
            index,
            model=f"{model.path.name}{'' if model.is_trained else ', for a trial only'}",
            is_trained=model.is_trained,
            reranker=load_reranker(args),
            min_score=args.min_score,
            answerer=choose_answerer(args),
            allowed_hosts=(args.host, *args.allowed_host),
            **({"max_pages": args.limit} if args.limit else {}),
        )
        send_first(args, folder, app.state.jobs)
        host, port = listener.getsockname()[:2]
        show("Open", f"http://{f'[{host}]' if ':' in host else host}:{port} (Ctrl-C stops)")
        if not is_loopback(host):
            show("", "Whoever reaches this address can read, add and delete files.")
        sys.stdout.flush()
        build_server(app, log_level="warning").run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before a model is loaded in vain."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as exc:
        sys.exit(f"{host} port {port} cannot be bound ({exc.strerror}); use another --port.")


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach an address."""
    from ipaddress import ip_address

    return ip_address(host).is_loopback


def choose_answerer(args: Namespace) -> Answerer | None:
    """Return what answers questions, if a server or a model of NVIDIA's catalogue is named."""
    from chat import choose_server
    from pages.answer import Answerer

    server = choose_server(args.llm_url, args.llm_model)
    return Answerer(server) if server else None


def send_first(args: Namespace, folder: Path, jobs: Jobs) -> None:
    """Send the files that were asked for or, at the very first start, the handbook."""
    import handbook

    started = folder / "started"
    paths: list[Path] = []
    if args.pdf:
        paths = find_files(args.pdf)
        if not paths:
            raise FileNotFoundError(f"{args.pdf} has no PDF or picture in it")
    elif not started.exists():
        paths = handbook.write(args.store / "handbook")
    for path in paths:
        with path.open("rb") as file:
            job = jobs.receive(path.name, file)
        if job.state == "known":
            jobs.dismiss(job.id)
    started.touch()


def find_files(path: Path) -> list[Path]:
    """Return a file, or the PDFs and pictures of a folder; show files of other types."""
    from demo import show

    from shared_engine.images.formats import FORMATS
    from shared_engine.images.pages import SUFFIXES, walk

    if not path.is_dir():
        return [path]
    found, others = [], {}
    for file in map(Path, walk(path)):
        suffix = file.suffix.lower()
        if suffix in {".pdf", *SUFFIXES}:
            found.append(file)
        else:
            others.setdefault(suffix, file.name)
    if others:
        examples = ", ".join(others.values())
        show("Left out", f"files such as {examples}; expected PDF, {', '.join(FORMATS)}")
    return found


if __name__ == "__main__":
    main()
