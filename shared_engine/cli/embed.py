"""`nemoretriever embed`: files of documents to files of vectors."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile

from shared_engine.bulk import needs_extra
from shared_engine.cli.options import (
    LOCAL,
    REMOTE,
    VECTORS,
    add_key,
    add_log_level,
    add_options,
    read_options,
)
from shared_engine.endpoints import read_key

_HEADING_SECONDS, _PLAN_SECONDS = 2.0, 10.0
"""How long the engine is measured before a run, and for a plan."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to those of the command line."""
    verb = commands.add_parser(
        "embed",
        help="embed files: tables, pictures or PDFs, into Parquet files of vectors",
        description="Embed Parquet, Arrow, CSV or JSON Lines files, folders of pictures, or PDF "
        "files. The same command again does what is missing and only that. Status 0: every row "
        "has a vector; 1: some failed; 2: the command makes no sense.",
    )
    verb.add_argument("inputs", nargs="+", metavar="INPUT", help="A file or a folder.")
    verb.add_argument(
        "--out", required=True, metavar="FOLDER", help="Where vectors/*.parquet are to be."
    )
    verb.add_argument("--role", choices=("document", "query"), default="document")
    verb.add_argument("--text-column", metavar="NAME", help="Default: text.")
    verb.add_argument("--image-column", metavar="NAME", help="Images as bytes, paths or data URLs.")
    verb.add_argument("--id-column", metavar="NAME", help="Default: ids are made of file and row.")
    verb.add_argument(
        "--columns",
        type=lambda text: tuple(name.strip() for name in text.split(",") if name.strip()),
        default=(),
        metavar="A,B",
        help="Columns to keep beside the vectors; of pictures path, of PDFs path and page.",
    )
    verb.add_argument(
        "--rows-per-file",
        type=int,
        metavar="N",
        help="The most rows in a file of vectors. Default: 10000 of texts, 500 with images.",
    )
    verb.add_argument(
        "--pdf",
        choices=("picture", "text", "both"),
        default="picture",
        help="What of a page is embedded. Default: %(default)s.",
    )
    verb.add_argument("--strict", action="store_true", help="Stop at the first bad row.")
    verb.add_argument(
        "--plan", action="store_true", help="Measure, say what it would take, and stop."
    )
    verb.add_argument(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="Embed on a Ray cluster; without an address the one that is there, or a new one.",
    )
    verb.add_argument("--workers", type=int, metavar="N", help="Engines on the cluster.")
    verb.add_argument("--gpus-per-worker", type=float, metavar="G")
    add_options(verb, (*LOCAL, *VECTORS, *REMOTE))
    add_key(verb)
    add_log_level(verb, "warning")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Embed, or plan to; say at the end what was done."""
    key = read_key(args.api_key_env)
    options = read_options(
        args, (*LOCAL, *VECTORS, *REMOTE), **({} if key is None else {"api_key": key})
    )
    with needs_extra("bulk"):
        from shared_engine.bulk.job import Job
        from shared_engine.bulk.plan import plan
        from shared_engine.bulk.run import begin, find_work, run_local
    job = Job(
        inputs=tuple(os.path.abspath(path) for path in args.inputs),
        out=os.path.abspath(args.out),
        options=options,
        role=args.role,
        text_column=args.text_column,
        image_column=args.image_column,
        id_column=args.id_column,
        columns=args.columns,
        rows_per_file=args.rows_per_file,
        pdf=args.pdf,
        strict=args.strict,
    )
    if args.ray is not None and not args.plan:
        with needs_extra("ray"):
            from shared_engine.distributed.bulk import run_ray
        address = None if args.ray == "auto" else args.ray
        summary = run_ray(job, address, workers=args.workers, gpus_per_worker=args.gpus_per_worker)
    else:
        from shared_engine.embedder import Embedder

        with Embedder(options) as embedder:
            if args.plan:
                with tempfile.TemporaryDirectory() as folder:
                    work = find_work(job, folder)
                    print(plan(job, embedder, work, seconds=_PLAN_SECONDS))
                return 0
            work = begin(job)
            estimate = plan(job, embedder, work, seconds=_HEADING_SECONDS, most=0.05)
            print(estimate.heading, file=sys.stderr)
            summary = run_local(job, embedder, work=work)
    for each in summary.unread[:10]:
        print(f"nemoretriever: {each.error}", file=sys.stderr)
    if summary.failed or summary.unread:
        print(f"nemoretriever: see {os.path.join(job.out, 'errors.parquet')}", file=sys.stderr)
    print(summary)
    return 0 if summary.is_complete else 1
