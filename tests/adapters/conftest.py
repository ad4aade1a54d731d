"""Models of the adapters: a module of tests says of which, and may name another `folder`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_engine import Options
from tests.support.adapters import PNGS, TEXTS, Oracle, expected_of
from tests.support.oracles import numpy_float64
from tests.support.rerankers import build_reranker, build_vl_reranker
from tests.support.servers import NAME, running
from tests.support.vl_checkpoints import build_vl_checkpoint


@pytest.fixture(scope="module")
def adapter() -> type[Any]:
    """The class under test."""
    raise NotImplementedError("a module of tests has its own")


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of texts and images."""
    return build_vl_checkpoint(tmp_path_factory.mktemp("vl") / "vl")


@pytest.fixture(scope="session")
def options(folder: Path) -> dict[str, Any]:
    return {"model": str(folder), "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="session")
def address(options: dict[str, Any]) -> Iterator[str]:
    """Where the model is served."""
    with running(Options(**options)) as served:
        yield served.url


@pytest.fixture
def model(adapter: type[Any], options: dict[str, Any]) -> Any:
    return adapter(**options)


@pytest.fixture
def there(adapter: type[Any], address: str) -> Any:
    return adapter(model=NAME, base_url=address)


@pytest.fixture(params=["model", "there"])
def either(request: pytest.FixtureRequest) -> Any:
    """The model in this process, or served."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def text_model(adapter: type[Any], checkpoint: Path) -> Any:
    return adapter(model=str(checkpoint), device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The images as files."""
    folder = tmp_path_factory.mktemp("images")
    paths = [folder / f"page {seed}.png" for seed in range(len(PNGS))]
    for path, png in zip(paths, PNGS, strict=True):
        path.write_bytes(png)
    return paths


@pytest.fixture(scope="session")
def oracle(folder: Path) -> Oracle:
    return partial(expected_of, folder)


@pytest.fixture(scope="session")
def queries(checkpoint: Path) -> np.ndarray:
    """The vectors of `TEXTS` as queries of the model of texts."""
    return numpy_float64(checkpoint, TEXTS, "query: ")


@pytest.fixture(scope="session")
def documents(checkpoint: Path, queries: np.ndarray) -> np.ndarray:
    """The vectors of `TEXTS` as documents of the model of texts."""
    vectors = numpy_float64(checkpoint, TEXTS, "passage: ")
    assert (np.abs(queries - vectors).max(axis=1) > 0.01).all(), "exchanged roles would not show"
    return vectors


# Rerankers.


@pytest.fixture(scope="session")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reranker of texts."""
    return build_reranker(tmp_path_factory.mktemp("reranker") / "text")


@pytest.fixture(scope="session")
def page_reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reranker of texts and images."""
    return build_vl_reranker(tmp_path_factory.mktemp("page-reranker") / "vl")


@pytest.fixture(params=["here"])  # a second place is a server
def make(adapter: type[Any]) -> Callable[..., Any]:
    """Make a model of the class under test that runs in one place or another."""

    def made(folder: Path, **options: Any) -> Any:
        return adapter(**{"model": folder, "device": "cpu", "dtype": "float32", **options})

    return made
