"""Errors of commands, as lines on standard error."""

from __future__ import annotations

import sys

from shared_engine.logs import escape, mask_keys


def print_error(error: object) -> None:
    """Print an error in one line, with control characters as escapes and without API keys."""
    print(f"nemoretriever: {mask_keys(escape(str(error)))}", file=sys.stderr)
