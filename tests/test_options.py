"""The options themselves; what they do is tested where they are used."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

import langchain_nemoretriever as for_langchain
import llamaindex_nemoretriever as for_llamaindex
from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import Embedder, Options, Reranker


@pytest.mark.parametrize("kind", [Options, NeMoRetrieverEmbeddings, NeMoRetrieverEmbedding])
def test_options_are_frozen(kind):
    made = kind(device="cpu")
    for option in Options.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(made, option, getattr(made, option))


def test_an_unknown_option_is_refused_with_the_nearest_one():
    with pytest.raises(
        ValidationError, match=r"unknown option dimension=; did you mean dimensions="
    ):
        Options(dimension=384)
    with pytest.raises(ValidationError, match="quantum"):
        Options(quantum=1)


@pytest.mark.parametrize(
    "kind",
    [
        *(Embedder, Reranker, Options),
        *(for_langchain.NeMoRetrieverEmbeddings, for_langchain.NeMoRetrieverRerank),
        *(for_llamaindex.NeMoRetrieverEmbedding, for_llamaindex.NeMoRetrieverRerank),
    ],
)
def test_the_name_of_the_model_needs_no_keyword(kind, tmp_path):
    assert kind("nvidia/some").model == "nvidia/some"
    assert kind(tmp_path).model == str(tmp_path)


def test_the_model_is_given_once_and_is_the_only_positional_option():
    made = NeMoRetrieverEmbeddings("nvidia/some", dimensions=512)
    assert made == NeMoRetrieverEmbeddings(model="nvidia/some", dimensions=512)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'model'"):
        NeMoRetrieverEmbeddings("nvidia/some", model="nvidia/other")
    with pytest.raises(TypeError, match="positional argument"):
        NeMoRetrieverEmbeddings("nvidia/some", 512)
