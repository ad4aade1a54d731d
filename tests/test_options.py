"""The options themselves; what they do is tested where they are used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

import langchain_nemoretriever as langchain
import llamaindex_nemoretriever as llamaindex
from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import ConfigurationError, Embedder, Options, Reranker, RerankOptions

KINDS = [
    Options,
    RerankOptions,
    NeMoRetrieverEmbeddings,
    NeMoRetrieverEmbedding,
    langchain.NeMoRetrieverRerank,
    llamaindex.NeMoRetrieverRerank,
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_option_cannot_be_set_and_the_error_names_the_copy(kind: Any) -> None:
    made = kind(device="cpu")
    for option in kind.names_of():
        with pytest.raises(ConfigurationError, match=rf"model_copy\(update={{'{option}': "):
            setattr(made, option, getattr(made, option))
    assert made.model_copy(update={"max_batch_size": 7}).max_batch_size == 7


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_of_a_copy_are_validated(kind: Any, tmp_path: Path) -> None:
    made = kind("a/model", device="cpu", api_key="nvapi-1")
    copied = made.model_copy(
        update={"model": tmp_path, "truncate": "end", "nvidia_api_key": "nvapi-2"}
    )
    assert (copied.model, copied.truncate, copied.device) == (str(tmp_path), "END", "cpu")
    assert copied.api_key == SecretStr("nvapi-2")
    with pytest.raises(ValidationError, match="did you mean truncate="):
        made.model_copy(update={"truncat": "END"})
    with pytest.raises(ValidationError, match="truncate"):
        made.model_copy(update={"truncate": "MIDDLE"})


@pytest.mark.parametrize("kind", KINDS)
def test_the_model_is_the_only_argument_by_position(kind: Any, tmp_path: Path) -> None:
    assert kind("a/model").model == "a/model"
    assert kind(tmp_path, device="cpu").model == str(tmp_path)
    assert kind(None).model is None
    with pytest.raises(TypeError, match="model is given twice"):
        kind("a/model", model="a/model")
    with pytest.raises(TypeError, match="positional"):
        kind("a/model", "cpu")


def test_an_unknown_option_is_refused_with_the_nearest_one():
    with pytest.raises(
        ValidationError, match=r"unknown option dimension=; did you mean dimensions="
    ):
        Options(dimension=384)
    with pytest.raises(ValidationError, match="quantum"):
        Options(quantum=1)


def test_a_key_is_a_text_or_a_secret() -> None:
    for key in (" nvapi-1\n", SecretStr("nvapi-1")):
        made = Options(api_key=key)
        assert made.api_key == SecretStr("nvapi-1")
        assert "nvapi-1" not in repr(made)
    with pytest.raises(ValidationError, match="expected a str or a SecretStr") as caught:
        Options(api_key=lambda: "nvapi-1")  # type: ignore[arg-type]
    assert caught.value.error_count() == 1


@pytest.mark.parametrize("kind", [Embedder, Reranker])
def test_the_name_of_the_model_needs_no_options(kind, tmp_path):
    assert kind("nvidia/some").model == "nvidia/some"
    assert kind(tmp_path).model == str(tmp_path)
