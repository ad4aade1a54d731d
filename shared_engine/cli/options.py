"""The engine's options as command-line arguments, made from `Options` and `RerankOptions`."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterable
from typing import Any, Literal, get_args, get_origin

from shared_engine.errors import ConfigurationError
from shared_engine.logs import LogFormat
from shared_engine.options import Options, RerankOptions

SHARED = ("device", "dtype", "max_tokens", "max_tiles", "max_batch_tokens")
"""Options of all models of a process."""
LOCAL = ("model", "checkpoint", "revision", *SHARED)
"""Options of a model in this process."""
VECTORS = ("dimensions", "embedding_type", "truncate")
"""Options of the returned vectors."""
REMOTE = ("base_url", "timeout", "max_retries", "max_batch_size", "concurrency", "prefixes")
"""Options of the client of a NIM."""


def add_options(parser: argparse.ArgumentParser, names: Iterable[str], **defaults: str) -> None:
    """Add arguments for some of the engine's options, with the type and help that they have.

    Args:
        defaults: Values of this command, instead of the engine's defaults.
    """
    for name in names:
        field, default = Options.model_fields[name], defaults.get(name)
        parser.add_argument(
            "--" + name.replace("_", "-"),
            default=default,
            help=_describe(field.description or "", default or field.default).replace("%", "%%"),
            **({"metavar": "URL"} if name == "base_url" else _argument(field.annotation)),
        )


def _describe(description: str, default: object) -> str:
    """Return the description of an option in terms of the command line, which has no None.

    >>> _describe("Length of a vector. None: the full size.", None)
    'Length of a vector. Default: the full size.'
    >>> _describe("Seconds per request. None: no limit.", 120.0)
    'Seconds per request. Default: 120.0.'
    """
    if default is None:
        return description.replace("None: ", "Default: ")
    return f"{re.sub(r' None: [^.]*[.]', '', description)} Default: {default}."


def _argument(annotation: Any) -> dict[str, Any]:
    """Return argparse's settings for an option of this type.

    >>> _argument(int | None), _argument(Literal["a", "b"]), _argument(str)
    ({'type': <class 'int'>, 'metavar': 'N'}, {'choices': ('a', 'b')}, {})
    >>> _argument(dict[str, str])["metavar"]
    'JSON'
    """
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    kinds = {annotation, *get_args(annotation)}
    if any(get_origin(kind) is dict for kind in kinds):
        return {"type": _parse_json, "metavar": "JSON"}
    for kind, metavar in ((int, "N"), (float, "SECONDS")):
        if kind in kinds:
            return {"type": kind, "metavar": metavar}
    return {}


def _parse_json(text: str) -> Any:
    """Return an object of JSON, or the text itself if it is no object."""
    try:
        return json.loads(text) if text.startswith("{") else text
    except ValueError as exc:
        raise argparse.ArgumentTypeError(f"{text!r} is not valid JSON: {exc}") from None


def add_reranker(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of a reranker; the options of `SHARED` are for it, too."""
    parser.add_argument(
        "--rerank-model",
        metavar="MODEL",
        help="Reranker: a name or alias of the catalogue, a Hugging Face id, or a folder. "
        "--device, --dtype and the --max options of a model apply to it, too. Without --model and "
        "--checkpoint there is no embedding model. Default: no reranker.",
    )
    parser.add_argument(
        "--rerank-checkpoint",
        metavar="FOLDER",
        help="Local folder or Hugging Face id of its weights. Default: those of --rerank-model.",
    )


def read_reranker(args: argparse.Namespace) -> RerankOptions | None:
    """Return the options of the reranker in this process; None if none was asked for.

    Raises:
        ConfigurationError: `--rerank-checkpoint` without `--rerank-model`.
    """
    if args.rerank_model is None:
        if args.rerank_checkpoint is not None:
            raise ConfigurationError("--rerank-checkpoint: expected --rerank-model with it")
        return None
    given = {"model": args.rerank_model, "checkpoint": args.rerank_checkpoint}
    return RerankOptions(**given, **find_given(args, SHARED), backend="local")


def add_key(parser: argparse.ArgumentParser, default: str = "NVIDIA_API_KEY") -> None:
    """Add the argument that names the environment variable with the API key."""
    parser.add_argument(
        "--api-key-env",
        metavar="VARIABLE",
        help=f"Environment variable that holds the API key. Default: {default}.",
    )


def add_served_name(parser: argparse.ArgumentParser) -> None:
    """Add the argument for the name under which a server serves the model."""
    parser.add_argument(
        "--served-name", metavar="NAME", help="Model name on the server. Default: that of --model."
    )


def add_logging(parser: argparse.ArgumentParser, level: str) -> None:
    """Add the arguments for the log of the command, with its default level."""
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default=level,
        help="Lowest level of the log lines. Default: %(default)s.",
    )
    parser.add_argument(
        "--log-format",
        choices=get_args(LogFormat),
        default="text",
        help="Format of log lines; json: one object per line. Default: %(default)s.",
    )


def read_options(args: argparse.Namespace, names: Iterable[str], **more: Any) -> Options:
    """Return the options of these names that were given, with `more` added."""
    return Options(**find_given(args, names), **more)


def find_given(args: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """Return the arguments of these names that were given."""
    values = {name: getattr(args, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}
