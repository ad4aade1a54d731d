"""Memory grows neither with the input nor with its row groups, and each byte is read about once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


def measure(rows: int, group: int) -> dict[str, float]:
    command = [
        sys.executable,
        "tests/benchmarks/bulk.py",
        "--one",
        str(rows),
        "--group",
        str(group),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_ten_times_the_rows_take_the_same_memory_in_small_and_large_row_groups() -> None:
    """2,000,000 rows are for tests/benchmarks/bulk.py."""
    few, many, one_group = (
        measure(20_000, 5_000),
        measure(200_000, 5_000),
        measure(200_000, 200_000),
    )
    assert many["peak_mb"] <= 1.3 * few["peak_mb"]
    assert one_group["peak_mb"] <= many["peak_mb"] + 60
    assert one_group["times_read"] <= 1.3
