"""Models to compare, and their vectors: embedded once, at full size, and kept on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from shared_engine.backend import Rows
from shared_engine.catalogue import lookup
from shared_engine.documents import EmbeddingInput, Modality, Role
from shared_engine.embedder import Embedder
from shared_engine.errors import (
    ConfigurationError,
    InputError,
    MissingExtraError,
    UnsupportedDimensionsError,
)
from shared_engine.evaluate.data import Collection
from shared_engine.options import Options
from shared_engine.vectors import unit

WINDOW = 256
"""Documents between two writes: what a crash loses, beside what is on the device."""
_PROBE = ["how do I return a damaged product?"]


class Model(Protocol):
    """What can be evaluated: it embeds documents, and names its vectors for a cache."""

    name: str
    """What a table calls it."""

    @property
    def facts(self) -> dict[str, Any]:
        """What a report says of it."""

    @property
    def dimensions(self) -> int:
        """Length of a full vector."""

    @property
    def modalities(self) -> frozenset[Modality]:
        """Kinds of input that it takes."""

    def cache_key(self, role: Role) -> str:
        """Return a name that is the same only where the vectors are."""

    def check_dimensions(self, dimensions: int) -> None:
        """Raise UnsupportedDimensionsError, or another, if vectors cannot be cut to this length."""

    def stream(self, documents: Iterator[EmbeddingInput], role: Role) -> Iterator[Rows]:
        """Yield full vectors of unit length in windows of at most WINDOW rows, in order."""


class EngineModel:
    """A model of this package, in this process or at a NIM."""

    def __init__(self, options: Options) -> None:
        self._embedder = Embedder(options.replace(dimensions=None, embedding_type="float"))
        self.name = Path(options.model).name if Path(options.model).is_dir() else options.model
        if options.base_url:
            named = f"{self.name} at " if options.is_model_given else ""
            self.name = f"{named}{options.base_url}"

    @property
    def facts(self) -> dict[str, Any]:
        """Its name, revision, description and cache keys."""
        options = self._embedder.options
        spec = None if options.checkpoint or options.base_url else lookup(options.model)
        return {
            "model": self.name,
            "revision": options.revision or (spec and spec.revision),
            "description": self._embedder.description,
            "cache_key": {role: self.cache_key(role) for role in ("query", "document")},
        }

    @property
    def dimensions(self) -> int:
        """Length of a full vector."""
        return self._embedder.dimensions

    @property
    def modalities(self) -> frozenset[Modality]:
        """Kinds of input that it takes."""
        return self._embedder.modalities

    def cache_key(self, role: Role) -> str:
        """Return what `Embedder.cache_key` does."""
        return self._embedder.cache_key(role)

    def check_dimensions(self, dimensions: int) -> None:
        """Embed a short text with this option: it must be the beginning of the full vector.

        Raises:
            UnsupportedDimensionsError: the model does not offer it.
            ConfigurationError: a server cuts its vectors in another way.
        """
        asked = self._embedder.with_options(dimensions=dimensions).embed(_PROBE, "query")
        cut = unit(self._embedder.embed(_PROBE, "query")[:, :dimensions].copy())
        if np.abs(asked - cut).max() > 0.01:
            raise ConfigurationError(
                f"{self.name} gives other vectors with dimensions={dimensions} than the first "
                "values of its full ones; evaluate each size by itself"
            )

    def stream(self, documents: Iterator[EmbeddingInput], role: Role) -> Iterator[Rows]:
        """Yield the rows of `Embedder.stream`."""
        return self._embedder.stream(documents, role, batch_size=WINDOW, errors="return")


class SentenceTransformersModel:
    """A model of sentence-transformers, with the prompts that it names for queries and documents.

    Code from a checkpoint is not run. Texts over its limit lose their end, as always there.
    """

    modalities: frozenset[Modality] = frozenset({"text"})

    def __init__(self, name: str, device: str | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ModuleNotFoundError as exc:
            raise MissingExtraError(
                f"st:{name} needs {exc.name!r}: pip install sentence-transformers"
            ) from exc
        try:
            self._model = SentenceTransformer(name, device=device)
        except (OSError, ValueError) as exc:
            raise ConfigurationError(f"st:{name} cannot be loaded: {exc}") from exc
        self.name = f"st:{Path(name).name}" if Path(name).is_dir() else f"st:{name}"
        self._digest = self._digest_model()

    @property
    def facts(self) -> dict[str, Any]:
        """Its name, what it is made of, and cache keys."""
        card = getattr(self._model, "model_card_data", None)
        return {
            "model": self.name,
            "revision": getattr(card, "base_model_revision", None),
            "description": f"sentence-transformers {version('sentence-transformers')}",
            "cache_key": {role: self.cache_key(role) for role in ("query", "document")},
        }

    @property
    def dimensions(self) -> int:
        """Length of a full vector."""
        return int(self._model.encode_query(_PROBE, show_progress_bar=False).shape[1])

    def cache_key(self, role: Role) -> str:
        """Return a digest of weights, vocabulary, modules and prompts, and the role."""
        return f"st-{self._digest}-{role}"

    def check_dimensions(self, dimensions: int) -> None:
        """Check that it is no longer than a vector; what it was trained for is not said there."""
        if dimensions > self.dimensions:
            raise UnsupportedDimensionsError(
                f"dimensions={dimensions}, but {self.name} has {self.dimensions}"
            )

    def stream(self, documents: Iterator[EmbeddingInput], role: Role) -> Iterator[Rows]:
        """Yield the vectors of texts."""
        encode = self._model.encode_query if role == "query" else self._model.encode_document
        while window := list(islice(documents, WINDOW)):
            texts = [document.text or "" for document in window]
            yield Rows(unit(np.array(encode(texts, show_progress_bar=False), np.float32)))

    def _digest_model(self) -> str:
        model = self._model
        digest = hashlib.sha256()
        vocabulary = sorted(model.tokenizer.get_vocab().items())
        for part in (version("sentence-transformers"), model, model.prompts, vocabulary):
            digest.update(repr(part).encode())
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


def find_model(name: str, like: Options) -> Model:
    """Return another model to compare with: `st:` and a name, an address, or a name or folder.

    What runs here runs as `like` says, on its device and in its dtype.
    """
    if name.startswith("st:"):
        device = None if like.device == "auto" else like.device
        return SentenceTransformersModel(name.removeprefix("st:"), device)
    shared = {key: getattr(like, key) for key in like.model_fields_set & _SHARED}
    if name.startswith(("http://", "https://")):
        return EngineModel(Options(base_url=name, **{**shared, **_given(like, "nim")}))
    return EngineModel(Options(model=name, backend="local", **{**shared, **_given(like, "local")}))


_SHARED = {"truncate", "api_key"}


def _given(like: Options, scope: Any) -> dict[str, Any]:
    names = set(like.list_given(scope)) - {"checkpoint", "revision"}
    return {name: getattr(like, name) for name in names}


def find_cache() -> Path:
    """Return the user's own folder for vectors."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "nemoretriever" / "evaluate"


