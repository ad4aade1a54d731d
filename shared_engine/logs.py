"""Log lines of the commands: one format with times, request ids, and no API keys."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Literal
from unicodedata import category

LogFormat = Literal["text", "json"]

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Id of the server's request that the current task computes."""

_CONTROLS = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
_JOINERS = "\u200c\u200d"
"""Format characters that shape letters, as in Persian, and emoji."""
_KEY = re.compile(r"nvapi-[\w-]+")


def mask_keys(text: str) -> str:
    """Return a text without NVIDIA's API keys.

    >>> mask_keys("there is no model nvapi-abc_1")
    'there is no model nvapi-***'
    """
    return _KEY.sub("nvapi-***", text)


def escape(text: str, keep: str = "") -> str:
    r"""Return a text with its control characters, which a terminal would obey, as escapes.

    Args:
        text: The text.
        keep: Control characters to keep.

    >>> print(escape("a\x1b[2J\nb\u202e\udcff é"))
    a\x1b[2J\nb\u202e\udcff é
    >>> escape("caf\u00e9\u00a0\u4eac") == "caf\u00e9\u00a0\u4eac"
    True
    >>> escape("two\nlines", keep="\n")
    'two\nlines'
    """
    if text.isprintable():
        return text
    keep += _JOINERS
    return "".join(c if c in keep or category(c) not in _CONTROLS else ascii(c)[1:-1] for c in text)


@contextmanager
def log_to_stderr(level: str, log_format: LogFormat) -> Iterator[None]:
    """Write the log lines of this package, and of uvicorn, to stderr while the block runs."""
    handler = logging.StreamHandler()
    handler.setFormatter(_JSONFormatter() if log_format == "json" else _TextFormatter())
    logs = [logging.getLogger(name) for name in ("shared_engine", "uvicorn")]
    before = [log.level for log in logs]
    for log in logs:
        log.addHandler(handler)
        log.setLevel(level.upper())
    try:
        yield
    finally:  # a program that calls a command keeps its own logging
        for log, old in zip(logs, before, strict=True):
            log.removeHandler(handler)
            log.setLevel(old)


def _format_time(record: logging.LogRecord) -> str:
    time = datetime.fromtimestamp(record.created, UTC)
    return time.isoformat(timespec="milliseconds").replace("+00:00", "Z")


class _TextFormatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - of logging
        line = f"{_format_time(record)} {record.levelname}: {escape(record.message)}"
        return line if (found := request_id.get()) is None else f"{line} [request {found}]"

    def format(self, record: logging.LogRecord) -> str:
        return mask_keys(super().format(record))


class _JSONFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": _format_time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if (found := request_id.get()) is not None:
            entry["request_id"] = found
        entry |= getattr(record, "fields", {})
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return mask_keys(json.dumps(entry))
