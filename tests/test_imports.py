"""Which package imports what, and what an import loads.

How long an import takes is for tests/benchmarks/overhead.py.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from graphlib import TopologicalSorter
from importlib import import_module
from pathlib import Path

import pytest

from tests.conftest import ROOT

OURS = {"langchain_nemoretriever", "llamaindex_nemoretriever", "shared_engine"}

# The rules. An import counts wherever it stands: in a module, a function or TYPE_CHECKING.

LAYERS = (
    {"_cache", "_version", "errors", "logs", "spans", "threads"},
    {"_lazy"},
    {"images"},
    {"catalogue", "documents", "endpoints", "options", "usage", "vectors", "wire"},
    {"backend"},
    {"local", "nim"},
    {"registry", "routing"},
    {"pipeline"},
    {"model", "stream"},
    {"embedder", "reranker"},
    {"shared_engine"},  # the public names
    {"adapter", "server"},
    {"bulk", "evaluate"},
    {"distributed"},
    {"cli", "langchain_nemoretriever", "llamaindex_nemoretriever"},
)
"""Packages and modules by layer, the lowest first: each imports from its own layer or below."""

ONLY = {
    # our packages
    "local": {"cli", "registry"},
    "nim": {"registry"},
    "server": {"cli", "distributed"},
    "bulk": {"cli", "distributed"},
    "distributed": {"cli"},
    "evaluate": {"cli"},
    "langchain_nemoretriever": set(),
    "llamaindex_nemoretriever": set(),
    # models in this process
    "huggingface_hub": {"local"},
    "safetensors": {"local"},
    "tokenizers": {"local"},
    "torch": {"local"},
    "transformers": {"local"},
    "triton": {"local"},
    # a NIM; `check` asks a server about itself, and a replica its app, with clients not ours
    "httpx": {"nim", "images", "cli", "distributed"},
    # images; to fetch one, a connection must be checked below httpx
    "httpcore": {"images"},
    "PIL": {"images"},
    "pypdfium2": {"images"},
    # the server
    "prometheus_client": {"server"},
    "starlette": {"server"},
    "uvicorn": {"server"},
    # bulk work
    "pyarrow": {"bulk", "distributed"},
    "ray": {"distributed"},
    # evaluation
    "bm25s": {"evaluate"},
    "datasets": {"evaluate"},
    "ir_measures": {"evaluate"},
    "matplotlib": {"evaluate"},
    "mteb": {"evaluate"},
    "sentence_transformers": {"evaluate"},
    # bytes of the wire
    "orjson": {"bulk", "nim", "server"},
    "pybase64": {"images", "nim"},
    # spans, in a program that has imported it
    "opentelemetry": {"pipeline", "spans"},
    # bars
    "tqdm": {"bulk", "embedder", "pipeline", "stream"},
    # frameworks
    "langchain_core": {"langchain_nemoretriever"},
    "llama_index": {"llamaindex_nemoretriever"},
    "llama_index_instrumentation": {"llamaindex_nemoretriever"},
}
"""Who may import a package or a library, besides the package itself."""

ANYWHERE = {"numpy", "pydantic", "pydantic_core"}
"""Libraries that any package may import."""

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in sorted(OURS)
    for path in sorted((ROOT / package).rglob("*.py"))
}
"""The product's files, by name of the module."""


