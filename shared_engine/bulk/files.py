"""Files written as a whole or not at all."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shared_engine.errors import NeMoRetrieverError, OutputError

_TEMPORARY = ".tmp"
_NO_SYNC = (errno.EACCES, errno.EISDIR, errno.EBADF, errno.EINVAL)
"""Errors of Windows for opening a folder, and of some file systems for syncing one; the list is
that of PostgreSQL's `fsync_fname_ext`."""


@contextmanager
def writing(path: str) -> Iterator[None]:
    """Turn errors of the file system, also through Arrow, into an OutputError.

    Raises:
        OutputError: no space, no permission and the like.
    """
    try:
        yield
    except NeMoRetrieverError:  # some are OSErrors too
        raise
    except OSError as exc:
        reason = str(exc) if exc.errno is None else os.strerror(exc.errno)
        raise OutputError(
            f"{path} cannot be written: {reason}. "
            "What was finished is kept; the same command continues from there"
        ) from exc


@contextmanager
def write_atomically(path: str) -> Iterator[str]:
    """Yield a temporary name in a file's folder; rename it to `path` when all is written."""
    temporary = name_temporary(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(os.path.dirname(path))  # or a power failure may lose the name
    finally:
        Path(temporary).unlink(missing_ok=True)


def name_temporary(path: str) -> str:
    """Return a new hidden temporary name in the folder of a path."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{uuid.uuid4().hex}{_TEMPORARY}")


def remove_temporary(folder: str) -> None:
    """Remove the temporary files of processes that were killed; none may be writing now."""
    for path in Path(folder).glob(f".*{_TEMPORARY}"):
        path.unlink(missing_ok=True)


def _sync_folder(path: str) -> None:
    try:
        folder = os.open(path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as exc:
        if exc.errno not in _NO_SYNC:
            raise
