"""`nemoretriever check`: test a local model or a server, and compare their vectors."""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import time
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal, TypeAlias

from pydantic import SecretStr

from shared_engine import images
from shared_engine._version import __version__
from shared_engine.catalogue import lookup, require_hosted
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
from shared_engine.endpoints import is_hosted, normalize_url, read_key
from shared_engine.errors import NeMoRetrieverError
from shared_engine.options import Options

if TYPE_CHECKING:  # every command imports this module
    import numpy as np
    from numpy.typing import NDArray

MIN_COSINE = 0.999
"""Least cosine between the vectors of two engines that may share an index. The same weights in
bfloat16 and float32 are closer; other weights, prefixes or pooling are not."""

Vectors: TypeAlias = "dict[str, NDArray[np.float32]]"
"""The vectors of the samples: of "query", "document" and, if the model takes images, "image"."""

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
    verb.add_argument(
        "--reference",
        action="store_true",
        help="Also compute the local model with transformers' own classes, in float32 on the CPU, "
        "and compare. Needs memory for a second copy of the weights.",
    )
    add_options(verb, ["prefixes"])
    add_log_level(verb, "warning")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the local model, the server, or both."""
    base_url = args.base_url or os.environ.get("NVIDIA_BASE_URL")
    is_local = not base_url or args.model or args.checkpoint or args.reference
    same = check(
        read_options(args, LOCAL, backend="local") if is_local else None,
        base_url,
        served_name=args.served_name,
        api_key=read_key(args.api_key_env),
        prefixes=args.prefixes or "auto",
        reference=args.reference,
    )
    return 0 if same else 1


def check(
    local: Options | None,
    base_url: str | None,
    *,
    served_name: str | None = None,
    api_key: str | None = None,
    prefixes: Literal["auto", "server"] | dict[Role, str] = "auto",
    reference: bool = False,
) -> bool:
    """Print what runs locally and what a server returns, and compare the vectors.

    Args:
        local: Options of the local model; None checks only the server.
        base_url: Address of the server; None checks only the local model.
        served_name: Name of the model on the server.
        api_key: Key for the server.
        prefixes: Prefixes of texts at the server; see `Options.prefixes`.
        reference: Compare the local model with transformers' own classes, too.

    Returns:
        Whether everything works and all vectors are interchangeable.

    Raises:
        ConfigurationError: the hosted catalogue no longer runs the model, or no model is named.
    """
    base_url = base_url and normalize_url(base_url)
    if base_url and is_hosted(base_url):
        require_hosted(served_name or (local.model if local else None))
    print(f"nemoretriever {__version__}, Python {platform.python_version()}, {_torch_version()}")
    expected = None if local is None else _measure("local", local)
    works = local is None or expected is not None
    if base_url:
        _probe(base_url)
        key = SecretStr(api_key) if api_key else None
        options = Options(base_url=base_url, api_key=key, max_retries=1, prefixes=prefixes)
        if name := served_name or _find_name(local, options):
            options = options.replace(model=name)
        # A server may serve only the text part of a model under a name of its own.
        is_known = options.model is None or lookup(options.model) is not None
        has_images = "image" in expected if expected else is_known
        found = _measure("server", options, has_images)
        works = works and found is not None
        if expected and found:
            works = _compare(expected, "server", found)
    if reference and local is not None and expected:
        works = _compare(expected, "transformers", _compute_reference(local, expected)) and works
    return works


def _measure(place: str, options: Options, has_images: bool = True) -> Vectors | None:
    """Embed the samples, with images if the model takes them; print description and times."""
    started = time.perf_counter()
    try:
        with Embedder(options) as embedder:
            found: Vectors = {role: embedder.embed(texts, role) for role, texts in _SAMPLES.items()}
            if has_images and "image" in embedder.modalities:
                found["image"] = embedder.embed(_image_samples())
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


def _image_samples() -> list[EmbeddingInput]:
    disc = images.draw_sample()
    return [EmbeddingInput(image=disc), EmbeddingInput("A disc that fades to its rim.", disc)]


def _time_query(embedder: Embedder) -> float:
    started = time.perf_counter()
    embedder.embed(_SAMPLES["query"][:1], "query")
    return time.perf_counter() - started


def _compute_reference(options: Options, expected: Vectors) -> Vectors:
    """Compute the samples with transformers' classes.

    Raises:
        MissingExtraError: transformers is not installed.
    """
    from shared_engine.local.reference import Reference  # imports torch

    reference = Reference(options)
    found: Vectors = {
        role: reference.embed([EmbeddingInput(text) for text in texts], role)
        for role, texts in _SAMPLES.items()
    }
    if "image" in expected:
        found["image"] = reference.embed(_image_samples(), "document")
    return found


def _compare(local: Vectors, other_name: str, other: Vectors) -> bool:
    """Print how close two sets of vectors are; return whether they are interchangeable."""
    worst = 1.0
    for name, mine in local.items():
        if (theirs := other.get(name)) is None:
            print(f"local and {other_name}: not interchangeable: only the local model takes images")
            return False
        if mine.shape != theirs.shape:
            print(
                f"local and {other_name}: not interchangeable: {mine.shape[1]} and "
                f"{theirs.shape[1]} values per vector"
            )
            return False
        cosines = (mine * theirs).sum(axis=1)
        worst = min(worst, float(cosines.min()))
        print(
            f"{name}: cosine {cosines.min():.7f} to {cosines.max():.7f}, "
            f"largest difference {abs(mine - theirs).max():.1e}"
        )
    same = worst >= MIN_COSINE
    print(
        f"local and {other_name}: {'' if same else 'not '}interchangeable: smallest cosine "
        f"{worst:.7f}, required {MIN_COSINE}"
    )
    return same


def _probe(base_url: str) -> None:
    """Print the beginning of a server's own answers, requested without a key."""
    import httpx

    for path in ("health/ready", "models"):
        headers = {"accept-encoding": "identity"}
        try:
            with httpx.stream("GET", f"{base_url}/{path}", headers=headers, timeout=10) as response:
                start = next(response.iter_raw(1000), b"").decode(errors="replace")
        except (httpx.HTTPError, httpx.InvalidURL) as exc:
            print(f"{base_url}/{path}: {type(exc).__name__}: {exc}")
            return
        print(f"{base_url}/{path}: {response.status_code} {' '.join(start.split())[:300]}")


def _find_name(local: Options | None, remote: Options) -> str | None:
    """Return the name of the model on a server; None for the options' default."""
    name = local.model if local else None
    if name and lookup(name):
        return name
    try:
        with Embedder(remote) as embedder:
            listed = embedder.list_models()
    except NeMoRetrieverError:
        return name
    return listed[0].id if len(listed) == 1 else name  # a catalogue lists many


def _torch_version() -> str:
    try:
        return f"torch {version('torch')}"
    except PackageNotFoundError:
        return "no torch"
