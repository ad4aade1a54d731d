"""Files by path or URL: s3://, gs://, hf:// and the other file systems of pyarrow and fsspec."""

from __future__ import annotations

import glob
import os
from fnmatch import fnmatchcase
from functools import cache
from typing import Any
from urllib.request import url2pathname

import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from shared_engine.errors import ConfigurationError, first_line

OPTIONS_HINT = "options after ? are not read: set AWS_ENDPOINT_URL and the like"


def is_url(path: str) -> bool:
    """Return whether it is a URL, and not a local path."""
    return "://" in path


def find_path(url: str) -> str:
    """Return the path of a `file:///` URL; a path and any other URL stay as they are."""
    return url2pathname(url.removeprefix("file://")) if url.startswith("file:///") else url


def skips(pattern: str, path: str) -> bool:
    """Return whether a path has a hidden name that the pattern does not spell out.

    >>> skips("*/a.csv", "_old/a.csv"), skips("_o*/*.csv", "_old/a.csv")
    (True, False)
    """
    shown = [part for part in pattern.split("/") if is_hidden(part)]
    return any(
        is_hidden(name) and not any(fnmatchcase(name, part) for part in shown)
        for name in path.split("/")
    )


def locate(path: str) -> tuple[Any, str]:
    """Return the file system of a path or URL, and the path in it.

    Raises:
        ConfigurationError: there is no such file system, or it cannot be reached.
    """
    if not is_url(path):
        return fs.LocalFileSystem(), path
    scheme, _, rest = path.partition("://")
    host, slash, rest = rest.partition("/")
    system, base = _connect(f"{scheme}://{host}")
    return system, base.rstrip("/") + slash + rest


@cache
def _connect(url: str) -> tuple[Any, str]:
    try:
        try:
            return fs.FileSystem.from_uri(url)  # type: ignore[no-any-return]
        except pa.ArrowInvalid:
            return fs.FileSystem.from_uri(f"fsspec+{url}")  # type: ignore[no-any-return]
    except Exception as exc:  # of any package
        raise ConfigurationError(
            f"{url} cannot be opened: {first_line(exc)}; expected a file system of pyarrow, or of "
            "fsspec with its package installed"
        ) from exc


def list_remote(url: str) -> tuple[str, list[str]]:
    """Return the folder that the titles of a URL start from, and the URLs of its files.

    Args:
        url: a file, a folder, or a pattern; `*` does not match a slash, and `**` is not known.

    Raises:
        ConfigurationError: there is no such file; the file system cannot be read.
    """
    folder = pattern = url.rstrip("/")
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
    system, base = locate(folder)
    try:
        if system.get_file_info(base).is_file:
            return os.path.dirname(folder), [folder]
        found = system.get_file_info(fs.FileSelector(base, allow_not_found=True, recursive=True))
    except Exception as exc:  # of any package
        raise ConfigurationError(f"{url} cannot be read: {first_line(exc)}") from exc
    wanted = pattern[len(folder) :].split("/")
    files: list[str] = []
    for name in (info.path.removeprefix(base) for info in found if info.is_file):
        parts = name.split("/")
        is_match = len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))
        if (is_match or folder == pattern) and not skips(pattern[len(folder) :], name):
            files.append(folder + name)
    if not files:
        raise ConfigurationError(f"{url} does not exist" + f" ({OPTIONS_HINT})" * ("?" in url))
    return folder, sorted(files)


def is_hidden(name: str) -> bool:
    """Return whether a file or folder is skipped: Spark and Hive begin names of their own with _.

    The log of a Delta table is not skipped, because a job refuses it.

    >>> [is_hidden(name) for name in (".a", "_SUCCESS", "_day=1", "_delta_log")]
    [True, True, False, False]
    """
    return name[:1] == "." or (name[:1] == "_" and "=" not in name and name != "_delta_log")


def open_parquet(path: str, **options: Any) -> pq.ParquetFile:
    """Open a Parquet file by path or URL.

    Old timestamps (INT96) are read as microseconds, which is what Spark writes: as nanoseconds,
    the years before 1677 and after 2262 become others.
    """
    system, inner = locate(path)
    options["coerce_int96_timestamp_unit"] = "us"
    return pq.ParquetFile(inner, filesystem=system, **options)
