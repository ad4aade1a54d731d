"""Ask questions about the Python you run, through LangChain and LlamaIndex over one store.

    choose_model ... yours, the public one or a stand-in, and why
    read_corpus .... docstrings of the standard library and some packages: parsed, never imported
    ingest ......... LlamaIndex's IngestionPipeline ──► Chroma on disk; only what is new or changed
    ask ............ LangChain's and LlamaIndex's retrievers over that one collection

`make demo` sets everything up and runs this; `make demo ARGS=--help` lists the options.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import math
import os
import platform
import re
import sys
import sysconfig
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import standin  # beside this file
from tqdm import tqdm

from langchain_nemoretriever import NeMoRetrieverEmbeddings
from llamaindex_nemoretriever import NeMoRetrieverEmbedding
from shared_engine import Embedder, NeMoRetrieverError, logs
from shared_engine.catalogue import DEFAULT_MODEL, lookup

if TYPE_CHECKING:
    from chromadb import Collection
    from chromadb.api import ClientAPI
    from langchain_core.vectorstores import VectorStore
    from llama_index.core.base.base_retriever import BaseRetriever

QUESTIONS = (
    "How do I open a URL and read the response?",
    "Remove common leading whitespace from every line",
    "How can I read a ZIP archive?",
)
PACKAGES = ("pydantic", "tqdm")  # read besides the standard library
SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo", "tkinter", "distutils", "encodings"}
DEFINITION = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
SHORTEST, LONGEST = 80, 1_000  # characters of a passage
BATCH = 64  # passages between two saves
LIMIT, LIMIT_SLOW = 2_000, 100  # passages; the second for a full-size model without a GPU
WIDTH = 100
TOP = 3  # passages that answer a question


@dataclass(frozen=True)
class Default:
    """What runs where no model is asked for."""

    name: str
    """The public model, in the catalogue."""
    build: Callable[[], Path]
    """Builds the stand-in for it."""
    caveat: str
    """What to know of the stand-in."""
    target: str
    """What `make` calls the demo."""

    @property
    def switch(self) -> str:
        """How to run another one."""
        return (
            f"make {self.target} MODEL=/path/to/folder, or MODEL=organisation/name from the hub; "
            "with NVIDIA_BASE_URL set, a NIM"
        )


DEFAULT = Default(
    DEFAULT_MODEL,
    standin.build,
    "It is small and finds less than BM25 (nDCG@10 on XQuAD English: 0.90, BM25 0.96): judge no "
    "model by it.",
    "demo",
)


def choose_model(asked: str | None, default: Default = DEFAULT) -> tuple[dict[str, str], str]:
    """Return the options of the model to run, and why it: yours, the public one or a stand-in."""
    model = {"model": asked or default.name}
    if url := os.environ.get("NVIDIA_BASE_URL"):
        return model | {"base_url": url}, "at the NIM of NVIDIA_BASE_URL"
    if asked:
        return model, "asked for"
    options, why = _public_checkpoint(default.name)
    if options:
        return options, why
    print(textwrap.fill(why, WIDTH), "Preparing a stand-in (90 MB, fetched once) ...\n", sep="\n")
    try:
        folder = default.build()
    except (ImportError, OSError, RuntimeError, ValueError) as exc:
        sys.exit(f"It could not be built: {exc}\nAlternatives: {default.switch}")
    return {"model": str(folder)}, f"a stand-in for it.\n{default.caveat}"


def _public_checkpoint(name: str) -> tuple[dict[str, str] | None, str]:
    """Return its options and where it comes from, or None and why it cannot be downloaded."""
    import huggingface_hub as hub

    spec = lookup(name)
    assert spec
    assert spec.checkpoint
    try:
        kept = hub.snapshot_download(spec.checkpoint, revision=spec.revision, local_files_only=True)
        if any(Path(kept).glob("*.safetensors")):  # named as a folder, nothing asks the hub
            return {"model": name, "checkpoint": kept}, "the public checkpoint, downloaded"
    except OSError:  # it is not there
        pass
    try:
        url = hub.hf_hub_url(spec.checkpoint, "config.json", revision=spec.revision)
        hub.get_hf_file_metadata(url, timeout=3)
    except Exception as exc:  # whatever it is: no model comes from there, and this is why
        reason = str(exc).partition("\n")[0] or type(exc).__name__
        return None, f"{spec.checkpoint} cannot be downloaded from the Hugging Face hub ({reason})."
    return {"model": name}, "the public checkpoint; the Hugging Face hub answers"


def is_slow(options: Mapping[str, str], embedder: Embedder, device: str) -> bool:
    """Tell whether a full-size model runs in this process without a GPU."""
    import torch

    gpu = torch.cuda.is_available() and device != "cpu"
    return "base_url" not in options and embedder.dimensions >= 2048 and not gpu


def read_corpus(limit: int) -> dict[str, str]:
    """Return up to `limit` docstrings by qualified name, always the same ones in the same order.

    The first docstring of every file, then the second of every file: a small part is a fair sample.
    """
    corpus: dict[str, str] = {}
    seen: set[str] = set()
    for nth in zip_longest(*(list(_docstrings(path, parent)) for path, parent in _sources())):
        for name, text in filter(None, nth):
            if len(text) >= SHORTEST and name not in corpus and text not in seen:
                corpus[name] = text
                seen.add(text)
    return dict(islice(corpus.items(), limit))


def _sources() -> Iterator[tuple[Path, Path]]:
    """Yield files to read, each with the folder that its module's name counts from."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    specs = filter(None, map(importlib.util.find_spec, PACKAGES))  # finds them, imports nothing
    packages = [Path(spec.origin).parent for spec in specs if spec.origin]
    for folder, parent in [(stdlib, stdlib), *((folder, folder.parent) for folder in packages)]:
        for path in sorted(folder.rglob("*.py")):
            if _is_public(path.relative_to(folder)):
                yield path, parent


