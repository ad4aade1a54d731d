"""Files written as a whole or not at all, in a folder that one run writes at a time.

A folder is a path, or a URL of an object store, where an object appears when its upload ends.
"""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from pyarrow import fs

from shared_engine._cache import find_cache
from shared_engine.bulk.urls import is_url, locate
from shared_engine.errors import ConfigurationError, NeMoRetrieverError, OutputError, first_line

_log = logging.getLogger("shared_engine")

TEMPORARY = ".tmp"
"""Suffix of temporary files and folders; their names begin with a dot."""


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
    except (OSError, NotImplementedError) as exc:  # the latter of a file system without writes
        errno_ = getattr(exc, "errno", None)
        reason = first_line(exc).rstrip(".") if errno_ is None else os.strerror(errno_)
        raise OutputError(
            f"{path} cannot be written: {reason}. "
            "Finished results are kept; run the same command again to continue"
        ) from exc


@contextmanager
def lock(folder: str) -> Iterator[None]:
    """Keep all other runs out of a folder while the block runs.

    The lock is `flock` on the file run.lock, which names host, process and start time. The kernel
    releases it when the process ends, killed or not, so a file that a dead process left locks
    nothing. It holds between hosts on NFS, where Linux asks the server, but not on a mount with
    `nolock` or `local_lock`. On a file system without locks, a warning is logged. An object store
    has no locks: there the file is in the user's cache, and keeps out runs of this machine only.

    Raises:
        ConfigurationError: another run holds the lock; names host, process and start time.
        OutputError: the folder or the file cannot be made.
    """
    path = os.path.join(folder, "run.lock")
    if is_url(folder):
        name = sha256(folder.encode()).hexdigest()[:16]
        path = str(find_cache("locks") / f"{name}.lock")
    with writing(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
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
def write_atomically(path: str) -> Iterator[str]:
    """Yield the name of a local file; when all is written, it becomes the file `path`.

    In a folder, the local file is next to it and is renamed; to an object store, it is uploaded.
    """
    if is_url(path):
        with tempfile.TemporaryDirectory(prefix="nemoretriever-") as folder:
            yield (upload := os.path.join(folder, "upload"))
            system, inner = locate(path)
            fs.copy_files(upload, inner, fs.LocalFileSystem(), system)
        return
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{uuid.uuid4().hex}{TEMPORARY}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def make_folder(path: str) -> None:
    """Make a folder and those above it."""
    system, inner = locate(path)
    system.create_dir(inner, recursive=True)


def list_names(folder: str) -> list[str]:
    """Return the names of the Parquet files in a folder, sorted; none if it is not there."""
    if is_url(folder):
        system, inner = locate(folder)
        found = system.get_file_info(fs.FileSelector(inner, allow_not_found=True))
        names = [info.base_name for info in found if info.is_file]
    else:  # pyarrow would ask for the size of each: slow on a network file system
        names = os.listdir(folder) if os.path.isdir(folder) else []
    return sorted(name for name in names if name.endswith(".parquet") and name[0] != ".")


def read_bytes(path: str) -> bytes | None:
    """Return the bytes of a file; None if it is not there."""
    system, inner = locate(path)
    if system.get_file_info(inner).type is fs.FileType.NotFound:
        return None
    with system.open_input_stream(inner) as file:
        return bytes(file.read())


def remove(path: str) -> None:
    """Remove a file or a folder, if it is there."""
    system, inner = locate(path)
    kind = system.get_file_info(inner).type
    if kind is fs.FileType.Directory:
        system.delete_dir(inner)
    elif kind is fs.FileType.File:
        system.delete_file(inner)
