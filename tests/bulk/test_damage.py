"""Files of a job that were cut, emptied or edited: made again with a warning, or named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared_engine.bulk.job import Job
from shared_engine.errors import ConfigurationError
from tests.bulk.conftest import run

FAILED = 10


@pytest.fixture
def job(make_job) -> Job:
    """A job of 100 rows, a tenth without a text, that is done but for its last fragment."""
    table = pa.table({"text": [f"passage {n}" if n % 10 else "" for n in range(100)]})
    job = make_job(table, id_column=None, columns=())
    assert run(job).failed == FAILED
    sorted(Path(job.out, "vectors").iterdir())[-1].unlink()
    return job


def zero_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[4:60] = bytes(56)
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:40]),
    "other": lambda path: pq.write_table(pa.table({"x": [1]}), path),
    "gone": Path.unlink,
}


@pytest.mark.parametrize("damage", [*DAMAGES.values(), zero_middle], ids=[*DAMAGES, "zeros"])
@pytest.mark.parametrize("folder", ["vectors", "errors"])
def test_a_damaged_file_of_a_fragment_is_written_again(job, folder, damage, caplog):
    path = min(Path(job.out, folder).iterdir())
    damage(path)
    if (folder, damage) == ("vectors", zero_middle):  # found by who reads it, and not by its footer
        with pytest.raises(OSError, match=r"CRC|deserialize"):
            pq.read_table(path, page_checksum_verification=True)
        return
    summary = run(job)
    assert (summary.rows, summary.failed) == (36, FAILED)
    assert pq.read_table(Path(job.out, "vectors")).num_rows == 90
    assert pq.read_table(Path(job.out, "errors.parquet")).num_rows == FAILED
    if (folder, damage) != ("vectors", DAMAGES["gone"]):  # a fragment that is not done
        assert f"{path} cannot be read and is written again" in caplog.text


@pytest.mark.parametrize("content", [b"", b'{"model": ', b"\xff\xfe"])
@pytest.mark.parametrize("name", ["job.json", "engine.json"])
def test_a_damaged_record_is_named_and_can_be_removed(job, name, content):
    path = Path(job.out, name)
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=rf"{name} is damaged .*remove it if"):
        run(job)
    path.unlink()
    assert run(job).rows == 9
