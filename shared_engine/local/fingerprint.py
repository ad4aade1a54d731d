"""A digest of every byte of a checkpoint, which names its vectors in caches."""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

from shared_engine.errors import CheckpointError
from shared_engine.local.checkpoint import weight_files

_SMALL_FILES = (
    "config.json",
    "config_sentence_transformers.json",
    "model.safetensors.index.json",
    "processor_config.json",
    "sentence_bert_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)
"""The files that are read in addition to the weights."""

FileState = tuple[str, int, int, int, int]
"""Name, size, time of modification, time of change, inode."""


def list_files(folder: Path) -> list[FileState]:
    """Return the state of the files that determine a vector."""
    names = [*_SMALL_FILES, *weight_files(folder)]
    stats = [(name, (folder / name).stat()) for name in names if os.path.isfile(folder / name)]
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino) for name, s in stats]


def digest_files(folder: Path, files: list[FileState]) -> str:
    """Return a digest of these files and their names; each file is read once per process.

    Raises:
        CheckpointError: a file changed since it was listed.
    """
    if list_files(folder) != files:
        raise CheckpointError(
            f"the files of {folder} changed after they were loaded; close every Embedder that "
            "uses them and create a new one"
        )
    with ThreadPoolExecutor(os.cpu_count(), "nemoretriever-digest") as pool:
        digests = list(pool.map(lambda file: _digest(folder / file[0], *file[1:]), files))
    names = [name for name, *_ in files]
    return hashlib.sha256(repr([names, digests]).encode()).hexdigest()


@lru_cache(maxsize=256)
def _digest(path: Path, *_state: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
