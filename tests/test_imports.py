"""What an import loads; how long that takes is for tests/benchmarks/overhead.py."""

from __future__ import annotations

from collections.abc import Callable

import pytest

OURS = {"langchain_nemoretriever", "llamaindex_nemoretriever", "shared_engine"}
LATER = {
    "shared_engine.local.checkpoint",
    "shared_engine.local.llama",
    "shared_engine.images.tiles",
    "shared_engine.local.backend",
    "shared_engine.nim.backend",
    "shared_engine.server.app",
}
HEAVY = {
    "PIL",
    "httpx",
    "huggingface_hub",
    "langchain_core",
    "llama_index",
    "numpy",
    "safetensors",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
}


def loaded(python: Callable[[str], str], code: str) -> set[str]:
    return set(python(f"{code}\nimport sys; print(*sys.modules)").split())


def test_the_engine_loads_pydantic_and_nothing_heavy(python):
    modules = loaded(python, "import shared_engine")
    assert "pydantic" in modules
    assert not modules & (HEAVY | LATER)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        (
            "from langchain_core.embeddings import Embeddings",
            "from langchain_nemoretriever import NeMoRetrieverEmbeddings",
        ),
        (
            "from llama_index.core.embeddings import MultiModalEmbedding",
            "from llamaindex_nemoretriever import NeMoRetrieverEmbedding",
        ),
    ],
)
def test_an_adapter_loads_its_framework_and_us(python, theirs, ours):
    pytest.importorskip(theirs.split()[1])
    beyond = loaded(python, ours) - loaded(python, theirs)
    assert {name for name in beyond if name.partition(".")[0] not in OURS} == set()
    assert not beyond & LATER


@pytest.mark.parametrize("package", ["langchain_nemoretriever", "llamaindex_nemoretriever"])
def test_a_package_alone_loads_next_to_nothing(python, package):
    modules = loaded(python, f"import {package}") & {*OURS, *HEAVY, *LATER, "pydantic"}
    assert modules == {package}


def test_a_package_says_what_it_has():
    import langchain_nemoretriever

    assert dir(langchain_nemoretriever) == ["NeMoRetrieverEmbeddings"]
    with pytest.raises(AttributeError, match="'langchain_nemoretriever' has no attribute 'Nothing"):
        langchain_nemoretriever.Nothing  # noqa: B018


def test_an_object_of_each_kind_costs_no_more(python):
    """Made, but not used."""
    made = "import shared_engine; shared_engine.Embedder(shared_engine.Options()).stream([])"
    assert not loaded(python, made) & (HEAVY | LATER)
    made = "import langchain_nemoretriever as a; a.NeMoRetrieverEmbeddings(model='x').embedder"
    assert not loaded(python, made) & (HEAVY - {"langchain_core"} | LATER)
