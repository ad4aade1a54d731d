"""`nemoretriever evaluate`: a model on a folder of your own, or on tasks of MTEB."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from shared_engine.cli.options import LOCAL, REMOTE, add_key, add_options, read_options
from shared_engine.endpoints import read_key
from shared_engine.errors import ConfigurationError
from shared_engine.options import Options
from shared_engine.vectors import EmbeddingType

_EPILOG = """\
FOLDER has corpus.jsonl, queries.jsonl and qrels/*.tsv, as BEIR's data sets do. A document is
{"_id": "d1", "title": "...", "text": "..."}, or has "image": "a path from the folder".
Vectors are embedded once, at full size, and kept; every size and number type is made of them.
"""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate` to the command line."""
    verb = commands.add_parser(
        "evaluate",
        help="measure retrieval on your own data, or on tasks of MTEB",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument("folder", nargs="?", type=Path, metavar="FOLDER", help="Data in BEIR's form.")
    add_options(verb, (*LOCAL, *REMOTE, "truncate"))
    add_key(verb)
    verb.add_argument(
        "--dimensions",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="Lengths of vectors, beside the full one.",
    )
    verb.add_argument(
        "--embedding-types",
        nargs="+",
        choices=get_args(EmbeddingType),
        default=["float", "int8", "binary"],
        metavar="TYPE",
        help="Number types of vectors: some of %(choices)s. Default: float int8 binary.",
    )
    verb.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="MODEL",
        help="Another model beside it: a name or folder, a server's URL, or st:NAME of "
        "sentence-transformers; may be repeated.",
    )
    verb.add_argument(
        "--split", metavar="NAME", help="Which file of qrels. Default: test, or the only one."
    )
    verb.add_argument("--no-bm25", action="store_true", help="Leave the row of BM25 out.")
    verb.add_argument(
        "--ignore-identical-ids",
        action="store_true",
        help="Let no query find the document of its own id, as ArguAna and Quora want it.",
    )
    verb.add_argument(
        "--cache", type=Path, metavar="FOLDER", help="Where vectors are kept. Default: the user's."
    )
    verb.add_argument("--json", type=Path, metavar="FILE", help="Write everything to this file.")
    verb.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="Draw quality against bytes per vector: .svg or .png.",
    )
    verb.add_argument(
        "--mteb",
        nargs="+",
        default=[],
        metavar="TASK",
        help="Run tasks of MTEB instead, or those of a row of the model cards: qa, miracl, mlqa, "
        "mldr, vidore. With the first of --dimensions and of --embedding-types.",
    )
    verb.add_argument(
        "--data", type=Path, metavar="FOLDER", help="With --mteb: a local copy, in BEIR's form."
    )
    # What a retrieval benchmark does with texts over a model's limit.
    verb.set_defaults(run=run, truncate="END", log_level="warning")


def run(args: argparse.Namespace) -> int:
    """Evaluate on a folder, or run tasks of MTEB."""
    for path in filter(None, (args.json, args.plot)):  # not when all is computed
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigurationError(
                f"{path} cannot be written: expected a file in a folder that is there"
            )
    options = read_options(args, (*LOCAL, *REMOTE, "truncate"), **_read_key(args))
    if args.mteb:
        return _run_tasks(args, options)
    if args.folder is None or args.data is not None:
        raise ConfigurationError("give a FOLDER to evaluate on, or --mteb TASK and its --data")
    from shared_engine.evaluate import EngineModel, evaluate, find_model
    from shared_engine.evaluate.report import check_plot, draw_plot, write_json, write_table

    if args.plot is not None:
        check_plot(args.plot)
    report = evaluate(
        args.folder,
        [EngineModel(options), *(find_model(name, options) for name in args.against)],
        dimensions=args.dimensions,
        embedding_types=args.embedding_types,
        split=args.split,
        cache=args.cache,
        bm25=not args.no_bm25,
        ignore_identical_ids=args.ignore_identical_ids,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(write_table(report))
    if args.json is not None:
        write_json(report, args.json)
    if args.plot is not None:
        draw_plot(report, args.plot)
    return 0


def _run_tasks(args: argparse.Namespace, options: Options) -> int:
    from shared_engine.evaluate import run_tasks, write_tasks

    options = options.replace(
        dimensions=next(iter(args.dimensions), None), embedding_type=args.embedding_types[0]
    )
    rows = run_tasks(args.mteb, options, args.data)
    print(write_tasks(rows))
    if args.json is not None:
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    return 0


def _read_key(args: argparse.Namespace) -> dict[str, str]:
    key = read_key(args.api_key_env)
    return {} if key is None else {"api_key": key}