def _is_public(path: Path) -> bool:
    parts = path.with_suffix("").parts
    private = (part.startswith("_") and part != "__init__" for part in parts)
    return not any(private) and not any("-" in part or part in SKIPPED for part in parts)


def _docstrings(path: Path, parent: Path) -> Iterator[tuple[str, str]]:
    """Yield (qualified name, docstring) of a module and its public classes and functions."""
    try:
        with warnings.catch_warnings(action="ignore"):
            module = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # a template, or for another Python
        return
    parts = path.relative_to(parent).with_suffix("").parts
    todo: list[tuple[str, ast.AST]] = [(".".join(parts).removesuffix(".__init__"), module)]
    for name, node in todo:  # which grows meanwhile
        if isinstance(node, ast.Module | DEFINITION):
            yield name, (ast.get_docstring(node) or "")[:LONGEST]
        if isinstance(node, ast.Module | ast.ClassDef | ast.If | ast.Try):
            for child in node.body:
                own = child.name if isinstance(child, DEFINITION) else ""
                if not own.startswith("_"):
                    todo.append((f"{name}.{own}" if own else name, child))


def open_collection(folder: Path, name: str) -> tuple[ClientAPI, Collection]:
    """Return Chroma in a folder, and a collection in it that compares by cosine."""
    import chromadb

    folder.mkdir(parents=True, exist_ok=True)
    show("Store", f"Chroma in {os.path.relpath(folder)}")
    settings = chromadb.config.Settings(anonymized_telemetry=False)
    client = chromadb.PersistentClient(folder, settings)
    return client, client.get_or_create_collection(
        name, configuration={"hnsw": {"space": "cosine"}}, embedding_function=None
    )


