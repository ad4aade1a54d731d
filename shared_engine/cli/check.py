"""`nemoretriever check`: test a local model or a server, and compare their vectors or scores."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
import statistics
import time
import timeit
from collections.abc import Mapping
from importlib.metadata import distributions
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias

from shared_engine import images
from shared_engine._version import __version__
from shared_engine.backend import ScoreKind
from shared_engine.catalogue import Task, lookup, require_hosted
from shared_engine.cli.options import (
    LOCAL,
    add_key,
    add_logging,
    add_options,
    add_reranker,
    add_served_name,
    read_options,
    read_reranker,
)
from shared_engine.documents import EmbeddingInput
from shared_engine.embedder import Embedder
from shared_engine.endpoints import is_hosted, normalize_url, read_key
from shared_engine.errors import ConfigurationError, NeMoRetrieverError
from shared_engine.options import Options, RerankOptions
from shared_engine.reranker import Reranker

if TYPE_CHECKING:  # every command imports this module
    import numpy as np
    from numpy.typing import NDArray

    from shared_engine.local.reference import Reference

MIN_COSINE = 0.999
"""Least cosine between the vectors of two engines that may share an index. The same weights in
bfloat16 and float32 are closer; other weights, prefixes or pooling are not."""

MIN_COSINE_FP8, MIN_ORDERED_FP8 = 0.99, 0.9
"""The same for a server that computes in FP8: least cosine, and least share of the pairs of
documents that both engines put in the same order for a query. NVIDIA states no bound."""

MAX_DIFFERENCE: Mapping[ScoreKind, float] = {"logit": 0.25, "probability": 0.0625}
"""Most difference between the scores of two engines that may share a threshold: a quarter of a
logit changes a probability by at most 0.0625."""

Values: TypeAlias = "dict[str, NDArray[np.float32]]"
"""The vectors (n, d) or scores (n,) of the samples: of "query" (vectors only), "document" and, if
the model takes images, "image"."""


class Measured(NamedTuple):
    """The samples, computed by an engine."""

    kind: ScoreKind | Literal["vector"]
    values: Values


_SAMPLES = {
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
        "check",
        help="test a local model or a server, and compare their vectors or scores",
        epilog="examples:\n"
        "  nemoretriever check --model nvidia/llama-nemotron-embed-1b-v2\n"
        "  nemoretriever check --model /folder --base-url http://localhost:8000/v1\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options(verb, LOCAL)
    add_reranker(verb)
    add_served_name(verb)
    add_key(verb)
    verb.add_argument(
        "--base-url",
        metavar="URL",
        help="Server to check. With --model, --checkpoint or --rerank-model its vectors or scores "
        "are compared with the local model's. Default: NVIDIA_BASE_URL.",
    )
    verb.add_argument(
        "--reference",
        action="store_true",
        help="Also compute the local model with transformers' own classes, in float32 on the CPU, "
        "and compare. Needs memory for a second copy of the weights.",
    )
    add_options(verb, ["prefixes"])
    add_logging(verb, "warning")
    verb.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what runs locally and what a server returns, and compare the vectors or scores."""
    base_url = args.base_url or os.environ.get("NVIDIA_BASE_URL")
    base_url = base_url and normalize_url(base_url)
    api_key = read_key(args.api_key_env)
    local: Options | RerankOptions | None = read_reranker(args)
    has_embedder = args.model or args.checkpoint or args.revision
    if local and has_embedder:
        raise ConfigurationError(
            "--rerank-model: expected no option of an embedding model with it; check one at a time"
        )
    if not local and (has_embedder or args.reference or not base_url):
        local = read_options(args, LOCAL, backend="local")
    task = local.task if local else "embed"
    name = args.served_name or (local.model if local else None)
    if base_url and is_hosted(base_url):
        require_hosted(name, task)
    torch = next((f"torch {each.version}" for each in distributions(name="torch")), "no torch")
    print(f"nemoretriever {__version__}, Python {platform.python_version()}, {torch}")
    expected = _measure("local", local) if local else None
    works = local is None or expected is not None
    if base_url:
        _probe(base_url)
        shared: dict[str, Any] = {"base_url": base_url, "api_key": api_key, "max_retries": 1}
        remote: Options | RerankOptions = (
            RerankOptions(**shared)
            if task == "rerank"
            else Options(**shared, prefixes=args.prefixes or "auto")
        )
        if not args.served_name and not lookup(name):
            name = _find_only_model(remote) or name
        if name:
            remote = remote.replace(model=name)
        # A server may serve only the text part of a model, under another name.
        is_known = name is None or lookup(name) is not None
        found = _measure("server", remote, "image" in expected.values if expected else is_known)
        works = works and found is not None
        if expected and found:
            works = _compare(expected, "server", found)
    if args.reference and local and expected:
        from shared_engine.local.reference import Reference  # imports torch

        values = _compute_samples(Reference(local), task, "image" in expected.values)
        works = _compare(expected, "transformers", Measured(expected.kind, values)) and works
    return 0 if works else 1


def _find_only_model(remote: Options | RerankOptions) -> str | None:
    """Return the name of the only model of a server; None if it has several, as a catalogue has."""
    with contextlib.suppress(NeMoRetrieverError), _open(remote) as model:
        listed = model.list_models()
        if len(listed) == 1:
            return listed[0].id
    return None


