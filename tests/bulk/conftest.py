"""Tables of passages and a NIM that embeds them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from shared_engine import Embedder
from shared_engine.bulk.job import Job
from shared_engine.bulk.run import Summary, run_local
from tests.support.nim import Nim


def passages(count: int) -> pa.Table:
    """Texts with what breaks a careless reader of CSV: commas, quotes and line ends."""
    texts = [f'passage {n}, "quoted"\nline {n % 7}' for n in range(count)]
    langs = ["de" if n % 2 else "en" for n in range(count)]
    return pa.table({"key": range(count), "text": texts, "lang": langs})


def run(job: Job) -> Summary:
    return run_local(job, Embedder(job.options), show_progress=False)


@pytest.fixture(autouse=True, scope="session")
def memory_file_system() -> Iterator[None]:
    """Let several threads read one file in memory: fsspec gives them one position."""

    def open_file(files: MemoryFileSystem, path: str, mode: str = "rb", **more: Any) -> Any:
        found = original(files, path, mode, **more)
        return BytesIO(found.getvalue()) if mode == "rb" else found

    original = MemoryFileSystem._open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryFileSystem, "_open", open_file)
        yield


@pytest.fixture
def nim() -> Nim:
    return Nim()


@pytest.fixture
def make_job(tmp_path: Path, nim: Nim) -> Callable[..., Job]:
    """A job of a table (or a path) in `tmp_path`; what is not given is small and at the NIM."""

    def make(
        source: pa.Table | Path | None = None, options: dict[str, Any] | None = None, **more: Any
    ) -> Job:
        if source is None:
            source = tmp_path / "input.parquet"
            if not source.exists():
                pq.write_table(passages(100), source)
        if isinstance(source, pa.Table):
            path = tmp_path / "input.parquet"
            pq.write_table(source, path)
            source = path
        embedder = nim.embedder(**(options or {}))
        given = {"id_column": "key", "columns": ("lang",), "rows_per_file": 30, **more}
        return Job((str(source),), str(tmp_path / "out"), embedder.options, **given)

    return make
