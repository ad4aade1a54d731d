"""The benchmarks for a GPU run with tiny models on a CPU, and survive a group that hangs."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

import pytest

from tests.benchmarks.gpu import run
from tests.benchmarks.gpu.expected import EXPECTED
from tests.conftest import ROOT

ONLY_A_GPU = {"sentence-transformers, without padding"}


@pytest.mark.slow
def test_every_group_gives_its_figures(tmp_path):
    command = [sys.executable, "tests/benchmarks/gpu/run.py", "--tiny", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert not done.returncode, done.stderr
    assert "Nothing failed." in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(run.LIMITS) == set(EXPECTED) == set(results) - {"about"}
    for group, expected in EXPECTED.items():
        assert results[group]["status"] == "done"
        assert set(expected) - set(results[group]["figures"]) <= ONLY_A_GPU


def test_a_group_over_its_time_is_ended_and_the_others_run(tmp_path, monkeypatch):
    asked = argparse.Namespace(out=tmp_path, scratch=tmp_path, tiny=True)
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(run, "SHORTEST", 0.1)
    monkeypatch.setitem(run.LIMITS, "300m", 0.1)
    for group, seconds_left in (("300m", 60), ("machine", 60), ("1b", 0)):
        run.run_group(group, asked, time.monotonic() + seconds_left)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [results[group]["status"] for group in ("300m", "machine", "1b")] == [
        "took more than 0.5 s",
        "done",
        "not started: no time is left",
    ]
    assert results["machine"]["figures"]["copy"]["value"] > 0


def test_the_summary_names_unexpected_figures():
    inside = {"value": 5, "unit": "ms", "expected": [4, 6], "is_inside": True}
    outside = {"value": 7, "unit": "ms", "expected": [4, 6], "is_inside": False}
    results = {
        "about": {"is_h200": True},
        "300m": {"status": "done", "figures": {"a": inside, "b": outside}},
        "1b": {"status": "its process ended with -6", "figures": {"error: c": {"value": "no"}}},
    }
    assert run.summarize(results).splitlines() == [
        "300m, b: 7 ms, expected 4 to 6",
        "1b: its process ended with -6",
        "1b, error: c: no",
    ]
    other = {"about": {"is_h200": False}, "300m": {"status": "done", "figures": {"b": outside}}}
    assert run.summarize(other) == "Nothing failed."