def _measure(
    place: str, options: Options | RerankOptions, has_images: bool = True
) -> Measured | None:
    """Compute the samples, with images if the model takes them; print description and times."""
    started = time.perf_counter()
    try:
        with _open(options) as model:
            has_images = has_images and "image" in model.modalities
            values = _compute_samples(model, options.task, has_images)
            first = time.perf_counter() - started
            short = [EmbeddingInput(_SAMPLES["query"][0])]
            seconds = timeit.repeat(lambda: _compute(model, "query", short), number=1, repeat=9)
            kind = model.score_kind if isinstance(model, Reranker) else "vector"
            width = f"{values['document'].shape[1]} values per " if kind == "vector" else ""
            print(f"{place}: {model.description}")
            print(
                f"{'':{len(place)}}  {width}{kind}; ready after {first:.1f} s; a short text takes "
                f"{1000 * statistics.median(seconds):.1f} ms"
            )
    except NeMoRetrieverError as exc:
        print(f"{place}: does not work: {type(exc).__name__}: {exc}")
        return None
    return Measured(kind, values)


def _open(options: Options | RerankOptions) -> Embedder | Reranker:
    return Embedder(options) if isinstance(options, Options) else Reranker(options)


def _compute_samples(
    model: Embedder | Reranker | Reference, task: Task, has_images: bool
) -> Values:
    samples = {name: [EmbeddingInput(text) for text in texts] for name, texts in _SAMPLES.items()}
    if task == "rerank":
        del samples["query"]  # `_compute` has one
    if has_images:
        disc = images.draw_sample()
        pair = EmbeddingInput("A disc that fades to its rim.", disc)
        samples["image"] = [EmbeddingInput(image=disc), pair]
    return {name: _compute(model, name, documents) for name, documents in samples.items()}


def _compute(
    model: Embedder | Reranker | Reference, name: str, documents: list[EmbeddingInput]
) -> NDArray[np.float32]:
    """Return the vectors of a sample, or the scores of its documents for a query."""
    if isinstance(model, Reranker) or (not isinstance(model, Embedder) and model.is_reranker):
        return model.score(_SAMPLES["query"][0], documents)
    return model.embed(documents, "query" if name == "query" else "document")


def _compare(local: Measured, other_name: str, other: Measured) -> bool:
    """Print how close two sets of values are; return whether they are interchangeable."""
    mine, theirs = local.values["document"], other.values["document"]
    if local.values.keys() - other.values.keys():
        same, reason = False, ": only the local model takes images"
    elif mine.shape != theirs.shape:
        same, reason = False, f": {mine.shape[1]} and {theirs.shape[1]} values per vector"
    elif local.kind == "vector":
        same, reason = _compare_vectors(local.values, other.values, other_name)
    else:
        same, reason = _compare_scores(local, other)
    print(f"local and {other_name}: {'' if same else 'not '}interchangeable{reason}")
    return same


def _compare_scores(local: Measured, other: Measured) -> tuple[bool, str]:
    import numpy as np

    kind: ScoreKind = "probability" if "probability" in (local.kind, other.kind) else "logit"
    largest: list[float] = []
    for name, mine in local.values.items():
        scores = mine if local.kind == kind else 1 / (1 + np.exp(-mine))
        largest.append(float(abs(scores - other.values[name]).max()))
        print(f"{name}: largest difference of a {kind} {largest[-1]:.1e}")
    most, allowed = float(np.max(largest)), MAX_DIFFERENCE[kind]  # NaN if there is one
    return most <= allowed, f": largest difference {most:.1e}, allowed {allowed}"


def _compare_vectors(local: Values, other: Values, other_name: str) -> tuple[bool, str]:
    import numpy as np

    cosines = {name: (mine * other[name]).sum(axis=1) for name, mine in local.items()}
    for name, values in cosines.items():
        print(
            f"{name}: cosine {values.min():.7f} to {values.max():.7f}, "
            f"largest difference {abs(local[name] - other[name]).max():.1e}"
        )
    smallest = float(np.concatenate(list(cosines.values())).min())  # NaN if there is one
    ordered = _share_of_ordered_pairs(local, other)
    print(
        f"local and {other_name}: {100 * ordered:.0f} % of the pairs of documents are in the same "
        "order"
    )
    reason = f": smallest cosine {smallest:.7f}, required {MIN_COSINE}"
    is_near = smallest >= MIN_COSINE_FP8 and ordered >= MIN_ORDERED_FP8
    if smallest < MIN_COSINE and is_near and other_name == "server":
        reason = (
            f" if the server computes in FP8: smallest cosine {smallest:.7f}, required "
            f"{MIN_COSINE_FP8} for FP8, {MIN_COSINE} otherwise; according to NVIDIA, an index of "
            "BF16 vectors generally need not be built again for FP8; to compare without FP8, start "
            "the NIM with NIM_PRECISION=fp16"
        )
        return True, reason
    return smallest >= MIN_COSINE, reason


def _share_of_ordered_pairs(*engines: Values) -> float:
    """Return the share of the pairs of documents that two engines order equally for a query."""
    import numpy as np

    is_larger = []
    for values in engines:
        documents = np.concatenate([rows for name, rows in values.items() if name != "query"])
        scores = values["query"] @ documents.T  # (queries, documents)
        first, second = np.triu_indices(len(documents), k=1)
        is_larger.append(scores[:, first] > scores[:, second])
    return float((is_larger[0] == is_larger[1]).mean())


def _probe(base_url: str) -> None:
    """Print the beginning of a server's replies to requests without a key."""
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
