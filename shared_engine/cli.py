"""The command line: `nemoretriever serve`, `check`, `embed` and `evaluate`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from pydantic import ValidationError

from shared_engine._version import __version__
from shared_engine.arguments import HERE, add_key, add_options, read_key, read_options
from shared_engine.bulk.command import add_command as add_embed
from shared_engine.check import check
from shared_engine.errors import ConfigurationError, MissingExtraError, NeMoRetrieverError
from shared_engine.evaluate.command import add_command as add_evaluate
from shared_engine.server.limits import ServerLimits


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0, 1 where it failed, 2 where it made no sense."""
    asked = _parser().parse_args(arguments)
    try:
        with _log_to_stderr(asked.log_level):
            return int(asked.run(asked))
    except ValidationError as exc:
        error = exc.errors()[0]
        option = "".join(f"--{part}: ".replace("_", "-") for part in error["loc"][:1])
        print(f"nemoretriever: {option}{error['msg']}", file=sys.stderr)
        return 2
    except NeMoRetrieverError as exc:
        print(f"nemoretriever: {exc}", file=sys.stderr)
        return 2 if isinstance(exc, (ConfigurationError, MissingExtraError)) else 1
    except OSError as exc:  # a disk that is full, a folder that may not be written
        print(f"nemoretriever: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


@contextmanager
def _log_to_stderr(level: str) -> Iterator[None]:
    lines = logging.StreamHandler()
    lines.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    log = logging.getLogger("shared_engine")  # others' loggers say the same things in their way
    before = log.level
    log.addHandler(lines)
    log.setLevel(level.upper())
    try:
        yield
    finally:  # a program that calls `main` keeps its own way of logging
        log.removeHandler(lines)
        log.setLevel(before)


def _serve(asked: argparse.Namespace) -> int:
    """Serve a model until a signal comes, then finish what was accepted."""
    if asked.replicas or asked.max_replicas:
        return _serve_replicas(asked)
    from shared_engine.server import serve

    working = serve(
        read_options(asked, HERE, backend="local"),
        host=asked.host,
        port=asked.port,
        served_name=asked.served_name,
        api_key=read_key(asked),
        limits=_read_limits(asked),
        allowed_hosts=asked.allowed_host,
        log_level=asked.log_level,
        access_log=asked.access_log,
    )
    return 0 if working else 1  # the log has it


def _serve_replicas(asked: argparse.Namespace) -> int:
    from shared_engine.bulk.serving import Replicas, serve_replicas

    read_key(asked)  # said here rather than by every replica
    settings = Replicas(
        options=read_options(asked, HERE, backend="local"),
        served_name=asked.served_name,
        allowed_hosts=tuple(asked.allowed_host),
        limits=_read_limits(asked),
        api_key_env=asked.api_key_env,
        replicas=asked.replicas or 1,
        max_replicas=asked.max_replicas,
        cpus_per_replica=asked.cpus_per_replica,
        gpus_per_replica=asked.gpus_per_replica,
    )
    serve_replicas(settings, address=asked.ray, host=asked.host, port=asked.port)
    return 0


def _read_limits(asked: argparse.Namespace) -> ServerLimits:
    return ServerLimits(
        **{limit.name: getattr(asked, limit.name) for limit in fields(ServerLimits)}
    )


def _check(asked: argparse.Namespace) -> int:
    """Say what runs here and what a server gives, and whether the two are interchangeable."""
    base_url = asked.base_url or os.environ.get("NVIDIA_BASE_URL")
    is_local = not base_url or asked.model or asked.checkpoint
    same = check(
        read_options(asked, HERE, backend="local") if is_local else None,
        base_url,
        served_name=asked.served_name,
        api_key=read_key(asked),
    )
    return 0 if same else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nemoretriever", description="NVIDIA NeMo Retriever embeddings."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")

    common = argparse.ArgumentParser(add_help=False)
    add_options(common, HERE)
    common.add_argument(
        "--served-name",
        metavar="NAME",
        help="The model's name on the server, where it has another.",
    )
    add_key(common)
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
    for name, kind, text in (
        ("replicas", int, "Serve as many of them behind one address, with Ray Serve."),
        ("max-replicas", int, "As many where the load wants it, and --replicas at least."),
        ("cpus-per-replica", float, "Cores of each. Default: all of them, shared out."),
        ("gpus-per-replica", float, "GPUs of each, or a part of one. Default: 1, if there are."),
    ):
        verb.add_argument(f"--{name}", type=kind, metavar="N", help=text)
    verb.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="The cluster for replicas. Default: RAY_ADDRESS, or one on this machine.",
    )
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

    add_embed(commands)
    add_evaluate(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
