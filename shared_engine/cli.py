"""The command line: `nemoretriever serve` and `nemoretriever check`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from shared_engine._version import __version__
from shared_engine.catalogue import DEFAULT_MODEL
from shared_engine.check import ENGINE_OPTIONS, check, given_options, read_key
from shared_engine.errors import ConfigurationError, MissingExtraError, NeMoRetrieverError
from shared_engine.options import Options
from shared_engine.server.protocol import Limits


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


def serve(asked: argparse.Namespace) -> int:
    """Serve a model until a signal comes, then finish what was accepted."""
    try:
        import uvicorn
    except ModuleNotFoundError as exc:
        raise MissingExtraError(
            "the server needs 'uvicorn': pip install 'nemoretriever-embeddings[server]'"
        ) from exc
    from shared_engine.server.app import create_app

    failures: list[Exception] = []

    def stop(error: Exception) -> None:
        failures.append(error)
        server.should_exit = True

    os.environ.pop("NVIDIA_BASE_URL", None)  # the model runs here, not at another server
    key = read_key(asked)
    if key is None and asked.host not in ("127.0.0.1", "localhost", "::1"):
        logging.getLogger("shared_engine").warning(
            "anybody who reaches %s can use this server; --api-key-env names a key", asked.host
        )
    app = create_app(
        Options(**given_options(asked)),
        served_name=asked.served_name,
        api_key=key,
        limits=Limits(**{limit.name: getattr(asked, limit.name) for limit in fields(Limits)}),
        on_failure=stop,
    )
    config = uvicorn.Config(
        app,
        host=asked.host,
        port=asked.port,
        lifespan="on",
        ws="none",
        timeout_keep_alive=75,  # longer than clients keep theirs, so that they close first
        server_header=False,
        access_log=asked.access_log,
        log_level=asked.log_level,
    )
    server = uvicorn.Server(config)
    server.run()
    return 1 if failures else 0  # the log has it


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemoretriever", description="NVIDIA NeMo Retriever embeddings."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    common = argparse.ArgumentParser(add_help=False)
    for name, extra in ENGINE_OPTIONS.items():
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
    for limit in fields(Limits):
        verb.add_argument(
            "--" + limit.name.replace("_", "-"),
            type=type(limit.default),
            default=limit.default,
            metavar="N",
            help=f"{limit.metadata['help']} Default: %(default)s.",
        )
    verb.add_argument("--access-log", action="store_true", help="Print a line for every request.")
    verb.add_argument("--log-level", default="info", **level)
    verb.set_defaults(run=serve)

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
    verb.set_defaults(run=check)
    return parser


if __name__ == "__main__":
    sys.exit(main())
