"""Files written as a whole or not at all, in a folder that one run writes at a time."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from shared_engine.errors import ConfigurationError, NeMoRetrieverError, OutputError

_log = logging.getLogger("shared_engine")

LOCK = "run.lock"
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
            "Finished results are kept; run the same command again to continue"
        ) from exc


@contextmanager
def lock(folder: str) -> Iterator[None]:
    """Keep all other runs out of a folder while the block runs.

    The lock is `flock` on the file LOCK, which names host, process and start time. The kernel
    releases it when the process ends, killed or not, so a file that a dead process left locks
    nothing. It holds between hosts on NFS, where Linux asks the server, but not on a mount with
    `nolock` or `local_lock`. On a file system without locks, a warning is logged.

    Raises:
        ConfigurationError: another run holds the lock; names host, process and start time.
        OutputError: the folder or the file cannot be made.
    """
    path = os.path.join(folder, LOCK)
    with writing(path):
        os.makedirs(folder, exist_ok=True)
        Path(path).touch()
    with open(path, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter on some NFS
            file.seek(0)
            owner = file.read() or "another process"
            raise ConfigurationError(
                f"{folder} is in use by {owner}; wait until that run ends, or use another --out"
            ) from None
        except OSError as exc:
            _log.warning("%s cannot be locked (%s): start no other run into it", folder, exc)
        with writing(path):
            file.truncate(0)
            now = datetime.now(UTC)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {now:%F %T} UTC")
            file.flush()
        yield


@contextmanager
def write_atomically(path: str, replaces: bool = True) -> Iterator[str]:
    """Yield a temporary name in a file's folder; rename it to `path` when all is written.

    Args:
        path: the file.
        replaces: whether to replace a file that another process wrote to `path`, or to keep it.
    """
    temporary = name_temporary(path)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        if replaces or not _link(temporary, path):
            os.replace(temporary, path)
        _sync_folder(os.path.dirname(path))  # or a power failure may lose the name
    finally:
        Path(temporary).unlink(missing_ok=True)


def _link(temporary: str, path: str) -> bool:
    """Give a file a second name, if that is free; return False where there are no links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError:  # as on some network file systems
        return False
    return True


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
