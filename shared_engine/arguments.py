"""The engine's options on a command line: one description of each, for every command."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from typing import Any, get_args

from shared_engine.catalogue import DEFAULT_MODEL
from shared_engine.errors import ConfigurationError
from shared_engine.options import DType, Options, Truncate
from shared_engine.vectors import EmbeddingType

_NUMBER: dict[str, Any] = {"type": int, "metavar": "N"}
_HOW: dict[str, dict[str, Any]] = {
    "dtype": {"choices": get_args(DType)},
    "max_tokens": _NUMBER,
    "max_tiles": _NUMBER,
    "tokens_per_step": _NUMBER,
    "dimensions": _NUMBER,
    "embedding_type": {"choices": get_args(EmbeddingType)},
    "truncate": {"choices": get_args(Truncate)},
    "base_url": {"metavar": "URL"},
    "timeout": {"type": float, "metavar": "SECONDS"},
    "max_retries": _NUMBER,
    "max_batch_size": _NUMBER,
    "concurrency": _NUMBER,
}
"""What argparse has to know of an option that is no plain text."""

HERE = (
    "model", "checkpoint", "revision", "device", "dtype", "max_tokens", "max_tiles",
    "tokens_per_step",
)  # fmt: skip
"""Options of a model in this process."""
VECTORS = ("dimensions", "embedding_type", "truncate")
"""Options of what the vectors look like."""
THERE = ("base_url", "timeout", "max_retries", "max_batch_size", "concurrency")
"""Options of a NIM's client."""


def add_options(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """Let a command take some of the engine's options, described as they are there."""
    for name in names:
        text = Options.model_fields[name].description or ""
        default = f" Default: {DEFAULT_MODEL}." if name == "model" else ""
        parser.add_argument(
            "--" + name.replace("_", "-"),
            help=(text + default).replace("%", "%%"),
            **_HOW.get(name, {}),
        )


def add_key(parser: argparse.ArgumentParser) -> None:
    """Let a command take a key, by the name of the variable that holds it."""
    parser.add_argument(
        "--api-key-env", metavar="VARIABLE", help="Environment variable with the server's key."
    )


def read_options(asked: argparse.Namespace, names: Iterable[str], **more: Any) -> Options:
    """Return the options that were given of these names, and `more` of them."""
    values = {name: getattr(asked, name) for name in names}
    given = {name: value for name, value in values.items() if value is not None}
    return Options(**given, **more)


def read_key(asked: argparse.Namespace) -> str | None:
    """Return the key; None where no variable was named.

    Raises:
        ConfigurationError: the variable is not set, or empty.
    """
    if asked.api_key_env is None:
        return None
    key = os.environ.get(asked.api_key_env, "").strip()
    if not key:
        raise ConfigurationError(f"--api-key-env: {asked.api_key_env} is not set, or empty")
    return key
