"""The command line: `nemoretriever serve` and `nemoretriever check`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, get_args

from pydantic import ValidationError

from shared_engine._version import __version__
from shared_engine.catalogue import DEFAULT_MODEL
from shared_engine.check import check
from shared_engine.errors import ConfigurationError, MissingExtraError, NeMoRetrieverError
from shared_engine.options import DType, Options
from shared_engine.server.limits import ServerLimits

_ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {},
    "checkpoint": {},
    "revision": {},
    "device": {},
    "dtype": {"choices": get_args(DType)},
    "max_tokens": {"type": int, "metavar": "N"},
    "max_tiles": {"type": int, "metavar": "N"},
    "tokens_per_step": {"type": int, "metavar": "N"},
}
"""The options of a model in this process, and what argparse has to know of each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 where it failed, 2 where it made no sense."""
    asked = _parser().parse_args(arguments)
    _log_to_stderr(asked.log_level)
    try:
        return int(asked.run(asked))
    except ValidationError as exc:
        error = exc.errors()[0]
        option = "".join(f"--{part}: ".replace("_", "-") for part in error["loc"][:1])
        print(f"nemoretriever: {option}{error['msg']}", file=sys.stderr)
        return 2
    except NeMoRetrieverError as exc:
        print(f"nemoretriever: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, (ConfigurationError, MissingExtraError)) else 1
    except KeyboardInterrupt:
        return 130


def _log_to_stderr(level: str) -> None:
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log = logging.getLogger("shared_engine")  # others' loggers say the same things in their way
    log.addHandler(lines)
    log.setLevel(level.upper())


def _serve(asked: argparse.Namespace) -> int:
    """Serve a model until a signal comes, then finish what was accepted."""
    from shared_engine.server import serve

    limits = {limit.name: getattr(asked, limit.name) for limit in fields(ServerLimits)}
    working = serve(
        _read_local_options(asked),
        host=asked.host,
        port=asked.port,
        served_name=asked.served_name,
        api_key=_read_key(asked),
        limits=ServerLimits(**limits),
        allowed_hosts=asked.allowed_host,
        log_level=asked.log_level,
        access_log=asked.access_log,
    )
    return 0 if working else 1  # the log has it


def _check(asked: argparse.Namespace) -> int:
    """Say what runs here and what a server gives, and whether the two are interchangeable."""
    base_url = asked.base_url or os.environ.get("NVIDIA_BASE_URL")
    is_local = not base_url or asked.model or asked.checkpoint
    same = check(
        _read_local_options(asked) if is_local else None,
        base_url,
        served_name=asked.served_name,
        api_key=_read_key(asked),
    )
    return 0 if same else 1


def _read_local_options(asked: argparse.Namespace) -> Options:
    """Return the options that were given, of a model in this process."""
    values = {name: getattr(asked, name) for name in _ENGINE_OPTIONS}
    given = {name: value for name, value in values.items() if value is not None}
    return Options(backend="local", **given)


def _read_key(asked: argparse.Namespace) -> str | None:
    if asked.api_key_env is None:
        return None
    key = os.environ.get(asked.api_key_env)
    if not key:
        raise ConfigurationError(f"--api-key-env: {asked.api_key_env} is not set, or empty")
    return key


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemoretriever", description="NVIDIA NeMo Retriever embeddings."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    common = argparse.ArgumentParser(add_help=False)
    for name, extra in _ENGINE_OPTIONS.items():
        text = Options.model_fields[name].description or ""
        default = f" Default: {DEFAULT_MODEL}." if name == "model" else ""
        help_ = (text + default).replace("%", "%%")
        common.add_argument("--" + name.replace("_", "-"), help=help_, **extra)
    common.add_argument(
        "--served-name",
        metavar="NAME",
        help="The model's name on the server, where it has another.",
    )
    common.add_argument(
        "--api-key-env", metavar="VARIABLE", help="Environment variable with the server's key."
    )
    level: dict[str, Any] = {
        "choices": ("debug", "info", "warning", "error"),
        "help": "Default: %(default)s.",
    }

    verb = commands.add_parser(
        "serve", parents=[common], help="serve a model over HTTP as a NIM does"
    )
    verb.add_argument("--host", default="127.0.0.1", help="Default: %(default)s, itself only.")
    verb.add_argument("--port", type=int, default=8000, help="Default: %(default)s.")
    verb.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="A name under which the server may be asked without a key, beside localhost and its "
        "addresses; may be repeated, and be a pattern: *.example.com.",
    )
    for limit in fields(ServerLimits):
        verb.add_argument(
            "--" + limit.name.replace("_", "-"),
            type=type(limit.default),
            default=limit.default,
            metavar="N",
            help=f"{limit.metadata['help']} Default: %(default)s.",
        )
    verb.add_argument("--access-log", action="store_true", help="Print a line for every request.")
    verb.add_argument("--log-level", default="info", **level)
    verb.set_defaults(run=_serve)

    verb = commands.add_parser(
        "check",
        parents=[common],
        help="say what runs here, what a server gives, and whether the two are interchangeable",
    )
    verb.add_argument(
        "--base-url",
        metavar="URL",
        help="A server to check; with --model or --checkpoint, also against the model here.",
    )
    verb.add_argument("--log-level", default="warning", **level)
    verb.set_defaults(run=_check)
    return parser


if __name__ == "__main__":
    sys.exit(main())
