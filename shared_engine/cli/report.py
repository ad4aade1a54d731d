"""Errors of commands, as lines on standard error."""

from __future__ import annotations

import sys


def print_error(error: object) -> None:
    """Print an error in one line; names of files and ids in it cannot control the terminal."""
    print(f"nemoretriever: {escape(str(error))}", file=sys.stderr)


def escape(text: str) -> str:
    r"""Return a text with characters that are not printable, as line ends, as escapes.

    >>> print(escape("a\x1b[2J\nb\udcff é"))
    a\x1b[2J\nb\udcff é
    """
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
