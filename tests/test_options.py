"""The options themselves; what they do is tested where they are used."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import Options


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
