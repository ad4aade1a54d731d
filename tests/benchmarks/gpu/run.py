"""Everything that an NVIDIA GPU can show of this project, in one command of about 8 minutes.

    python tests/benchmarks/gpu/run.py                     # figures go to .benchmarks/gpu/
    python tests/benchmarks/gpu/run.py --only tests,300m
    python tests/benchmarks/gpu/run.py --tiny              # on a CPU, with tiny models: to try it

The groups run in order of value, each in a process of its own with a limit: one that hangs, fails
or loses the GPU costs only itself. Every figure is written to results.json when it is measured, and
printed with the range that was predicted for an H200 (`expected.py`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT))

LIMITS = {
    "machine": 60,
    "tests": 150,
    "300m": 150,
    "pages": 110,
    "peers": 90,
    "1b": 110,
    "fresh": 60,
    "fp8": 60,
}
"""The groups, most valuable first, and the most seconds of each."""
SHORTEST = 10
"""Seconds that must be left for a group to start."""
SLOW = 5
"""Times the limits on a CPU that is busy with something else."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="tiny models on a CPU, to try this")
    parser.add_argument("--only", default=",".join(LIMITS), help="groups, with commas")
    parser.add_argument("--minutes", type=float, help="of everything; default: 8, or 30 if tiny")
    parser.add_argument("--out", type=Path, default=ROOT / ".benchmarks" / "gpu", help="a folder")
    parser.add_argument("--scratch", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--group", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    asked.only = asked.only.split(",")
    if unknown := set(asked.only) - set(LIMITS):
        parser.error(f"--only takes {', '.join(LIMITS)}; not {', '.join(sorted(unknown))}")
    asked.minutes = asked.minutes or (30 if asked.tiny else 8)
    return asked


def main() -> None:
    """Run the groups, or in a process of its own one of them."""
    asked = arguments()
    results = asked.out / "results.json"
    if asked.group:
        from tests.benchmarks.gpu import groups
        from tests.benchmarks.gpu.bench import Bench

        getattr(groups, f"measure_{asked.group}")(
            Bench(asked.group, asked.tiny, asked.scratch, results)
        )
        return
    import torch

    if not asked.tiny and not torch.cuda.is_available():
        sys.exit("no CUDA GPU here; --tiny tries this on a CPU")
    asked.out.mkdir(parents=True, exist_ok=True)
    results.write_text(json.dumps({"about": describe(asked)}) + "\n")
    ends = time.monotonic() + 60 * asked.minutes
    with tempfile.TemporaryDirectory(dir=find_scratch()) as scratch:
        asked.scratch = Path(scratch)
        for group in LIMITS:
            if group in asked.only:
                run_group(group, asked, ends)
    print(f"\n{summarize(json.loads(results.read_text()))}\n\n{results}")


def describe(asked: argparse.Namespace) -> dict[str, object]:
    """Return what was measured, and with what."""
    import torch

    packages = ("torch", "triton", "transformers", "sentence-transformers", "numpy")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "is_h200": not asked.tiny and "H200" in torch.cuda.get_device_name(),
        "python": sys.version.split()[0],
        "versions": {name: find_version(name) for name in packages},
        "cores": os.cpu_count(),
    }


def find_version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_scratch() -> str | None:
    """Return a folder in memory if it holds 12 GB of weights, else None for the usual one."""
    memory = "/dev/shm"
    if os.access(memory, os.W_OK) and shutil.disk_usage(memory).free > 12e9:
        return memory
    return None


def run_group(group: str, asked: argparse.Namespace, ends: float) -> None:
    """Run a group in a process, and end that with all its children when its time is over."""
    from tests.benchmarks.gpu.bench import change

    results = asked.out / "results.json"
    limit = LIMITS[group] * (SLOW if asked.tiny else 1)
    limit = min(limit, ends - time.monotonic())
    with change(results) as figures:
        figures[group] = {"status": "not started: no time is left"}
    if limit < SHORTEST:
        return
    command = [sys.executable, __file__, "--group", group, "--out", str(asked.out)]
    command += ["--scratch", str(asked.scratch), *(["--tiny"] if asked.tiny else [])]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "true"}
    if group == "peers":
        shim = str(Path(__file__).with_name("flash_shim"))
        paths = (shim, environment.get("PYTHONPATH", ""))
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    start = time.monotonic()
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit)
        status = "done" if code == 0 else f"its process ended with {code}"
    except subprocess.TimeoutExpired:
        status = f"took more than {limit:.3g} s"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # with what it started
        process.wait()
    seconds = round(time.monotonic() - start, 1)
    print(f"{group}: {status}, {seconds} s\n", flush=True)
    with change(results) as figures:
        figures[group] |= {"status": status, "seconds": seconds}


def summarize(results: dict[str, Any]) -> str:
    """Return what needs a look: groups that did not end, errors, an H200's figures out of range."""
    lines = []
    is_h200 = results.pop("about")["is_h200"]
    for group, each in results.items():
        if each["status"] != "done":
            lines.append(f"{group}: {each['status']}")
        for name, figure in each.get("figures", {}).items():
            if name.startswith("error"):
                lines.append(f"{group}, {name}: {figure['value']}")
            elif not figure.get("is_inside", True) and is_h200:
                low, high = figure["expected"]
                value = f"{figure['value']:,} {figure['unit']}"
                lines.append(f"{group}, {name}: {value}, expected {low:,} to {high:,}")
    return "\n".join(lines) or "Nothing failed" + (", all in range." if is_h200 else ".")


if __name__ == "__main__":
    main()