def embed(model: Model, collection: Collection, role: Role, cache: Path) -> NDArray[np.float32]:
    """Return the full vectors (n, d) of a collection as a memory map, from `cache` where it can.

    Raises:
        InputError: a document cannot be embedded; the message says file and line.
        NeMoRetrieverError: as with `Embedder.embed`. What was written before stays, and the next
            call goes on after it.
    """
    name = hashlib.sha256(f"{model.cache_key(role)} {collection.digest}".encode()).hexdigest()[:32]
    path = cache / f"{name}.npy"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("r+b" if part.exists() else "w+b") as file:
            _complete(file, model, collection, role)
        with suppress(FileNotFoundError):  # another process was faster
            part.replace(path)
    found: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return found


def _complete(file: BinaryIO, model: Model, collection: Collection, role: Role) -> None:
    """Write the rows that a file has not, each where it belongs.

    Two processes that do so at once write the same bytes to the same places.
    """
    shape = (len(collection), model.dimensions)
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)  # the same again, where it was there
    begin, bytes_per_row = file.tell(), shape[1] * 4
    start = done = max(0, file.seek(0, os.SEEK_END) - begin) // bytes_per_row
    file.seek(begin + done * bytes_per_row)
    windows = model.stream(collection.documents(start), role)
    while done < len(collection):
        rows = next(windows)
        for row, error in rows.errors.items():
            if not isinstance(error, InputError):
                raise error
            place = collection.place(start + rows.offset + row)
            raise InputError(f"{place}: {error.args[0]}") from error
        vectors = rows.vectors
        file.write(vectors.astype("<f4").tobytes())
        file.flush()
        os.fsync(file.fileno())  # a hole after a power cut would pass for vectors
        done += len(vectors)
