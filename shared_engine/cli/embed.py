"""`nemoretriever embed`: embed files into files of vectors."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import fields

from shared_engine._lazy import needs_extra
from shared_engine.cli.options import (
    LOCAL,
    REMOTE,
    VECTORS,
    add_key,
    add_logging,
    add_options,
    find_given,
    read_options,
)
from shared_engine.cli.report import print_error
from shared_engine.endpoints import read_key

_HEADING_SECONDS, _PLAN_SECONDS = 2.0, 10.0
"""How long to measure the engine before a run, and for a plan."""
_OF_WORKERS = {
    "workers": (int, "Number of engines on the cluster. Default: one per GPU, or one per node."),
    "cpus_per_worker": (float, "Cores of each. Default: 1 with a GPU or NIM, else as many as fit."),
    "gpus_per_worker": (float, "GPUs of each. Default: 1 for a local model if a node has GPUs."),
}
"""Arguments of `run_ray`, with their type and help; each of them runs the job on a cluster."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    verb = commands.add_parser(
        "embed",
        help="embed files of texts, images or PDF pages into Parquet files of vectors",
        description="Embed the rows of tables (Parquet, Arrow, CSV, TSV, JSON Lines, lines of "
        ".txt; text also\nwith .gz, .zst or .bz2), folders of images, or the pages of PDF files. "
        "Running the same command\nagain resumes where it stopped.",
        epilog="examples:\n"
        "  nemoretriever embed table.parquet --text-column body --out vectors\n"
        "  nemoretriever embed scans --pdf both --out vectors --base-url http://localhost:8000/v1\n"
        "\nexit codes:\n"
        "  0  all rows have a vector, or were reported as failed by an earlier run\n"
        "  1  rows or files failed in this run: see errors.parquet\n"
        "  2  invalid usage or configuration, such as a folder with the results of another job\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="File, folder, quoted pattern such as 'data/**/*.csv', or URL of tables such as "
        "s3://bucket/folder. In folders, .txt is skipped.",
    )
    verb.add_argument(
        "--out",
        required=True,
        metavar="FOLDER",
        help="Folder of the results, vectors/*.parquet and errors.parquet, or its URL, such as "
        "s3://bucket/folder. An object store has no lock against runs of other machines: start one "
        "at a time.",
    )
    verb.add_argument(
        "--role",
        choices=("document", "query"),
        default="document",
        help="Whether the rows are documents or queries. Default: %(default)s.",
    )
    verb.add_argument(
        "--text-column",
        type=_split,
        metavar="NAME",
        help="Column of the texts, or several to join, such as title,text. Default: text, unless "
        "there is an image column.",
    )
    verb.add_argument(
        "--image-column",
        metavar="NAME",
        help="Column of images: bytes, paths from the table's folder, data URLs, or base64. "
        "Default: none.",
    )
    verb.add_argument(
        "--id-column",
        metavar="NAME",
        help="Column of the ids, which must be unique. Default: file name and row number.",
    )
    verb.add_argument(
        "--columns",
        type=_split,
        default=(),
        metavar="A,B",
        help="Columns to keep with the vectors; of images and PDFs: path and page. Default: none.",
    )
    verb.add_argument(
        "--types",
        type=_split_types,
        default={},
        metavar="NAME=TYPE,...",
        help="Arrow types of kept columns, such as price=double,day=date32; a value that is not of "
        "its type fails its row. Default: as in the file, which is text for CSV and JSON.",
    )
    verb.add_argument(
        "--delimiter",
        type=lambda text: "\t" if text == r"\t" else text,
        metavar="CHARACTER",
        help=r"Character between the fields of CSV files, such as ';' or '\t'. Default: a comma, "
        "in TSV files a tab. A first line such as sep=; in a file overrides it.",
    )
    verb.add_argument(
        "--no-quotes",
        dest="quotes",
        action="store_false",
        help="Take quotation marks in CSV and TSV files as text, which no field begins or ends "
        "with otherwise, as in the files of MS MARCO.",
    )
    verb.add_argument(
        "--header",
        type=_split,
        metavar="A,B",
        help="Names of the columns of CSV and TSV files without a line of names, such as id,text. "
        "Default: the first line.",
    )
    verb.add_argument(
        "--rows-per-file",
        type=int,
        metavar="N",
        help="Maximum number of rows in a file of vectors. Default: 10000, with images 500.",
    )
    verb.add_argument(
        "--pdf",
        choices=("picture", "text", "both"),
        default="picture",
        help="Part of a PDF page to embed: its image, its text, or both. Default: %(default)s.",
    )
    verb.add_argument("--strict", action="store_true", help="Stop at the first row that fails.")
    verb.add_argument(
        "--trust-sizes",
        action="store_true",
        help="Resume although the inputs moved, or have other modification times, if their names "
        "and sizes are the same.",
    )
    verb.add_argument(
        "--plan",
        action="store_true",
        help="Estimate rows, tokens, time and bytes from a sample, and embed nothing.",
    )
    verb.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="Embed on a Ray cluster. Default address: RAY_ADDRESS, or a new cluster on this "
        "machine; auto: the cluster that runs on this machine.",
    )
    for name, (kind, text) in _OF_WORKERS.items():
        verb.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)
    add_options(verb, (*LOCAL, *VECTORS, *REMOTE))
    add_key(verb)
    add_logging(verb, "warning")
    verb.set_defaults(run=run)


def _find_path(text: str) -> str:
    """Return the absolute path of an argument; a URL stays one."""
    return text if "://" in text else os.path.abspath(text)


def _split(text: str) -> tuple[str, ...]:
    """Return the names of columns in an argument."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _split_types(text: str) -> dict[str, str]:
    """Return the types of columns in an argument.

    >>> _split_types("price=double, day=date32")
    {'price': 'double', 'day': 'date32'}
    """
    pairs = (part.partition("=") for part in _split(text))
    return {name.strip(): kind.strip() for name, _, kind in pairs}


def run(args: argparse.Namespace) -> int:
    """Embed, or plan to; print a summary and return the exit code."""
    options = read_options(args, (*LOCAL, *VECTORS, *REMOTE), api_key=read_key(args.api_key_env))
    with needs_extra("bulk"):
        from shared_engine.bulk.job import Job
        from shared_engine.bulk.plan import plan
        from shared_engine.bulk.run import Work, find_work, run_local
    inputs = tuple(map(_find_path, args.inputs))
    settings = vars(args) | {"inputs": inputs, "out": _find_path(args.out), "options": options}
    job = Job(**{field.name: settings[field.name] for field in fields(Job)})
    share = find_given(args, _OF_WORKERS)
    if (share or args.ray is not None) and not args.plan:
        with needs_extra("ray"):
            from shared_engine.distributed.bulk import run_ray
        summary = run_ray(job, args.ray or None, **share)
    else:
        from shared_engine.embedder import Embedder

        with Embedder(options) as embedder:
            if args.plan:
                with tempfile.TemporaryDirectory() as folder:
                    work = find_work(job, folder)
                    print(plan(job, embedder, work, seconds=_PLAN_SECONDS))
                return 0

            def print_heading(work: Work) -> None:
                estimate = plan(job, embedder, work, seconds=_HEADING_SECONDS, most=0.05)
                print(estimate.heading, file=sys.stderr)

            summary = run_local(job, embedder, on_begin=print_heading)
    for each in summary.unread[:10]:
        print_error(each.error)
    if summary.failed or summary.unread:
        print_error(f"see {os.path.join(job.out, 'errors.parquet')}")
    print(summary)
    return 0 if summary.is_complete else 1
