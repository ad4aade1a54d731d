"""NVIDIA's hosted catalogue: models that have ended, successors, and no default."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from langchain_core.documents import Document
from llama_index.core.schema import NodeWithScore, TextNode

import llamaindex_nemoretriever as llamaindex
from langchain_nemoretriever import NeMoRetrieverEmbeddings, NeMoRetrieverRerank
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import (
    ConfigurationError,
    Embedder,
    ModelNotFoundError,
    ModelRetiredError,
    Options,
    Reranker,
    RerankOptions,
)
from shared_engine.cli.main import main
from shared_engine.endpoints import HOSTED
from tests.support.faulty_nim import FaultyNim
from tests.support.nim import MODEL, Nim, vectors

LIVE = "nvidia/nemotron-3-embed-1b"
VL = "nvidia/llama-nemotron-embed-vl-1b-v2"
UNKNOWN = "nvidia/nv-embedqa-e5-v5"
RERANKER = "nvidia/llama-nemotron-rerank-vl-1b-v2"
GONE = {
    "type": "about:blank",
    "title": "Gone",
    "status": 410,
    "detail": f"The model '{VL}' has reached its end of life on 2026-12-01T09:00:00Z and is no "
    "longer available.",
}
"""A reply of the catalogue, as users published it."""

CALLS: dict[str, Callable[..., object]] = {
    "embed": lambda **given: Embedder(Options(**given)).embed(["a"]),
    "aembed": lambda **given: asyncio.run(Embedder(Options(**given)).aembed(["a"])),
    "stream": lambda **given: list(Embedder(Options(**given)).stream(["a"])),
    "dimensions": lambda **given: Embedder(Options(**given)).dimensions,
    "langchain": lambda **given: NeMoRetrieverEmbeddings(**given).embed_query("a"),
    "llamaindex": lambda **given: NeMoRetrieverEmbedding(**given).get_query_embedding("a"),
}
calls = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)


def gone(request: httpx.Request, _: dict[str, Any]) -> httpx.Response:
    """Answer as the catalogue does for a model that has ended."""
    headers = {"content-type": "application/problem+json"}
    return httpx.Response(410, content=json.dumps(GONE), headers=headers)


@calls
@pytest.mark.parametrize(
    ("model", "ended"),
    [
        (MODEL, "2026-08-25"),
        (MODEL.removeprefix("nvidia/"), "2026-08-25"),
        ("nvidia/llama-3.2-nv-embedqa-1b-v2", "2026-08-25"),
        ("nvidia/llama-3.2-nemoretriever-300m-embed-v2", "2026-05-18"),
    ],
)
def test_a_model_that_has_ended_is_refused_before_a_request(
    call: Callable[..., object], model: str, ended: str
) -> None:
    nim = Nim()
    with pytest.raises(ModelRetiredError) as caught:
        call(model=model, api_key="k", http_client_factory=nim.client)
    said = str(caught.value)
    assert f"ended {model} on {ended}; its successor is {LIVE}. " in said
    assert "do not mix" in said
    assert 'backend="local"' in said
    assert "self-hosted NIM (base_url=)" in said
    assert ("checkpoint=" in said) is ("300m" in model), "no public weights"
    assert nim.requests == []


def test_a_misspelt_model_is_recognized() -> None:
    nim = Nim(lambda *_: httpx.Response(404, json={"detail": "Not Found"}))
    for model, hint in (("nvidia/nemotron3-embed-1b", f"; did you mean '{LIVE}'?"), ("mine", "")):
        embedder = nim.embedder(base_url=HOSTED, api_key="k", model=model)
        with embedder, pytest.raises(ModelNotFoundError) as caught:
            embedder.embed(["a"])
        assert str(caught.value).endswith(f"Not Found{hint}")


def test_a_role_in_the_name_changes_nothing() -> None:
    nim = Nim()
    refused = pytest.raises(ModelRetiredError, match=f"ended {MODEL}-query on")
    embedder = nim.embedder(base_url=HOSTED, api_key="k", model=f"{MODEL}-query")
    with embedder, refused:
        embedder.embed(["a"], "query")
    assert nim.requests == []


@calls
@pytest.mark.parametrize("given", [{"api_key": "k"}, {"api_key": "k", "base_url": HOSTED}])
def test_without_a_model_the_live_ones_are_listed_before_a_request(
    call: Callable[..., object], given: dict[str, str]
) -> None:
    nim = Nim()
    with pytest.raises(ConfigurationError, match=f"model= is missing.*: {LIVE}$") as caught:
        call(http_client_factory=nim.client, **given)
    assert not isinstance(caught.value, ModelRetiredError)
    assert nim.requests == []


def test_no_vectors_of_a_hosted_model_that_was_not_named_are_cached() -> None:
    nim = Nim()
    embedder = Embedder(Options(api_key="k", dimensions=8, http_client_factory=nim.client))
    with embedder, pytest.raises(ConfigurationError, match="model= is missing"):
        embedder.cache_key("document")


@calls
@pytest.mark.parametrize(
    ("model", "newer"),
    [
        (VL, "its successor is nvidia/Nemotron-3.5-Embed-1B-BF16."),
        (UNKNOWN, f"live hosted model .*: {LIVE}."),
    ],
)
def test_a_reply_410_explains_successor_and_alternatives(
    call: Callable[..., object], model: str, newer: str
) -> None:
    nim = Nim(gone)
    said = rf"410\): Gone The model .* end of life on 2026-12-01.*{newer} .*do not mix.*base_url="
    with pytest.raises(ModelRetiredError, match=said) as caught:
        call(model=model, api_key="k", http_client_factory=nim.client)
    assert ("in this process" in str(caught.value)) is (model == VL)
    assert len(nim.requests) == 1, "it was sent again"


RERANKS: dict[str, Callable[..., object]] = {
    "rank": lambda **given: Reranker(RerankOptions(**given)).rank("q", ["a", "b"]),
    "arank": lambda **given: asyncio.run(Reranker(RerankOptions(**given)).arank("q", ["a"])),
    "langchain": lambda **given: NeMoRetrieverRerank(**given).compress_documents(
        [Document("a")], "q"
    ),
    "llamaindex": lambda **given: llamaindex.NeMoRetrieverRerank(**given).postprocess_nodes(
        [NodeWithScore(node=TextNode(text="a"))], query_str="q"
    ),
}
reranks = pytest.mark.parametrize("call", RERANKS.values(), ids=RERANKS)


@reranks
@pytest.mark.parametrize(
    ("model", "newer"),
    [
        (RERANKER, "no other hosted model is known"),
        ("nvidia/llama-nemotron-rerank-1b-v2", f"use a live hosted model .*: {RERANKER}"),
        ("nvidia/nv-rerankqa-mistral-4b-v3", f"use a live hosted model .*: {RERANKER}"),
    ],
)
def test_a_reply_410_to_a_reranker_names_rerankers(
    call: Callable[..., object], model: str, newer: str
) -> None:
    nim = Nim(gone)
    said = rf"410\): Gone .*; {newer}[^:]*\. Scores of two models do not compare.*base_url="
    with pytest.raises(ModelRetiredError, match=said):
        call(model=model, api_key="k", http_client_factory=nim.client)
    assert len(nim.requests) == 1, "it was sent again"


def test_a_reply_410_to_the_first_request_of_a_reranker_names_rerankers() -> None:
    reply = (410, {"Content-Type": "application/problem+json"}, json.dumps(GONE).encode())
    name = "nvidia/nv-rerankqa-mistral-4b-v3"
    with FaultyNim(models=[{"id": name}], answer=lambda _: reply) as nim:
        reranker = Reranker(RerankOptions(model=name, base_url=nim.url))
        with pytest.raises(ModelRetiredError, match=f"use a live hosted model .*: {RERANKER}"):
            reranker.score("q", ["a"])


@reranks
def test_a_hosted_reranker_has_no_default(call: Callable[..., object]) -> None:
    nim = Nim()
    with pytest.raises(ConfigurationError, match=f"model= is missing.*: {RERANKER}$"):
        call(api_key="k", http_client_factory=nim.client)
    assert nim.requests == []


def test_the_successor_itself_may_end() -> None:
    nim = Nim(gone)
    refused = pytest.raises(ModelRetiredError, match="no other hosted model is known")
    with nim.embedder(base_url=HOSTED, api_key="k", model=LIVE) as embedder, refused:
        embedder.embed(["a"])


@pytest.mark.parametrize("role", ["query", "document"])
def test_a_live_model_is_used_as_named(role: Any) -> None:
    nim = Nim()
    with nim.embedder(base_url=HOSTED, api_key="k", model=LIVE) as embedder:
        sent = "query" if role == "query" else "passage"
        got = embedder.embed(["a", "b"], role)
    np.testing.assert_allclose(got, vectors(["a", "b"], sent), atol=1e-6)
    assert [body["model"] for body in nim.bodies] == [LIVE]


def test_a_deprecated_model_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "shared_engine")
    nim = Nim()
    with nim.embedder(base_url=HOSTED, api_key="k", model=VL) as embedder:
        for text in "ab":
            embedder.embed([text])
    (line,) = caplog.messages
    assert "deprecated since 2026-09-20" in line
    assert [body["model"] for body in nim.bodies] == [VL] * 2


def test_the_models_of_the_catalogue_are_listed_without_a_model() -> None:
    nim = Nim(models=(LIVE, MODEL))
    options = {"api_key": "k", "http_client_factory": nim.client}
    listed = NeMoRetrieverEmbeddings.get_available_models(**options)
    assert [model.id for model in listed] == [LIVE, MODEL]


# The command line


def test_check_refuses_before_a_request(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("httpx.stream", None)
    assert main(["check", "--base-url", HOSTED, "--served-name", MODEL]) == 2
    assert f"its successor is {LIVE}" in capsys.readouterr().err
    assert main(["check", "--base-url", HOSTED]) == 2
    assert "model= is missing, and NVIDIA's catalogue has no default" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["embed", "evaluate"])
def test_other_commands_refuse_before_a_request(
    command: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("A_KEY", "k")
    (tmp_path / "qrels").mkdir()
    (tmp_path / "corpus.jsonl").write_text('{"_id": "d", "text": "a document"}\n')
    (tmp_path / "queries.jsonl").write_text('{"_id": "q", "text": "a query"}\n')
    (tmp_path / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    key = ["--api-key-env", "A_KEY"]
    given = {
        "embed": [str(tmp_path / "corpus.jsonl"), "--out", str(tmp_path / "out")],
        "evaluate": [str(tmp_path), "--cache", str(tmp_path / "cache")],
    }[command]
    assert main([command, *given, *key, "--model", MODEL]) == 2
    assert f"its successor is {LIVE}" in capsys.readouterr().err
    given[-1] += "-2"
    assert main([command, *given, *key]) == 2
    assert "model= is missing" in capsys.readouterr().err


def test_check_reports_a_reply_410(capsys: pytest.CaptureFixture[str]) -> None:
    reply = (410, {"Content-Type": "application/problem+json"}, json.dumps(GONE).encode())
    with FaultyNim(models=[{"id": VL}], answer=lambda _: reply) as nim:
        assert main(["check", "--base-url", nim.url, "--served-name", VL]) == 1
    printed = capsys.readouterr().out
    assert "server: does not work: ModelRetiredError" in printed
    assert "its successor is nvidia/Nemotron-3.5-Embed-1B-BF16" in printed
