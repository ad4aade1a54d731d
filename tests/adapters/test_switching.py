"""From NVIDIA's adapters to ours: what a program that used theirs meets."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import CATALOGUE, Options
from tests.support.servers import NAME, running

OURS = [Options, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding]
THEIRS = {
    "async_http_client": "http_client_factory=",
    "batch_size": "max_batch_size=",
    "dimension": "dimensions=",
    "infer_path": "base_url=",
    "input_type": "method for queries or the one for documents",
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
    here = [spec.name for spec in CATALOGUE if spec.is_local and spec.task == "embed"]
    assert [model.id for model in kind.get_available_models()] == here
    with running(Options(model=str(checkpoint))) as server:
        (model,) = kind.get_available_models(base_url=server.url)
        assert model.id == NAME
        assert [model.id for model in kind(base_url=server.url).available_models] == [NAME]
