"""A missing optional dependency is reported with the pip line that installs it."""

from __future__ import annotations

import pytest

LANGCHAIN = "from langchain_nemoretriever import NeMoRetrieverEmbeddings"
LANGCHAIN_RERANK = "from langchain_nemoretriever import NeMoRetrieverRerank"
LLAMAINDEX = "from llamaindex_nemoretriever import NeMoRetrieverEmbedding"
LLAMAINDEX_RERANK = "from llamaindex_nemoretriever import NeMoRetrieverRerank"
LOAD = "from shared_engine import Embedder, Options; Embedder(Options(model={checkpoint!r})).load()"
SERVE = "from shared_engine.server import create_app"
EMBED = 'from shared_engine.cli.main import main; main(["embed", "/input", "--out", "/output"])'
PAGES = "from shared_engine.images.pages import open_pages; open_pages('a.pdf')"


@pytest.mark.parametrize(
    ("missing", "use", "extra"),
    [
        ("langchain_core", LANGCHAIN, "langchain"),
        ("langchain_core", LANGCHAIN_RERANK, "langchain"),
        ("llama_index.core", LLAMAINDEX, "llamaindex"),
        ("llama_index.core", LLAMAINDEX_RERANK, "llamaindex"),
        ("torch", LOAD, "local"),
        ("tokenizers", LOAD, "local"),
        ("starlette.applications", SERVE, "server"),
        ("prometheus_client", SERVE, "server"),
        ("pyarrow", "from shared_engine.bulk import Job", "bulk"),
        ("pyarrow", EMBED, "bulk"),
        ("pypdfium2", PAGES, "bulk"),
        ("pyarrow", "from shared_engine.distributed import run_ray", "ray"),
        ("ir_measures", "from shared_engine.evaluate import evaluate", "evaluate"),
    ],
)
def test_a_missing_library_names_its_extra(missing, use, extra, python, checkpoint):
    output = python(f"""if True:
        import contextlib, sys
        sys.modules[{missing!r}] = None
        from shared_engine import MissingExtraError
        with contextlib.redirect_stderr(sys.stdout):
            try:
                {use.format(checkpoint=str(checkpoint))}
            except MissingExtraError as error:
                assert isinstance(error, ImportError)
                print(error)
    """)
    assert f"'{missing}" in output  # or a module of it
    assert f"pip install 'nemoretriever-embeddings[{extra}]'" in output
