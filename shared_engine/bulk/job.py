"""What to embed and how, cut into fragments: pieces of input that any process can do alone."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from shared_engine.bulk import pages, tables
from shared_engine.documents import Role
from shared_engine.errors import ConfigurationError
from shared_engine.options import Options

Layer = Literal["picture", "text", "both"]
"""What of a page of a PDF is embedded: how it looks, its text layer, or the two as one."""

ROWS_PER_FILE = 10_000
"""Rows of text in a fragment: 80 MB of float32 vectors of 2,048 values."""
IMAGES_PER_FILE = 500
"""The same of rows with images, each of which takes as long as many texts."""


@dataclass(frozen=True)
class Job:
    """What to embed, how, and where to. Pickles without the key, as its options do."""

    inputs: tuple[str, ...]
    """Absolute paths of files and folders."""
    out: str
    """Absolute path of the folder of results."""
    options: Options = field(default_factory=Options)
    role: Role = "document"
    text_column: str | None = None
    """Column of the texts; None is "text" where no image column is named."""
    image_column: str | None = None
    """Column of images: bytes, a path (from the table's folder) or a data URL."""
    id_column: str | None = None
    """Column of ids, integers or texts; None makes ids of the file's name and the row."""
    columns: tuple[str, ...] = ()
    """Columns to keep beside the vectors."""
    rows_per_file: int | None = None
    """The most rows in a fragment, and so in a file of vectors; None suits the kind of input."""
    pdf: Layer = "picture"
    strict: bool = False
    """Whether the first row that cannot be embedded ends the run."""

    def __post_init__(self) -> None:
        if not self.inputs:
            raise ConfigurationError("no input: name files or folders")
        for path in (*self.inputs, self.out):
            if not os.path.isabs(path):
                raise ConfigurationError(f"{path} is no absolute path")
        if self.rows_per_file is not None and self.rows_per_file < 1:
            raise ConfigurationError(f"rows_per_file is {self.rows_per_file}; expected 1 or more")


@dataclass(frozen=True, slots=True)
class Fragment:
    """Some consecutive rows of one source: what is done as a whole, or not at all."""

    name: str
    """Name of its files without folder and suffix: the same in every run, whatever lies beside."""
    source: str
    """Absolute path of the table, the PDF, or the folder of pictures."""
    title: str
    """The source as ids and messages name it."""
    first: int
    """Number of its first row in the source, from 0: a row, a page or a picture."""
    rows: int
    fingerprint: str
    """Size and time of change of the source; of all its pictures, where those are it."""
    begin: int = 0
    """Bytes of a text file before it."""
    end: int = 0
    """Bytes of a text file up to its end."""
    names: tuple[str, ...] = ()
    """Its pictures, from the folder."""

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values for JSON; `Fragment(**values)` is it again."""
        return asdict(self)


def list_fragments(job: Job) -> list[Fragment]:
    """Return the fragments of a job, the same whenever the inputs are.

    Text files are read once for their line ends, of others only what they say of themselves.

    Raises:
        ConfigurationError: an input that is not there, of no known kind, or of another kind than
            the ones before.
        InputError: a table that cannot be read.
    """
    raise NotImplementedError
