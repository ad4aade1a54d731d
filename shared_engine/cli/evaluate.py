"""`nemoretriever evaluate`: measure a model on a data set in a folder, or on tasks of MTEB."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import get_args

from shared_engine.cli.options import (
    LOCAL,
    REMOTE,
    add_key,
    add_logging,
    add_options,
    read_options,
)
from shared_engine.endpoints import read_key
from shared_engine.errors import ConfigurationError
from shared_engine.options import Options
from shared_engine.vectors import EmbeddingType

_EPILOG = """\
FOLDER has corpus.jsonl, queries.jsonl and qrels/*.tsv, as BEIR's data sets have. A document is
{"_id": "d1", "title": "...", "text": "..."}, or has "image": "a path relative to the folder".
Documents are embedded once, at full size, and the vectors are kept; all sizes and number types are
computed from them. Second stages (--hybrid, --rescore, --rerank) are separate rows.

examples:
  nemoretriever evaluate data --dimensions 512 1024
  nemoretriever evaluate data --base-url http://localhost:8000/v1 --hybrid
  nemoretriever evaluate data --against st:intfloat/e5-small-v2
  nemoretriever evaluate --mteb SciFact
"""
_NEED_FOLDER = (
    *("against", "split", "no-bm25", "rerank", "hybrid", "rescore", "ignore-identical-ids"),
    *("candidates", "cache", "plot"),
)
"""Options that `--mteb` does not have."""


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `evaluate` to the command line."""
    verb = commands.add_parser(
        "evaluate",
        help="measure retrieval quality on your own data or on tasks of MTEB",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verb.add_argument(
        "folder", nargs="?", type=Path, metavar="FOLDER", help="Data set in BEIR's layout."
    )
    # retrieval benchmarks truncate texts over the model's limit
    add_options(verb, (*LOCAL, *REMOTE, "truncate"), truncate="END")
    add_key(verb)
    verb.add_argument(
        "--dimensions",
        type=int,
        nargs="+",
        default=[],
        metavar="N",
        help="Sizes of vectors, in addition to the full size. Default: the full size only.",
    )
    verb.add_argument(
        "--embedding-types",
        nargs="+",
        choices=get_args(EmbeddingType),
        default=[],
        metavar="TYPE",
        help="Number types of vectors, of %(choices)s. Default: float int8 binary.",
    )
    verb.add_argument(
        "--against",
        action="append",
        default=[],
        metavar="MODEL",
        help="Model to compare with: a name or folder, a server's URL, or st:NAME for "
        "sentence-transformers. Repeatable. Default: none.",
    )
    verb.add_argument(
        "--split",
        metavar="NAME",
        help="Judgements to use: qrels/NAME.tsv. Default: test, or the only file.",
    )
    verb.add_argument("--no-bm25", action="store_true", help="Omit the row for BM25.")
    verb.add_argument(
        "--rerank",
        action="append",
        default=[],
        metavar="MODEL",
        help="Reranker that reorders the first candidates of the first search, in a row with its "
        "seconds per query: a name or folder, or a server's URL. Repeatable. Default: none.",
    )
    verb.add_argument(
        "--hybrid",
        action="store_true",
        help="Add a row for the first search and BM25 together, by reciprocal rank fusion.",
    )
    verb.add_argument(
        "--rescore",
        action="store_true",
        help="Add a row for each size: a search with bits, its first candidates ordered by the "
        "full vectors.",
    )
    verb.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help="Documents of a query that --rerank and --rescore order; the others follow in the "
        "order of the search. Default: 100.",
    )
    verb.add_argument(
        "--ignore-identical-ids",
        action="store_true",
        help="Exclude documents with the same id as the query (ArguAna, Quora).",
    )
    verb.add_argument(
        "--cache",
        type=Path,
        metavar="FOLDER",
        help="Folder that keeps the vectors. Default: ~/.cache/nemoretriever/evaluate.",
    )
    verb.add_argument(
        "--json", type=Path, metavar="FILE", help="Write the report as JSON. Default: no file."
    )
    verb.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="Draw quality by bytes per vector as .svg or .png. Default: no file.",
    )
    verb.add_argument(
        "--mteb",
        nargs="+",
        default=[],
        metavar="TASK",
        help="Tasks of MTEB to run instead of FOLDER, such as NQ or MLQARetrieval. They accept one "
        "of --dimensions and one of --embedding-types. Default: none.",
    )
    verb.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="Data of the only --mteb task, in BEIR's layout: its splits, or "
        "else test or the only one. Default: downloaded by MTEB.",
    )
    verb.set_defaults(run=run)
    add_logging(verb, "warning")


def run(args: argparse.Namespace) -> int:
    """Evaluate on a folder, or run tasks of MTEB."""
    _check_usage(args)
    options = read_options(args, (*LOCAL, *REMOTE, "truncate"), api_key=read_key(args.api_key_env))
    return _run_tasks(args, options) if args.mteb else _evaluate(args, options)


def _evaluate(args: argparse.Namespace, options: Options) -> int:
    from shared_engine.evaluate import EngineModel, evaluate, find_model, find_reranker
    from shared_engine.evaluate.report import draw_plot, write_table

    report = evaluate(
        args.folder,
        [EngineModel(options), *(find_model(name, options) for name in args.against)],
        dimensions=args.dimensions,
        embedding_types=args.embedding_types or ("float", "int8", "binary"),
        split=args.split,
        cache=args.cache,
        bm25=not args.no_bm25,
        rerankers=[find_reranker(name, options) for name in args.rerank],
        hybrid=args.hybrid,
        rescored=args.rescore,
        candidates=100 if args.candidates is None else args.candidates,
        ignore_identical_ids=args.ignore_identical_ids,
        progress=lambda line: print(line, file=sys.stderr),
    )
    print(write_table(report))
    _write_json(report.to_dict(), args.json)
    if args.plot is not None:
        draw_plot(report, args.plot)
    return 0


def _check_usage(args: argparse.Namespace) -> None:
    for path in filter(None, (args.json, args.plot)):  # before anything is computed
        if path.is_dir() or not path.parent.is_dir():
            raise ConfigurationError(
                f"{path} cannot be written: expected a file in an existing folder"
            )
    if args.plot and args.plot.suffix.lower() not in (".svg", ".png"):
        raise ConfigurationError(f"--plot {args.plot}: expected a name with suffix .svg or .png")
    if bool(args.mteb) == bool(args.folder) or (args.data and args.folder):
        raise ConfigurationError("expected FOLDER, or --mteb TASK with an optional --data")
    if not args.mteb:
        return
    for name in _NEED_FOLDER:
        if getattr(args, name.replace("-", "_")):
            raise ConfigurationError(f"--{name} needs FOLDER, not --mteb")
    for name in ("dimensions", "embedding-types"):
        if len(values := getattr(args, name.replace("-", "_"))) > 1:
            raise ConfigurationError(f"--{name} {values}: expected one value with --mteb")


def _run_tasks(args: argparse.Namespace, options: Options) -> int:
    from shared_engine.evaluate import run_tasks, write_tasks

    options = options.replace(
        dimensions=next(iter(args.dimensions), None),
        embedding_type=next(iter(args.embedding_types), "float"),
    )
    rows = run_tasks(args.mteb, options, args.data)
    print(write_tasks(rows))
    _write_json(rows, args.json)
    return 0


def _write_json(content: object, path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
