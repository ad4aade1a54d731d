"""Folders of this package in the user's cache."""

from __future__ import annotations

import os
from pathlib import Path


def find_cache(name: str) -> Path:
    """Return the folder for one purpose; it may not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nemoretriever" / name