def ingest(
    corpus: dict[str, str], collection: Collection, model: NeMoRetrieverEmbedding, notes: Path
) -> None:
    """Bring the collection up to date with the corpus, embedding only what is new or changed.

    LlamaIndex's docstore notes what was embedded. It is saved to `notes` after every batch, so
    that a run which is stopped loses no more than one.
    """
    from llama_index.core import Document
    from llama_index.core.ingestion import DocstoreStrategy, IngestionPipeline
    from llama_index.core.node_parser import SentenceSplitter
    from llama_index.core.storage.docstore import SimpleDocumentStore
    from llama_index.vector_stores.chroma import ChromaVectorStore

    documents = [Document(id_=n, text=t, metadata={"name": n}) for n, t in corpus.items()]
    docstore = (
        SimpleDocumentStore.from_persist_path(str(notes))
        if notes.exists()
        else SimpleDocumentStore()
    )
    vector_store = ChromaVectorStore(chroma_collection=collection)
    pipeline = IngestionPipeline(
        transformations=[
            SentenceSplitter(id_func=lambda i, document: f"{document.node_id}#{i}"),  # stable ids
            model,
        ],
        docstore=docstore,
        docstore_strategy=DocstoreStrategy.UPSERTS,  # AND_DELETE would drop the other batches
        vector_store=vector_store,
        disable_cache=True,  # a second copy of what the docstore knows
    )

    def save() -> None:
        docstore.persist(f"{notes}.new")
        os.replace(f"{notes}.new", notes)

    # Forget what the corpus no longer has, and what a killed run left in one of the stores only.
    stored = {id_: id_.rpartition("#")[0] for id_ in collection.get(include=[])["ids"]}
    noted = set(docstore.get_all_document_hashes().values())
    kept = noted & set(stored.values()) & corpus.keys()
    for name in noted - kept:
        docstore.delete_document(name)
    if gone := [id_ for id_, name in stored.items() if name not in kept]:
        vector_store.delete_nodes(gone)
    save()

    new = sum(docstore.get_document_hash(d.id_) != d.hash for d in documents)
    start = time.perf_counter()
    with tqdm(total=new, desc="Embedding", unit=" passages", disable=not new) as bar:
        for i in range(0, len(documents), BATCH):
            batch = documents[i : i + BATCH]
            if done := pipeline.run(documents=batch):  # it leaves out what is unchanged
                save()
                bar.update(len({node.ref_doc_id for node in done}))
    seconds = time.perf_counter() - start
    rate = f" in {seconds:.1f} s ({new / seconds:.1f} a second)" if new else ""
    print(f"{new:,} embedded{rate}, {len(documents) - new:,} unchanged, {len(gone):,} removed")


def ask(questions: Sequence[str], store: VectorStore, retriever: BaseRetriever) -> None:
    """Put the questions to both frameworks; print what they find with its cosine similarity."""
    langchain = store.as_retriever(search_kwargs={"k": TOP})
    print("\nCosine similarity of the results of each framework, and its time:")
    for question in questions:
        start = time.perf_counter()
        documents = langchain.invoke(question)
        between = time.perf_counter()
        nodes = retriever.retrieve(question)
        end = time.perf_counter()

        # Chroma gives 1 - cosine; LlamaIndex makes exp(-(1 - cosine)) of it.
        scored = store.similarity_search_with_score(question, k=TOP)  # a retriever keeps it back
        left = {found.metadata["name"]: 1 - distance for found, distance in scored}
        right = {found.metadata["name"]: 1 + math.log(found.get_score()) for found in nodes}
        texts = {found.metadata["name"]: found.page_content for found in documents}
        texts |= {found.metadata["name"]: found.text for found in nodes}

        print(f"\nLangChain  LlamaIndex   {escape(question)}")
        for name in left | right:
            scores = f"{left.get(name, math.nan):9.3f}  {right.get(name, math.nan):10.3f}"
            print(f"{scores}   {escape(name)}")
            note = textwrap.shorten(texts[name], WIDTH - 24, placeholder=" ...")
            print(" " * 24 + escape(note))
        print(f"{(between - start) * 1e3:6.0f} ms {(end - between) * 1e3:8.0f} ms")


def run(args: argparse.Namespace) -> None:
    """Say what runs, bring the store up to date, ask."""
    chosen, why = choose_model(args.model)
    model = Path(chosen["model"])
    show("Model", f"{model.name if model.is_dir() else model}: {why}")
    show("Switch", DEFAULT.switch)
    options: dict[str, Any] = {**chosen, "device": args.device, "truncate": "END"}
    langchain_model = NeMoRetrieverEmbeddings(**options)
    llamaindex_model = NeMoRetrieverEmbedding(**options)  # equal options: one loaded model
    embedder = llamaindex_model.embedder
    show("Runs", embedder.description.removeprefix(str(model)).strip())

    from chromadb.errors import ChromaError
    from langchain_chroma import Chroma
    from llama_index.core import VectorStoreIndex
    from llama_index.vector_stores.chroma import ChromaVectorStore

    slow = is_slow(chosen, embedder, args.device)
    corpus = read_corpus(args.limit or (LIMIT_SLOW if slow else LIMIT))
    few = "; few, as a full-size model is slow without a GPU: --limit takes more" if slow else ""
    sources = f"Python {platform.python_version()}, {', '.join(PACKAGES)}"
    show("Corpus", f"{len(corpus):,} docstrings of {sources}{few}")

    folder = args.store / model.name / embedder.cache_key("document")
    try:
        client, collection = open_collection(folder, "docstrings")
        ingest(corpus, collection, llamaindex_model, folder / "docstore.json")
    except (ChromaError, json.JSONDecodeError) as exc:
        sys.exit(f"\nThe store does not work ({exc}). Delete its folder to start it anew.")

    # LangChain
    store = Chroma(
        client=client, collection_name=collection.name, embedding_function=langchain_model
    )
    # LlamaIndex
    vector_store = ChromaVectorStore(chroma_collection=collection)
    index = VectorStoreIndex.from_vector_store(vector_store, embed_model=llamaindex_model)
    ask(args.question or QUESTIONS, store, index.as_retriever(similarity_top_k=TOP))


