"""What runs here, what a server gives, and whether the two are interchangeable."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from typing import Any, get_args

import httpx
import numpy as np
from numpy.typing import NDArray

from shared_engine._version import __version__
from shared_engine.catalogue import find
from shared_engine.documents import Document, Role
from shared_engine.embedder import Embedder
from shared_engine.endpoints import normalised
from shared_engine.errors import ConfigurationError, NeMoRetrieverError
from shared_engine.options import DType, Options

SAME = 0.999
"""Cosine from which two engines may fill one index. The same weights in bfloat16 and float32 are
closer than that; other weights, another prefix or another pooling are not."""


_SAMPLES: dict[Role, list[str]] = {
    "query": [
        "how do I return a damaged product?",
        "Was kostet der Versand?",
        "embedding models for retrieval",
    ],
    "document": [
        "Damaged products can be returned within 30 days; the shop pays for the parcel.",
        "Der Versand kostet 4,90 €, ab 50 € ist er frei.",
        "An embedding model turns a text into a vector, so that similar texts are near. " * 20,
        "東京は日本の首都です。",
        "def mean(values: list[float]) -> float:\n    return sum(values) / len(values)\n",
    ],
}


def check(asked: argparse.Namespace) -> int:
    """Say what runs here and what a server gives, and whether the two are interchangeable."""
    print(f"nemoretriever {__version__}, Python {platform.python_version()}, {_torch()}")
    variable = os.environ.pop("NVIDIA_BASE_URL", None)  # else "here" would be there
    base_url = asked.base_url or variable
    found: list[dict[str, NDArray[np.float32]] | None] = []
    if not base_url or asked.model or asked.checkpoint:
        found.append(_measure("here", Options(**given_options(asked))))
    if base_url:
        base_url = normalised(base_url)
        _probe(base_url)
        remote: dict[str, Any] = {
            "model": _remote_model(asked, base_url),
            "api_key": read_key(asked),
        }
        given = {name: value for name, value in remote.items() if value is not None}
        options = Options(base_url=base_url, max_retries=1, **given)
        # A server under a name of its own may do text alone; the model here tells.
        has_images = "image" in (found[0] or ()) if found else find(options.model) is not None
        found.append(_measure("there", options, has_images))
    working = [vectors for vectors in found if vectors is not None]
    if len(working) < len(found):
        return 1
    return 0 if len(working) == 1 or _compare(*working) else 1


def _measure(
    place: str, options: Options, has_images: bool = True
) -> dict[str, NDArray[np.float32]] | None:
    """Embed the samples, images where the model takes them, and print how that went."""
    started = time.perf_counter()
    try:
        with Embedder(options) as embedder:
            found: dict[str, NDArray[np.float32]] = {
                role: embedder.embed(texts, role) for role, texts in _SAMPLES.items()
            }
            if has_images and "image" in embedder.modalities:
                found["image"] = embedder.embed(_pictures())
            first = time.perf_counter() - started
            seconds = [_seconds_of_a_query(embedder) for _ in range(9)]
            print(f"{place}: {embedder.description}")
            print(
                f"{'':{len(place)}}  {found['query'].shape[1]} values a vector; ready after "
                f"{first:.1f} s; a query takes {1000 * statistics.median(seconds):.1f} ms"
            )
    except NeMoRetrieverError as exc:
        print(f"{place}: does not work: {type(exc).__name__}: {exc}")
        return None
    return found


def _pictures() -> list[Document]:
    from PIL import Image

    disc = Image.radial_gradient("L").resize((700, 500))
    return [Document(image=disc), Document("A disc that fades to its rim.", disc)]


def _seconds_of_a_query(embedder: Embedder) -> float:
    started = time.perf_counter()
    embedder.embed(_SAMPLES["query"][:1], "query")
    return time.perf_counter() - started


def _compare(here: dict[str, NDArray[np.float32]], there: dict[str, NDArray[np.float32]]) -> bool:
    """Print how near the vectors of the two places are, and what follows."""
    worst = 1.0
    for name, mine in here.items():
        if (theirs := there.get(name)) is None:
            print(f"not interchangeable: only the model here takes an {name}")
            return False
        if mine.shape != theirs.shape:
            print(f"not interchangeable: {mine.shape[1]} values here, {theirs.shape[1]} there")
            return False
        cosines = (mine * theirs).sum(axis=1)
        worst = min(worst, float(cosines.min()))
        print(
            f"{name}: cosine {cosines.min():.7f} to {cosines.max():.7f}, "
            f"largest difference {np.abs(mine - theirs).max():.1e}"
        )
    same = worst >= SAME
    print(
        f"{'interchangeable' if same else 'not interchangeable'}: the smallest cosine is "
        f"{worst:.7f}, wanted {SAME}"
    )
    return same


def _probe(base_url: str) -> None:
    """Print what a server says of itself, asking without a key."""
    for path in ("health/ready", "models"):
        try:
            response = httpx.get(f"{base_url}/{path}", timeout=10)
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            print(f"{base_url}/{path}: {type(exc).__name__}: {exc}")
            return
        words = " ".join(response.text.split())[:300]
        print(f"{base_url}/{path}: {response.status_code} {words}")


def _remote_model(asked: argparse.Namespace, base_url: str) -> str | None:
    """Return the name to ask a server for; None leaves it to the options' default."""
    if asked.served_name:
        return str(asked.served_name)
    if asked.model and find(asked.model):
        return str(asked.model)
    try:
        listed = httpx.get(f"{base_url}/models", timeout=10).json()["data"]
        if len(listed) == 1:  # a server of one model; a catalogue lists many
            return str(listed[0]["id"])
    except (httpx.HTTPError, httpx.InvalidURL, ValueError, LookupError, TypeError):
        pass
    return asked.model and str(asked.model)


def read_key(asked: argparse.Namespace) -> str | None:
    if asked.api_key_env is None:
        return None
    key = os.environ.get(asked.api_key_env)
    if not key:
        raise ConfigurationError(f"--api-key-env: {asked.api_key_env} is not set, or empty")
    return key


def given_options(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the options of an engine here that were given."""
    values = {name: getattr(asked, name) for name in ENGINE_OPTIONS}
    return {name: value for name, value in values.items() if value is not None}


def _torch() -> str:
    try:
        import torch
    except ModuleNotFoundError:
        return "no torch"
    return f"torch {torch.__version__}"


ENGINE_OPTIONS: dict[str, dict[str, Any]] = {
    "model": {},
    "checkpoint": {},
    "revision": {},
    "device": {},
    "dtype": {"choices": get_args(DType)},
    "max_tokens": {"type": int, "metavar": "N"},
    "max_tiles": {"type": int, "metavar": "N"},
    "tokens_per_step": {"type": int, "metavar": "N"},
}
