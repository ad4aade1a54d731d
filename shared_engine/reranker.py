"""Entry point: how documents get scores for a query.

score(query, documents)
  registry.py, routing.py ...... one engine for equal options: in this process, or at a server
  pipeline.py
    validate ... documents.py    the query is a text, every document of a kind the model takes
    submit ..... local/          tokenize pairs ──► scheduler: steps ──► llama: mean, head
             or  nim/            batches ──► requests ──► validated replies
    finish ..... pipeline.py     activation, errors by index
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from shared_engine.backend import Rows, ScoreKind
from shared_engine.documents import validate, validate_query
from shared_engine.errors import ConfigurationError, InputError, NeMoRetrieverError
from shared_engine.model import Model
from shared_engine.options import RerankOptions
from shared_engine.pipeline import Documents, ScoringPipeline
from shared_engine.threads import result_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class RankedDocument(NamedTuple):
    """A document of a ranking."""

    index: int  # type: ignore[assignment]  # hides the method of tuple
    """Its position in the caller's list."""
    score: float


class Reranker(Model[RerankOptions]):
    """Scores documents for a query with one model, in this process or at a server.

    A reranker reads query and document together, so it ranks better than a comparison of vectors,
    and takes a forward pass for each pair: use it on the candidates of a search.

    Creating one is cheap: the model loads at first use. Safe to use from many threads and event
    loops. Pickles, copies and forks carry the options; equal options share one loaded model.
    """

    _options_type = RerankOptions
    _pipeline_type = ScoringPipeline
    _pipeline: ScoringPipeline

    def score(self, query: str, documents: Documents) -> NDArray[np.float32]:
        """Score documents for a query; a higher score is a better answer.

        A score does not depend on the other documents.

        Args:
            query: The text of a search.
            documents: Texts, or `EmbeddingInput` for images.

        Returns:
            (n,) float32, in the order of the documents. They are logits, or probabilities with
            `activation="sigmoid"`; `score_kind` is which, as some servers have no logits.

        Raises:
            InputError: the query or a document is of the wrong type or modality (`index` is the
                position of the document), and nothing was computed; or the query is too long; or
                the only document is too long, or its image is unusable.
            PartialResultError: some of several documents failed; the error has the other scores,
                and the error of each failed document.
            RemoteError: the server refused or failed all of them, for one reason.
            ConfigurationError: the options cannot work; raised at first use.
            EngineClosedError: `close` was called.
        """
        return self._unwrap(result_of(self._submit(query, documents)))

    async def ascore(self, query: str, documents: Documents) -> NDArray[np.float32]:
        """Score documents without blocking the event loop; cancelling drops the waiting work.

        See `score` for arguments, result and errors.
        """
        return await self._await(partial(self._submit, query, documents), self._unwrap)

    def rank(
        self, query: str, documents: Documents, top_n: int | None = None
    ) -> list[RankedDocument]:
        """Return the documents by descending score; equal scores keep the caller's order.

        Args:
            query: The text of a search.
            documents: As for `score`.
            top_n: Number of documents to return; None returns all.

        Raises:
            ConfigurationError: `top_n` is less than 1.
            Exception: as `score`.
        """
        _check_top_n(top_n)
        return rank_scores(self.score(query, documents), top_n)

    async def arank(
        self, query: str, documents: Documents, top_n: int | None = None
    ) -> list[RankedDocument]:
        """Return the documents by descending score without blocking the event loop; see `rank`."""
        _check_top_n(top_n)
        return rank_scores(await self.ascore(query, documents), top_n)

    @property
    def score_kind(self) -> ScoreKind:
        """Meaning of the scores: "logit", or "probability" (from 0 to 1). Loads the model.

        With the default `activation`, a server decides; it is known after the first call.
        """
        if self.options.activation == "sigmoid":
            return "probability"
        return self.load().score_kind

    def _score_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[float]:
        """Score pairs of a query and a document, in order; for the adapter of LangChain.

        The pairs of one query are a request; all requests are submitted before any is awaited.
        """
        import numpy as np

        # All are checked before any is computed.
        documents = validate([document for _, document in pairs], "document", self.modalities)
        groups: dict[str, list[int]] = {}
        requests: list[tuple[list[int], Future[Rows]]] = []
        scores = np.empty((len(pairs), 1), np.float32)
        errors: dict[int, NeMoRetrieverError] = {}
        rows: list[int] = []
        try:
            for row, (query, _) in enumerate(pairs):
                rows = [row]
                groups.setdefault(validate_query(query), []).append(row)
            for query, rows in groups.items():
                group = [documents[row] for row in rows]
                requests.append((rows, self._pipeline.submit_valid(group, query=query)))
            for rows, request in requests:
                scored = result_of(request)
                scores[rows] = scored.vectors
                errors |= {rows[row]: error for row, error in scored.errors.items()}
        except InputError as exc:  # of a query, or of its only document
            raise exc.at(rows[exc.index or 0]) from exc.__cause__
        finally:
            for _, request in requests:
                request.cancel()
        values: list[float] = self._unwrap(Rows(scores, errors)).tolist()
        return values

    def _submit(self, query: str, documents: Documents) -> Future[Rows]:
        return self._pipeline.submit(documents, query=validate_query(query))


def _check_top_n(top_n: int | None) -> None:
    if top_n is not None and top_n < 1:
        raise ConfigurationError(f"top_n={top_n}: must be at least 1; use None for all documents")


def rank_scores(scores: NDArray[Any], top_n: int | None = None) -> list[RankedDocument]:
    """Return scores (n,) by descending value; equal ones keep their order.

    Args:
        top_n: Number of documents to return; None returns all.
    """
    import numpy as np

    order = np.argsort(-scores, kind="stable")[:top_n]
    return [RankedDocument(i, scores[i].item()) for i in order.tolist()]
