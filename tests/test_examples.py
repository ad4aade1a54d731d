"""Every example that people copy, run as it stands: Python blocks of Markdown and of docstrings.

Models come from a hub's cache that is made here: random weights under the public names. Where an
example names a server, a real one answers. Examples of README and guide are complete by themselves.
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shared_engine.catalogue import ModelSpec, lookup
from shared_engine.cli.main import main
from tests.conftest import ROOT
from tests.support.checkpoints import PROMPTS, SHAPES, build_checkpoint
from tests.support.faulty_nim import FaultyNim
from tests.support.rerankers import build_reranker
from tests.support.vl_checkpoints import VL_SHAPES, build_vl_checkpoint, page

PACKAGES = ("shared_engine", "langchain_nemoretriever", "llamaindex_nemoretriever")
TEXT, IMAGES = "nvidia/llama-nemotron-embed-1b-v2", "nvidia/llama-nemotron-embed-vl-1b-v2"
RERANK = "nvidia/llama-nemotron-rerank-1b-v2"
VL = VL_SHAPES["nested"].text
GUIDE = ROOT / "cookbook" / "guide"
DATABASE = "@localhost:5432/postgres"
"""The database of examples, for which a real one is put."""
LEFT_OUT = {
    "langchain_openai",
    "langchain_postgres",
    "langgraph.store.postgres",
    "llama_index.vector_stores.postgres",
}
"""Packages that an example may need and that may be missing: it is skipped then."""


class Example(NamedTuple):
    """Some lines of Python in a document."""

    place: str
    code: str


def list_examples() -> Iterator[Example]:
    """Yield the blocks of Python in the project's Markdown, and the indented ones of docstrings."""
    for path in sorted(ROOT.glob("*.md")) + sorted((ROOT / "shared_engine").rglob("*.md")):
        text = path.read_text()
        for found in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text[: found.start()].count("\n") + 2
            yield Example(f"{path.relative_to(ROOT)}:{line}", found[1])
    for path in sorted(GUIDE.glob("*.md")):
        for number, code in enumerate(find_indented(path.read_text())):
            yield Example(f"{path.relative_to(ROOT)}:{number}", code)
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    name = getattr(node, "name", "module")
                    for code in find_indented(ast.get_docstring(node) or ""):
                        yield Example(f"{path.relative_to(ROOT)}:{name}", code)


def find_indented(text: str) -> Iterator[str]:
    """Yield what stands indented between empty lines, and is Python.

    >>> list(find_indented("Do:\\n\\n    run()\\n    # so\\n\\nRaises:\\n    Error: always.\\n"))
    ['run()\\n# so']
    """
    for found in re.finditer(r"\n\n((?: {4}.*\n?|\n(?= {4}))+)", text):
        code = textwrap.dedent(found[1]).rstrip()
        try:
            ast.parse(code)
        except SyntaxError:
            continue
        if not code.startswith(">>>"):
            yield code


EXAMPLES = list(list_examples())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub's cache with the public models, small and of random weights."""
    folder = tmp_path_factory.mktemp("hub")

    def snapshot(name: str) -> Path:
        revision = lookup(name).revision
        return folder / f"models--{name.replace('/', '--')}" / "snapshots" / revision

    sizes = {"hidden_size": 2048, "num_hidden_layers": 1}
    dimensions = (384, 512, 768, 1024)
    build_checkpoint(snapshot(TEXT), prompts=PROMPTS, matryoshka_dimensions=dimensions, **sizes)
    build_vl_checkpoint(snapshot(IMAGES))
    build_reranker(snapshot(RERANK), replace(SHAPES["gqa"], **sizes))
    return folder


def find_small(name: str) -> ModelSpec | None:
    """Return the catalogue's row with the size that the models of `hub` have."""
    spec = lookup(name)
    if spec is None:
        return None
    hidden, layers = (VL.hidden_size, VL.num_hidden_layers) if spec.is_multimodal else (2048, 1)
    return replace(spec, hidden_size=hidden, num_hidden_layers=layers)


class Dataset:
    """Takes what Ray's does: the pipeline of the example wants a GPU, and begins a cluster."""

    def map_batches(self, *given: Any, **named: Any) -> None:
        """Refuse what Ray's own method has no parameter for."""
        import ray.data

        inspect.signature(ray.data.Dataset.map_batches).bind(self, *given, **named)


@pytest.fixture
def scope(tmp_path: Path) -> dict[str, Any]:
    """Names that the examples of docstrings use without defining them, and files of the README."""
    from ray.data import ActorPoolStrategy

    from langchain_nemoretriever import NeMoRetrieverEmbeddings
    from shared_engine import Embedder, Options, track_usage
    from shared_engine.bulk import EmbedBatch

    for seed, name in enumerate(("page.png", "scan.tiff", "chart.jpeg")):
        page(seed, 200, 300).save(tmp_path / name)
    (tmp_path / "texts.txt").write_text("a text\nand another one\n")
    return {
        "ActorPoolStrategy": ActorPoolStrategy,
        "EmbedBatch": EmbedBatch,
        "Options": Options,
        "dataset": Dataset(),
        "embedder": Embedder(Options(model=TEXT)),
        "embeddings": NeMoRetrieverEmbeddings(model=TEXT),
        "itertools": itertools,
        "source": iter(["a text"] * 3000),
        "store": lambda *_: None,
        "texts": ["a text", "and another one"],
        "track_usage": track_usage,
    }


@pytest.mark.parametrize(
    "example",
    [
        pytest.param(
            example, id=example.place, marks=[pytest.mark.slow] * (DATABASE in example.code)
        )
        for example in EXAMPLES
    ],
)
def test_it_runs(  # noqa: PLR0917
    example: Example,
    hub: Path,
    scope: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    # A model of a public name must have that model's size; these have all else of it.
    monkeypatch.setattr("shared_engine.local.checkpoint.lookup", find_small)
    monkeypatch.setattr("llama_index.core.Settings._embed_model", None)
    monkeypatch.chdir(tmp_path)
    with FaultyNim() as nim:
        code = re.sub(r"http://localhost:\d+", nim.url.removesuffix("/v1"), example.code)
        if DATABASE in code:
            address = request.getfixturevalue("postgres").info
            code = code.replace(DATABASE, f"@/{address.dbname}?host={address.host}")
        if 'Path("vectors")' in code:  # what the command before the example writes
            (tmp_path / "data.csv").write_text("text\nParis is the capital of France.\n")
            assert main(["embed", "data.csv", "--columns", "text", "--out", "vectors"]) == 0
        compiled = compile(
            code, example.place, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True
        )
        is_complete = example.place.startswith(("README", "cookbook/guide"))
        try:
            running = eval(compiled, {} if is_complete else scope)
        except ModuleNotFoundError as error:
            if error.name not in LEFT_OUT:
                raise
            pytest.skip(f"needs {error.name}")
        if inspect.iscoroutine(running):
            asyncio.run(running)
    for file in tmp_path.glob("*/chroma.sqlite3"):
        from chromadb import PersistentClient

        for collection in PersistentClient(file.parent).list_collections():
            assert collection.configuration_json["hnsw"]["space"] == "cosine"


def test_there_are_examples_in_every_kind_of_document() -> None:
    places = [example.place.partition(":")[0] for example in EXAMPLES]
    assert places.count("README.md") >= 6
    assert {"shared_engine/embedder.py", "shared_engine/usage.py"} <= set(places)