def read_imports(path: Path) -> Iterator[str]:
    """Yield what a file imports: our modules by their full names, others by their package's."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relative to itself"
            module = str(node.module)
            names = [f"{module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else module for name in names]
        else:
            continue
        yield from (name if name in FILES else name.partition(".")[0] for name in names)


def package(name: str) -> str:
    """Return the package or top-level module of one of our modules; a library is its own.

    >>> package("shared_engine.local.llama"), package("shared_engine"), package("torch")
    ('local', 'shared_engine', 'torch')
    """
    top, _, inner = name.partition(".")
    return inner.partition(".")[0] if top == "shared_engine" and inner else top


IMPORTS = {
    name: set(read_imports(path)) - sys.stdlib_module_names - {name} for name, path in FILES.items()
}


def test_every_package_has_a_layer():
    assert {package(name) for name in FILES} == set().union(*LAYERS)


def test_imports_go_downwards_only():
    layer = {name: number for number, names in enumerate(LAYERS) for name in names}
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others & FILES.keys())
        if layer.get(package(other), 0) > layer.get(package(name), 0)
    ]
    assert wrong == []


def test_a_library_is_imported_by_its_packages_only():
    wrong = [
        f"{name} imports {other}"
        for name, others in IMPORTS.items()
        for other in sorted(others)
        if package(other) in ONLY and package(name) not in {package(other), *ONLY[package(other)]}
    ]
    assert wrong == []


def test_every_library_has_its_packages():
    assert set().union(*IMPORTS.values()) - FILES.keys() == {*ONLY, *ANYWHERE} - {
        package(name) for name in FILES
    }


@pytest.mark.parametrize("unit", [str, package], ids=["modules", "packages"])
def test_there_is_no_circle(unit):
    """Neither one that a lazy import hides, nor one for type checkers only."""
    graph: dict[str, set[str]] = {}
    for name, others in IMPORTS.items():
        ours = {unit(other) for other in others & FILES.keys()}
        graph.setdefault(unit(name), set()).update(ours - {unit(name)})
    TopologicalSorter(graph).prepare()  # else a CycleError, which names the circle


@pytest.mark.parametrize("name", FILES)
def test_a_module_has_a_docstring(name):
    text = FILES[name].read_text(encoding="utf-8")
    first, _, _ = (ast.get_docstring(ast.parse(text)) or "").partition("\n")
    assert first.endswith(".")


def test_no_test_module_imports_another():
    """What several of them need is in tests/support."""
    wrong = [
        f"{path.relative_to(ROOT)} imports {node.module}"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith("tests.")
        and (node.module or "").rpartition(".")[2].startswith("test_")
    ]
    assert wrong == []


# What an import loads.

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
    "opentelemetry",
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


def test_the_command_line_loads_no_command_that_does_not_run(python):
    modules = loaded(python, "from shared_engine.cli.main import build_parser; build_parser()")
    assert "shared_engine.cli.check" in modules
    assert not modules & (HEAVY | LATER)


@pytest.mark.parametrize(
    ("theirs", "package", "name"),
    [
        (
            "from langchain_core.embeddings import Embeddings",
            "langchain_nemoretriever",
            "NeMoRetrieverEmbeddings",
        ),
        (
            "from llama_index.core.embeddings import MultiModalEmbedding",
            "llamaindex_nemoretriever",
            "NeMoRetrieverEmbedding",
        ),
        (
            "from langchain_core.cross_encoders import BaseCrossEncoder; "
            "from langchain_core.documents import BaseDocumentCompressor, Document",
            "langchain_nemoretriever",
            "NeMoRetrieverRerank",
        ),
        (
            "from llama_index.core.postprocessor.types import BaseNodePostprocessor",
            "llamaindex_nemoretriever",
            "NeMoRetrieverRerank",
        ),
    ],
)
def test_an_adapter_loads_its_framework_and_us(python, theirs, package, name):
    """Imported, and made but not used."""
    beyond = python(f"""if True:
        import sys, warnings
        with warnings.catch_warnings(action="default"):  # those of a framework's own import
            {theirs}
        before = set(sys.modules)
        from {package} import {name}
        model = {name}(model="no/such-model", device="cuda:7")
        assert repr(model._engine)
        print(*set(sys.modules) - before)
    """).split()
    assert {module for module in beyond if module.partition(".")[0] not in OURS} == set()
    assert not LATER & set(beyond)


@pytest.mark.parametrize("package", ["langchain_nemoretriever", "llamaindex_nemoretriever"])
def test_an_adapter_alone_loads_the_engine_and_no_framework(python, package):
    modules = loaded(python, f"import {package}")
    assert not modules & (HEAVY | LATER)
    assert {module for module in modules if module.startswith(package)} == {package}


@pytest.mark.parametrize(
    "package",
    [
        "langchain_nemoretriever",
        "llamaindex_nemoretriever",
        "shared_engine.bulk",
        "shared_engine.distributed",
        "shared_engine.evaluate",
        "shared_engine.images",
        "shared_engine.server",
    ],
)
def test_a_package_lists_the_names_that_type_checkers_see(package):
    tree = ast.parse(FILES[package].read_bytes())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))  # if TYPE_CHECKING
    imports = (node for node in typed.body if isinstance(node, ast.ImportFrom))
    names = [alias.name for node in imports for alias in node.names]
    module = import_module(package)
    assert dir(module) == sorted(names)
    with pytest.raises(AttributeError, match=f"'{package}' has no attribute 'Nothing'"):
        module.Nothing  # noqa: B018


@pytest.mark.parametrize("command", ["embed", "evaluate", "serve"])
def test_a_command_loads_nothing_heavy_before_it_runs(python, command):
    assert not loaded(python, f"import shared_engine.cli.{command}") & (HEAVY | LATER)


def test_an_embedder_and_a_stream_cost_no_more(python):
    """Made, but not used."""
    made = "import shared_engine; shared_engine.Embedder(shared_engine.Options()).stream([])"
    assert not loaded(python, made) & (HEAVY | LATER)
