"""Models to compare, their vectors (embedded once at full size, kept on disk), and rerankers."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar

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
    PartialResultError,
    UnsupportedDimensionsError,
)
from shared_engine.evaluate.data import Collection, RetrievalData
from shared_engine.evaluate.search import reorder
from shared_engine.options import Options, RerankOptions
from shared_engine.reranker import Reranker
from shared_engine.vectors import unit

WINDOW = 256
"""Documents between two writes; a crash loses these and those on the device."""
_log = logging.getLogger("shared_engine")
_PROBE = ["how do I return a damaged product?"]
_EngineT = TypeVar("_EngineT", bound=Embedder | Reranker)


class _Engine(Generic[_EngineT]):
    """A model of this package, in this process or at a server."""

    def __init__(self, engine: _EngineT) -> None:
        self._engine = engine
        model = Path(engine.options.local_model)
        self.name = model.absolute().name if model.is_dir() else str(model)
        if engine.base_url:
            self.name = " at ".join(filter(None, (engine.options.model, engine.base_url)))

    @property
    def modalities(self) -> frozenset[Modality]:
        """Kinds of input that it accepts; loads the model."""
        return self._engine.modalities

    def describe(self) -> dict[str, Any]:
        """Return facts for a report; loads the model."""
        options = self._engine.options
        spec = None if options.checkpoint or self._engine.base_url else lookup(options.local_model)
        return {
            "model": self.name,
            "revision": options.revision or (spec.revision if spec else None),
            "description": self._engine.description,
        }


class EngineModel(_Engine[Embedder]):
    """An embedding model of this package."""

    def __init__(self, options: Options) -> None:
        super().__init__(Embedder(options.replace(dimensions=None, embedding_type="float")))

    def cache_key(self, role: Role) -> str:
        """Return the key of the vectors; servers of one model have one each, to compare them."""
        return f"{self._engine.base_url or ''}{self._engine.cache_key(role)}"

    @property
    def dimensions(self) -> int:
        """Length of a full vector."""
        return self._engine.dimensions

    def check_dimensions(self, dimensions: int) -> None:
        """Check that the first values of a full vector are the vector of this length.

        Raises:
            UnsupportedDimensionsError: the model does not offer it.
            ConfigurationError: a server returns other vectors for it.
        """
        short = self._engine.with_options(dimensions=dimensions).embed(_PROBE, "query")
        cut = unit(self._engine.embed(_PROBE, "query"), dimensions)
        if np.abs(short - cut).max() > 0.01:
            raise ConfigurationError(
                f"{self.name}: the vectors with dimensions={dimensions} are not the first values "
                "of the full ones; evaluate each size by itself"
            )

    def stream(self, documents: Iterator[EmbeddingInput], role: Role) -> Iterator[Rows]:
        """Yield full vectors of unit length in windows of WINDOW rows, in order."""
        return self._engine.stream(documents, role, batch_size=WINDOW, errors="return")


class EngineReranker(_Engine[Reranker]):
    """A reranker of this package."""

    def __init__(self, options: RerankOptions) -> None:
        super().__init__(Reranker(options))

    def rerank(
        self, data: RetrievalData, found: Sequence[Sequence[str]], candidates: int
    ) -> tuple[list[list[str]], float]:
        """Order the first `candidates` of each query by their scores; the others follow them.

        Args:
            found: Ids for each query, best first.

        Returns:
            The ids for each query, and the median of the seconds for one query.

        Raises:
            InputError: a query or document cannot be scored; the message has its file and id.
            NeMoRetrieverError: as with `Reranker.score`.
        """
        reranked, seconds = [], []
        for query, names in zip(data.queries.ids, found, strict=True):
            start = time.perf_counter()
            scores = self._score(data, query, names[:candidates])
            seconds.append(time.perf_counter() - start)
            reranked.append(reorder(names, scores))
        return reranked, float(np.median(seconds))

    def _score(self, data: RetrievalData, query: str, names: Sequence[str]) -> NDArray[np.float32]:
        documents = [data.corpus.inputs[name] for name in names]
        try:
            return self._engine.score(data.queries.inputs[query].text or "", documents)
        except (InputError, PartialResultError) as exc:
            error = exc if isinstance(exc, InputError) else next(iter(exc.errors.values()))
        if not isinstance(error, InputError):
            raise error
        path, name = data.queries.path, query
        if error.index is not None:
            path, name = data.corpus.path, names[error.index]
        raise InputError(f"{path}, {name!r}: {error.args[0]}") from error


class SentenceTransformersModel:
    """A model of sentence-transformers, with its own prompts for queries and documents.

    Code from a checkpoint is not run. Texts over the model's limit are truncated at the end.
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
        self.dimensions = int(self._model.encode_query(_PROBE, show_progress_bar=False).shape[1])
        self._library = f"sentence-transformers {version('sentence-transformers')}"
        self._digest = self._digest_model()

    def describe(self) -> dict[str, Any]:
        """Return facts for a report."""
        revision = self._model.model_card_data.base_model_revision
        return {"model": self.name, "revision": revision, "description": self._library}

    def cache_key(self, role: Role) -> str:
        """Return a digest of weights, vocabulary, modules and prompts, with the role."""
        return f"st-{self._digest}-{role}"

    def check_dimensions(self, dimensions: int) -> None:
        """Check that a vector is at least as long; trained sizes are not known.

        Raises:
            UnsupportedDimensionsError: it is shorter.
        """
        if dimensions > self.dimensions:
            raise UnsupportedDimensionsError(
                f"dimensions={dimensions}, but {self.name} has {self.dimensions}"
            )

    def stream(self, documents: Iterator[EmbeddingInput], role: Role) -> Iterator[Rows]:
        """Yield full vectors of unit length in windows of WINDOW rows, in order."""
        encode = self._model.encode_query if role == "query" else self._model.encode_document
        while window := [document.text or "" for document in islice(documents, WINDOW)]:
            yield Rows(unit(np.array(encode(window, show_progress_bar=False), np.float32)))

    def _digest_model(self) -> str:
        model = self._model
        digest = hashlib.sha256()
        vocabulary = sorted(model.tokenizer.get_vocab().items())
        for part in (self._library, model, model.prompts, vocabulary):
            digest.update(repr(part).encode())
        for name, tensor in model.state_dict().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]


