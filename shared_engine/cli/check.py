"""`nemoretriever check`: test a local model or a server, and compare their vectors."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version

import httpx
import numpy as np
from numpy.typing import NDArray
from pydantic import SecretStr

from shared_engine import images
from shared_engine._version import __version__
from shared_engine.catalogue import lookup
from shared_engine.cli.options import (
    LOCAL,
    add_key,
    add_log_level,
    add_options,
    add_served_name,
    read_options,
)
from shared_engine.documents import EmbeddingInput, Role
from shared_engine.embedder import Embedder
from shared_engine.endpoints import normalize_url, read_key
from shared_engine.errors import NeMoRetrieverError
from shared_engine.options import Options

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


def add_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `check` to the command line."""
    verb = commands.add_parser(
        "check", help="test a local model or a server, and compare their vectors"
    )
    add_options(verb, LOCAL)
    add_served_name(verb)
    add_key(verb)
    verb.add_argument(
        "--base-url",
        metavar="URL",
        help="Server to check. With --model or --checkpoint its vectors are compared with the "
        "local model's. Default: NVIDIA_BASE_URL.",
    )
    add_log_level(verb, "warning")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the local model, the server, or both."""
    base_url = args.base_url or os.environ.get("NVIDIA_BASE_URL")
    is_local = not base_url or args.model or args.checkpoint
    same = check(
        read_options(args, LOCAL, backend="local") if is_local else None,
        base_url,
        served_name=args.served_name,
        api_key=read_key(args.api_key_env),
    )
    return 0 if same else 1


def check(
    here: Options | None,
    base_url: str | None,
    *,
    served_name: str | None = None,
    api_key: str | None = None,
) -> bool:
    """Print what runs here and what a server gives; return whether all works and is the same.

    `here` is a model in this process, or None; `base_url` a server's address, or None, and
    `served_name` and `api_key` are that server's.
    """
    print(f"nemoretriever {__version__}, Python {platform.python_version()}, {_torch_version()}")
    found: list[dict[str, NDArray[np.float32]] | None] = []
    if here is not None:
        found.append(_measure("here", here))
    if base_url is not None:
        base_url = normalize_url(base_url)
        _probe(base_url)
        key = SecretStr(api_key) if api_key else None
        options = Options(base_url=base_url, api_key=key, max_retries=1)
        if name := served_name or _find_name(here, options):
            options = options.replace(model=name)
        # A server under a name of its own may do text alone; the model here tells.
        has_images = "image" in (found[0] or ()) if found else lookup(options.model) is not None
        found.append(_measure("there", options, has_images))
    working = [vectors for vectors in found if vectors is not None]
    if len(working) < len(found):
        return False
    return len(working) < 2 or _compare(*working)


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
                disc = images.draw_sample()
                both = EmbeddingInput("A disc that fades to its rim.", disc)
                found["image"] = embedder.embed([EmbeddingInput(image=disc), both])
            first = time.perf_counter() - started
            seconds = [_time_query(embedder) for _ in range(9)]
            print(f"{place}: {embedder.description}")
            print(
                f"{'':{len(place)}}  {found['query'].shape[1]} values per vector; ready after "
                f"{first:.1f} s; a query takes {1000 * statistics.median(seconds):.1f} ms"
            )
    except NeMoRetrieverError as exc:
        print(f"{place}: does not work: {type(exc).__name__}: {exc}")
        return None
    return found


def _time_query(embedder: Embedder) -> float:
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
    """Print how a server begins to speak of itself, asking without a key."""
    for path in ("health/ready", "models"):
        headers = {"accept-encoding": "identity"}
        try:
            with httpx.stream("GET", f"{base_url}/{path}", headers=headers, timeout=10) as response:
                start = next(response.iter_raw(1000), b"").decode(errors="replace")
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            print(f"{base_url}/{path}: {type(exc).__name__}: {exc}")
            return
        print(f"{base_url}/{path}: {response.status_code} {' '.join(start.split())[:300]}")


def _find_name(here: Options | None, there: Options) -> str | None:
    """Return the name to ask a server for; None leaves it to the options' default."""
    said = here.model if here is not None and here.is_model_given else None
    if said and lookup(said):
        return said
    try:
        with Embedder(there) as embedder:
            listed = embedder.list_models()
    except NeMoRetrieverError:
        return said
    return listed[0].id if len(listed) == 1 else said  # a catalogue lists many


def _torch_version() -> str:
    try:
        return f"torch {version('torch')}"
    except PackageNotFoundError:
        return "no torch"