def escape(text: str) -> str:
    """Return a text with its control characters, but for line ends and tabs, as escapes."""
    return logs.escape(text, keep="\n\t")


def show(label: str, text: str) -> None:
    """Print a line of the report, wrapped, beside its label."""
    text = escape(text)
    wrap = partial(textwrap.wrap, break_long_words=False, break_on_hyphens=False)
    lines = [part for line in text.splitlines() for part in wrap(line, WIDTH - 9)]
    print(f"{label:9}" + ("\n" + " " * 9).join(lines))


def ordinal(number: int) -> str:
    """Return a rank in words.

    >>> [ordinal(number) for number in (1, 2, 3, 4, 11, 22, 113)]
    ['1st', '2nd', '3rd', '4th', '11th', '22nd', '113th']
    """
    teens = number % 100 in (11, 12, 13)
    return f"{number}{'th' if teens else {1: 'st', 2: 'nd', 3: 'rd'}.get(number % 10, 'th')}"


def add_rerank(options: argparse.ArgumentParser) -> None:
    """Add the options that name a reranker and the score of an answer."""
    options.add_argument(
        "--rerank",
        metavar="MODEL",
        help="reranker of the results: folder, Hugging Face id, name in the catalogue, or the URL "
        "of a server (default: no reranker)",
    )
    options.add_argument(
        "--min-score",
        type=float,
        metavar="N",
        help="lowest score of a source that answers: with --rerank a logit (default: 0), else a "
        "cosine (default: measured with questions that no document answers)",
    )


def rerank_options(args: argparse.Namespace) -> dict[str, Any]:
    """Return the options of the reranker that was asked for."""
    if args.rerank.startswith(("http://", "https://")):
        return {"base_url": args.rerank, "truncate": "END"}
    # explicitly local: NVIDIA_BASE_URL is the address of the embedding model
    local = {"backend": "local", "device": args.device, "max_tiles": vars(args).get("max_tiles")}
    return {"model": args.rerank, "truncate": "END", **local}


def parser(description: str, limit: str) -> argparse.ArgumentParser:
    """Return the options that a demo has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--model", help="folder, Hugging Face id, or name in the catalogue")
    made.add_argument("--device", default="auto", help="cpu, cuda or cuda:1 (default: auto)")
    made.add_argument("--limit", type=_read_limit, help=limit)
    made.add_argument("--store", type=Path, default=Path(__file__).with_name("store"))
    return made


def _read_limit(text: str) -> int:
    if not re.fullmatch("0*[1-9][0-9]*", text):
        raise argparse.ArgumentTypeError(f"expected a number of 1 or more, got {text!r}")
    return int(text)


def add_questions(options: argparse.ArgumentParser) -> None:
    """Add the option that asks."""
    options.add_argument(
        "--question", type=_read_question, action="append", help="question to ask; repeatable"
    )


def _read_question(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("expected a question, got a blank text")
    if re.search(r"[\ud800-\udfff]", text):
        raise argparse.ArgumentTypeError("expected UTF-8, got bytes that are not")
    return text


def start(
    run: Callable[[argparse.Namespace], None],
    options: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> None:
    """Read the options and run; what can be expected to fail ends in one sentence."""
    args = options.parse_args(argv)
    try:
        run(args)
    except (NeMoRetrieverError, OSError) as exc:
        sys.exit(f"\n{escape(str(exc))}")
    except KeyboardInterrupt:
        sys.exit("\nStopped; what is embedded is kept, and the next run goes on from there.")


if __name__ == "__main__":
    summary = (__doc__ or "").splitlines()[0]
    options = parser(summary, f"docstrings to embed (default: {LIMIT:,})")
    add_questions(options)
    start(run, options)