Model = EngineModel | SentenceTransformersModel


def find_model(name: str, like: Options) -> Model:
    """Return a model to compare with.

    Args:
        name: `st:` and a name of sentence-transformers, a server's URL, or a model's name or
            folder.
        like: Options of the first model. A local model gets its local options (device, dtype), a
            server its remote ones.
    """
    if name.startswith("st:"):
        device = None if like.device == "auto" else like.device
        return SentenceTransformersModel(name.removeprefix("st:"), device)
    return EngineModel(Options(**_read_name(name, like)))


def find_reranker(name: str, like: Options) -> EngineReranker:
    """Return a reranker by its name, folder or URL, with options as `find_model` shares them."""
    shared = _read_name(name, like)
    shared.pop("prefixes", None)  # a reranker has none
    return EngineReranker(RerankOptions(**shared))


def _read_name(name: str, like: Options) -> dict[str, Any]:
    is_remote = name.startswith(("http://", "https://"))
    given = set(like.list_given("nim" if is_remote else "local")) - {"checkpoint", "revision"}
    given |= like.model_fields_set & {"truncate", "api_key"}
    shared = {key: getattr(like, key) for key in given}
    return shared | ({"base_url": name} if is_remote else {"model": name, "backend": "local"})


def embed(model: Model, collection: Collection, role: Role, cache: Path) -> NDArray[np.float32]:
    """Return the full vectors (n, d) of a collection as a memory map of a file in `cache`.

    The rows of the file from the first that is missing or damaged are embedded. Two processes that
    do so concurrently write the same vectors to the same places.

    Raises:
        InputError: a document cannot be embedded; the message has its file and id.
        NeMoRetrieverError: as with `Embedder.embed`. Rows already written are kept.
    """
    key = f"{model.cache_key(role)} {collection.digest}"
    path = cache / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
    shape = (len(collection), model.dimensions)
    cache.mkdir(parents=True, exist_ok=True)
    path.touch()
    with path.open("r+b") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)  # the same again if it is there
        begin, bytes_per_row = file.tell(), shape[1] * 4
        written = min(len(collection), (file.seek(0, os.SEEK_END) - begin) // bytes_per_row)
        start = done = _count_good(np.memmap(file, "<f4", "r", begin, (written, shape[1])))
        if 0 < start < len(collection):
            _log.warning("%s: the vectors from row %d on are embedded", path, start)
        file.seek(begin + start * bytes_per_row)
        for rows in model.stream(islice(collection.inputs.values(), start, None), role):
            for row, error in rows.errors.items():
                if not isinstance(error, InputError):
                    raise error
                name = collection.ids[done + row]
                raise InputError(f"{collection.path}, {name!r}: {error.args[0]}") from error
            file.write(rows.vectors.astype("<f4").tobytes())
            file.flush()
            done += len(rows)
    found: NDArray[np.float32] = np.load(path, mmap_mode="r")
    return found


def _count_good(vectors: NDArray[np.float32]) -> int:
    """Return the number of rows (n, d) before the first that is not of unit length."""
    squares = np.einsum("ij,ij->i", vectors, vectors)
    bad = np.flatnonzero(~(np.abs(squares - 1) < 0.01))
    return int(bad[0]) if len(bad) else len(vectors)
