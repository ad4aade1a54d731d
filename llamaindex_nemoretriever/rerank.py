"""`NeMoRetrieverRerank`: a LlamaIndex node postprocessor on the shared engine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llama_index.core.callbacks.schema import CBEventType, EventPayload
from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
from llama_index.core.postprocessor.types import BaseNodePostprocessor
from llama_index.core.schema import BaseNode, NodeWithScore, QueryBundle
from llama_index_instrumentation import get_dispatcher
from pydantic import ConfigDict, Field

from llamaindex_nemoretriever.nodes import list_inputs
from shared_engine.adapter import RerankAdapter
from shared_engine.documents import EmbeddingInput
from shared_engine.errors import InputTypeError
from shared_engine.reranker import RankedDocument

dispatcher = get_dispatcher(__name__)


class NeMoRetrieverRerank(RerankAdapter, BaseNodePostprocessor):
    """Reranks nodes for LlamaIndex; takes the fields of `shared_engine.RerankOptions`.

    A node is its text with metadata (`MetadataMode.EMBED`), its image, or both. A text model
    ignores the image of a node that has a text. The result is new `NodeWithScore` objects; nodes of
    the caller keep their scores. For a minimum score, add a `SimilarityPostprocessor` after it.

    `reranker.score(...)` returns all scores as a float32 array.

    Every method raises the errors of `Reranker.score`: an `InputError` has the position of its
    node as `index`, a `PartialResultError` has the scores of the others.
    """

    model_config = ConfigDict(arbitrary_types_allowed=True)

    keep_retrieval_score: bool = Field(
        default=False,
        description='Keep the score of the retriever in metadata["retrieval_score"], which is left '
        "out of the text for embedding models and LLMs.",
    )

    @classmethod
    def class_name(cls) -> str:
        """Return the name that LlamaIndex serialises this class under."""
        return "NeMoRetrieverRerank"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _require_query(query_bundle)
        with self._announced(nodes, query) as best:
            ranking = self._rank(query.query_str, _list_inputs(nodes))
            best.extend(self._select(nodes, ranking))
        return best

    @dispatcher.span
    async def _apostprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        query = _require_query(query_bundle)
        with self._announced(nodes, query) as best:
            ranking = await self._arank(query.query_str, _list_inputs(nodes))
            best.extend(self._select(nodes, ranking))
        return best

    def _select(
        self, nodes: list[NodeWithScore], ranking: list[RankedDocument]
    ) -> list[NodeWithScore]:
        return [
            NodeWithScore(
                node=_keep_score(nodes[index]) if self.keep_retrieval_score else nodes[index].node,
                score=score,
            )
            for index, score in ranking
        ]

    @contextmanager
    def _announced(
        self, nodes: list[NodeWithScore], query: QueryBundle
    ) -> Iterator[list[NodeWithScore]]:
        """Send LlamaIndex's events around a call that fills the list."""
        top_n = len(nodes) if self.top_n is None else self.top_n
        model = self.reranker.model or "unknown"  # before a NIM has named it
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=model))
        payload: dict[str, Any] = {
            EventPayload.NODES: nodes,
            EventPayload.MODEL_NAME: model,
            EventPayload.QUERY_STR: query.query_str,
            EventPayload.TOP_K: top_n,
        }
        with self.callback_manager.event(CBEventType.RERANKING, payload) as event:
            best: list[NodeWithScore] = []
            yield best
            event.on_end({EventPayload.NODES: best})
        dispatcher.event(ReRankEndEvent(nodes=best))


def _require_query(query: QueryBundle | None) -> QueryBundle:
    if query is None:
        raise InputTypeError("expected a query, got None; pass query_str= or query_bundle=")
    return query


def _list_inputs(nodes: list[NodeWithScore]) -> list[EmbeddingInput]:
    return list_inputs(each.node for each in nodes)


def _keep_score(found: NodeWithScore) -> BaseNode:
    """Return a copy of a node with its score as metadata that is in no text for a model."""
    node, key = found.node, "retrieval_score"
    update = {
        "metadata": {**node.metadata, key: found.score},
        "excluded_embed_metadata_keys": [*node.excluded_embed_metadata_keys, key],
        "excluded_llm_metadata_keys": [*node.excluded_llm_metadata_keys, key],
    }
    return node.model_copy(update=update)
