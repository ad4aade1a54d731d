"""What the tests of both adapters share: texts, images, and what is expected of them."""

from __future__ import annotations

import asyncio
import base64
import copy
import pickle
import threading
from collections.abc import Awaitable, Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared_engine import images
from shared_engine.local import backend as local
from tests.support.vl_checkpoints import page
from tests.support.vl_oracles import numpy_float64

Oracle = Callable[..., NDArray[Any]]
"""Takes (text, image) pairs, either of which may be None; returns their vectors."""

# Out of order by length, with a text twice, none at all, and one of many tokens.
TEXTS = [
    "The quick brown fox jumps over the lazy dog.",
    "one",
    "",
    "Вопросы сравниваются, документы сравниваются. 😀",
    "one",
    "In 1999 it had fallen to 0.99. " * 12,
    "two",
    "def embed(texts):\n    return [vector(text) for text in texts]\n",
]

CAPTIONS = ["a chart of sales", "two cats", "the plan of a house"]
QUESTION = "how much was sold?"
SIZES = [(90, 60), (50, 120), (64, 64), (200, 100), (31, 97), (70, 80)]


def saved(seed: int, kind: str = "PNG") -> bytes:
    """Return the file of a picture, one of `SIZES`."""
    file = BytesIO()
    page(seed, *SIZES[seed % len(SIZES)]).save(file, kind)
    return file.getvalue()


CLONES: dict[str, Callable[[Any], Any]] = {
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
}
LANGCHAIN_CLONES = CLONES | {
    "model_copy": lambda model: model.model_copy(deep=True),
    "dump": lambda model: type(model)(**model.model_dump()),
    "json": lambda model: type(model).model_validate_json(model.model_dump_json()),
}
LLAMAINDEX_CLONES = CLONES | {
    "dict": lambda model: type(model).from_dict(model.to_dict()),
    "json": lambda model: type(model).from_json(model.to_json()),
}

PNGS = [saved(seed) for seed in range(len(SIZES))]
BASE64 = [base64.b64encode(png).decode() for png in PNGS]
URLS = [f"data:image/png;base64,{text}" for text in BASE64]


def expected_of(folder: Path, *items: tuple[str | None, bytes | None]) -> NDArray[Any]:
    """Return the vectors that a checkpoint gives (text, image) pairs."""
    seen = [(text, png if png is None else images.cut_tiles(png, 2, 32)) for text, png in items]
    return numpy_float64(folder, seen, "document")


def same(actual: Any, expected: Any, what: str = "") -> None:
    np.testing.assert_allclose(np.array(actual), expected, rtol=0, atol=1e-5, err_msg=what)


async def called(call: Callable[..., Any], *args: Any) -> Any:
    """Return the result of a method or of its async twin."""
    result = call(*args)
    return await result if isinstance(result, Awaitable) else result


async def check_that_the_loop_goes_on(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Awaitable[Any]]
) -> None:
    """Hold the load of a model and the first image until the loop, if it is free, lets them go."""
    entered, free = threading.Semaphore(0), threading.Semaphore(0)

    def held(function: Callable[..., Any]) -> Callable[..., Any]:
        def waiting(*args: Any) -> Any:
            entered.release()
            assert free.acquire(timeout=20), "the loop is blocked"
            return function(*args)

        return waiting

    monkeypatch.setattr(local, "resolve", held(local.resolve))
    monkeypatch.setattr(images, "cut_tiles", held(images.cut_tiles))
    task = asyncio.ensure_future(call())
    for _ in range(2):
        while not entered.acquire(blocking=False):
            assert not task.done()
            await asyncio.sleep(0.01)
        free.release()
    assert len(await task) == 1
