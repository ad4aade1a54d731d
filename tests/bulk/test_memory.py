"""Memory does not grow with the input."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.conftest import ROOT


@pytest.mark.slow
def test_ten_times_the_rows_take_the_same_memory():
    """2,000,000 rows are for tests/benchmarks/bulk.py."""
    peaks = []
    for rows in (20_000, 200_000):
        command = [sys.executable, "tests/benchmarks/bulk.py", "--one", str(rows)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        peaks.append(json.loads(done.stdout.splitlines()[-1])["peak_mb"])
    assert peaks[1] <= 1.3 * peaks[0], peaks
