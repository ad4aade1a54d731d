"""From NVIDIA's adapters to ours: what a program that used theirs meets."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

import llamaindex_nemoretriever as llamaindex
from langchain_nemoretriever import NeMoRetrieverEmbeddings, NeMoRetrieverRerank
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import CATALOGUE, Options, RerankOptions
from tests.support.servers import NAME, running

RERANKERS = [NeMoRetrieverRerank, llamaindex.NeMoRetrieverRerank]
OURS = [Options, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding]
THEIRS = {
    "async_http_client": "http_client_factory=",
    "batch_size": "max_batch_size=",
    "dimension": "dimensions=",
    "infer_path": "base_url=",
    "input_type": "method for queries or the one for documents",
    "max_length": "max_tokens=",
    "mode": "backend=",
    "trucate": "truncate=",
    "usage_telemetry_enabled": "omit it",
}


@pytest.mark.parametrize("kind", OURS)
@pytest.mark.parametrize("name", THEIRS)
def test_an_option_that_we_do_not_have_is_refused_with_what_to_do(kind: Any, name: str) -> None:
    with pytest.raises(ValidationError, match=THEIRS[name]) as caught:
        kind(**{name: "a value"})
    assert name in str(caught.value)
    assert "a value" not in str(caught.value)


@pytest.mark.parametrize("kind", OURS)
def test_values_that_mean_the_default_there(kind: Any) -> None:
    assert kind(dimensions=0).dimensions is None  # the default of their LlamaIndex adapter
    for name in ("timeout", "deadline"):
        with pytest.raises(ValidationError, match="must be greater than 0; use None for no limit"):
            kind(**{name: 0})
    assert kind(nvidia_api_key="nvapi-1", truncate="end").truncate == "END"


@pytest.mark.parametrize("kind", OURS[1:])
def test_models_are_listed_here_and_at_a_nim(
    kind: Any, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NVIDIA_BASE_URL", raising=False)
    here = [spec.name for spec in CATALOGUE if spec.task == "embed"]
    assert [model.id for model in kind.get_available_models()] == here
    with running(Options(model=str(checkpoint))) as server:
        (model,) = kind.get_available_models(base_url=server.url)
        assert model.id == NAME
        assert [model.id for model in kind(base_url=server.url).available_models] == [NAME]


# Rerankers.

VALUES: dict[str, Any] = {
    "api_key": "nvapi-1",
    "base_url": "http://127.0.0.1:9/v1",  # nothing listens there: nothing may be asked
    "default_headers": {"x-test": "test"},
    "max_batch_size": 64,
    "model": "nvidia/llama-nemotron-rerank-vl-1b-v2",
    "nvidia_api_key": "nvapi-1",
    "nvidia_base_url": "http://127.0.0.1:9/v1",
    "top_n": 7,
    "truncate": "END",
    "verify_ssl": False,
}
"""The parameters of both of NVIDIA's rerankers that ours have."""
REFUSED = {
    "extra_headers": "default_headers=",
    "http_client": "http_client_factory=",
    "usage_telemetry_enabled": "omit it",
}


@pytest.mark.parametrize("kind", RERANKERS)
def test_a_reranker_takes_the_parameters_of_nvidias(kind: Any) -> None:
    for name, value in VALUES.items():
        made = kind(**{name: value})
        kept = getattr(made, name.removeprefix("nvidia_"))
        assert (kept.get_secret_value() if "key" in name else kept) == value
    together = kind(**VALUES)
    assert "nvapi-1" not in repr(together) + str(together.model_dump())
    for name, advice in REFUSED.items():
        with pytest.raises(ValidationError, match=advice):
            kind(**{name: "a value"})


def test_nvidias_reranker_for_langchain_has_no_other_parameter() -> None:
    theirs = pytest.importorskip("langchain_nvidia_ai_endpoints").NVIDIARerank
    assert theirs.model_fields.keys() <= VALUES.keys() | REFUSED.keys()


@pytest.mark.parametrize("kind", RERANKERS)
def test_defaults_of_a_reranker(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    default = kind()
    assert default.reranker.model == "nvidia/llama-nemotron-rerank-1b-v2"
    assert (default.top_n, default.max_batch_size, default.timeout) == (5, 32, 120)
    assert default.reranker.options == RerankOptions()
    monkeypatch.setenv("NVIDIA_BASE_URL", "http://127.0.0.1:9/v1")  # read at use, not at import
    assert "http://127.0.0.1:9/v1" in kind().reranker.description


@pytest.mark.parametrize("kind", RERANKERS)
def test_rerankers_are_listed(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NVIDIA_BASE_URL", raising=False)
    assert [model.id for model in kind.get_available_models()] == [
        spec.name for spec in CATALOGUE if spec.task == "rerank"
    ]
