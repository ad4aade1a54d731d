"""Parse the command line, run a command, and turn errors into exit codes."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from pydantic import ValidationError

from shared_engine._version import __version__
from shared_engine.cli import check, embed, evaluate, serve
from shared_engine.cli.report import print_error
from shared_engine.errors import ConfigurationError, MissingExtraError, NeMoRetrieverError
from shared_engine.logs import escape, log_to_stderr, mask_keys

_EPILOG = """\
examples:
  nemoretriever serve nvidia/llama-nemotron-embed-1b-v2
  nemoretriever check --base-url http://localhost:8000/v1
  nemoretriever COMMAND --help

exit codes:
  0  success
  1  the command ran and failed, at some inputs or at all of them
  2  invalid usage or configuration
"""

_INTERRUPTED = 130
"""Exit code of shells for a command that SIGINT ended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        arguments: The command line without the program's name; None reads `sys.argv`.
    """
    if arguments is None:  # the process is this command
        signal.signal(signal.SIGINT, _interrupt)
        sys.excepthook = _print_traceback
    args = build_parser().parse_args(arguments)
    try:
        with log_to_stderr(args.log_level, args.log_format):
            return int(args.run(args))
    except ValidationError as exc:
        error = exc.errors()[0]
        option = "".join(f"--{part}: ".replace("_", "-") for part in error["loc"][:1])
        reason = error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        print_error(f"{option}{reason}")
        return 2
    except (NeMoRetrieverError, OSError) as exc:  # a full disk, a folder without write permission
        print_error(exc)
        return 2 if isinstance(exc, (ConfigurationError, MissingExtraError)) else 1
    except KeyboardInterrupt:
        return _INTERRUPTED


def _interrupt(*_: object) -> NoReturn:
    """Stop the command in order; a second interrupt ends the process immediately."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(_INTERRUPTED))
    raise KeyboardInterrupt


def _print_traceback(*error: Any) -> None:
    """Print the traceback of an unexpected error, without API keys."""
    sys.stderr.write(mask_keys("".join(traceback.format_exception(*error))))


class _Parser(argparse.ArgumentParser):
    """Reports invalid usage in one line, instead of all usage, and names a misspelt option."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = super().parse_known_args(args, namespace)
        for word in unknown:
            from difflib import get_close_matches  # imported only for a wrong option

            options = [option for action in self._actions for option in action.option_strings]
            name = word.partition("=")[0]
            if similar := name.startswith("--") and get_close_matches(name, options, n=1):
                self.error(f"unknown option {name}; did you mean {similar[0]}?")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {mask_keys(escape(message))}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of all commands; each sets `run`, called with the parsed arguments."""
    parser = _Parser(
        prog="nemoretriever",
        description="Embed, serve, compare and evaluate with NVIDIA NeMo Retriever models.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for command in (serve, check, embed, evaluate):
        command.add_command(commands)
    return parser
