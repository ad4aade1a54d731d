"""Ask documents in words: a language model answers and names its sources, through LangChain.

    sections.read ...... Markdown, HTML and Word by headings, PDF by pages, CSV by rows
    split .............. sections to passages, each under its headings
    bring_up_to_date ... index() with a record manager ──► a store on disk; only what changed
    make_retriever ..... vectors and BM25 together; passages, or the whole sections they are of
    rerank ............. more of them, in the order of a reranker; with --rerank
    make_judge ......... whether anything found answers the question (relevance.py)
    make_chain ......... retriever ──► prompt ──► ChatNVIDIA, streamed; or an agent with a tool
    ask ................ the answer as it comes, and its numbered sources

`make rag` sets everything up and runs this; `make rag ARGS=--help` lists the options.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import chat  # beside this file, as are the next four, `relevance` and `sections`
import handbook
import llm
import numpy as np
import sections as reading
from demo import DEFAULT as DEMO
from demo import (
    WIDTH,
    add_questions,
    add_rerank,
    choose_model,
    escape,
    open_collection,
    ordinal,
    parser,
    rerank_options,
    show,
    start,
)
from langchain_core.documents import Document
from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate, PromptTemplate
from langchain_core.retrievers import BaseRetriever
from langchain_core.runnables import Runnable, RunnablePassthrough
from relevance import ELSEWHERE, MIN_LOGIT, NO_ANSWER, find_bound, has_all_words
from tqdm import tqdm

from langchain_nemoretriever import NeMoRetrieverEmbeddings, NeMoRetrieverRerank
from shared_engine import NeMoRetrieverError
from shared_engine.errors import first_line

if TYPE_CHECKING:
    from langchain_core.indexing.api import IndexingResult
    from langchain_core.language_models import BaseChatModel
    from langchain_core.vectorstores import VectorStore

DEFAULT = replace(DEMO, target="rag")
GUIDE = Path(__file__).with_name("guide")
QUESTIONS = (
    "What happens to a text that is longer than the model allows?",
    "How can several programs share one GPU?",
    "Which module creates temporary files?",
)
PASSAGE = 900  # characters of a passage, beside its headings: most sections are one
BATCH = 64  # passages between two saves
CHECKED = 1000  # passages that are looked up together: databases limit the variables of a query
TOP = 3  # sources of an answer
CANDIDATES = 12  # of each search, before the two are fused
CANDIDATES_TO_RERANK = 40  # of each search, and of both after they are fused
WEIGHT = 0.5  # of vectors in a search; BM25 has the rest
ANSWER_TOKENS = 160
PROMPT = ChatPromptTemplate.from_messages(
    [
        (
            "system",
            "You answer questions from excerpts of a handbook. Use only them, answer in one "
            "or two sentences, and name the excerpt that you used by its number, such as [1]. If "
            "they do not answer the question, you must say so, and answer nothing.",
        ),
        ("human", "{excerpts}\n\nQuestion: {question}"),
    ]
)
PROMPT_SMALL = ChatPromptTemplate.from_messages(
    [
        (
            "human",
            "{excerpts}\n\nIf the text above does not answer the question, you must say so. Using "
            "only that text, answer in one short sentence: {question}",
        )
    ]
)
EXCERPT = PromptTemplate.from_template("{page_content}\n({source}, {place})")


def split(sections: Iterable[Document], size: int = PASSAGE) -> list[Document]:
    """Return passages of at most about `size` characters, each below the title of its section.

    The title says what a passage is about where its own words do not.
    """
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    splitter = RecursiveCharacterTextSplitter(chunk_size=size, chunk_overlap=size // 8)
    return [
        Document(f"{section.metadata['title']}\n{text}", metadata=section.metadata)
        for section in sections
        for text in splitter.split_text(section.page_content)
    ]


def _open_chroma(folder: Path, name: str, embeddings: NeMoRetrieverEmbeddings) -> VectorStore:
    from langchain_chroma import Chroma

    client, collection = open_collection(folder, name)
    return Chroma(client=client, collection_name=collection.name, embedding_function=embeddings)


def _open_qdrant(folder: Path, name: str, embeddings: NeMoRetrieverEmbeddings) -> VectorStore:
    try:
        from langchain_qdrant import QdrantVectorStore
        from qdrant_client import QdrantClient
        from qdrant_client.models import Distance, VectorParams
    except ImportError as exc:
        sys.exit(f"--vector-store qdrant needs {exc.name}: pip install langchain-qdrant")

    show("Store", f"Qdrant in {os.path.relpath(folder)}")
    client = QdrantClient(path=str(folder))
    if not client.collection_exists(name):
        size = embeddings.embedder.dimensions
        client.create_collection(name, VectorParams(size=size, distance=Distance.COSINE))
    return QdrantVectorStore(client, name, embeddings)


STORES = {"chroma": _open_chroma, "qdrant": _open_qdrant}
"""Opens a collection in a folder, to be compared by cosine."""


def _passage_id(passage: Document) -> str:
    """Return a UUID, which every store takes, of all that a passage is."""
    whole = json.dumps([passage.page_content, passage.metadata], sort_keys=True)
    return str(uuid.UUID(bytes=hashlib.sha256(whole.encode()).digest()[:16]))


def bring_up_to_date(
    passages: Sequence[Document], store: VectorStore, folder: Path, namespace: str
) -> IndexingResult:
    """Embed what is new or changed and remove what is gone, by a record of what the store holds."""
    from langchain_classic.indexes import SQLRecordManager
    from langchain_core.indexing import index
    from sqlalchemy import create_engine

    engine = create_engine(f"sqlite:///{folder / 'records.sqlite'}")
    try:
        records = SQLRecordManager(namespace, engine=engine)
        records.create_schema()
        keys = records.list_keys()
        for first in range(0, len(keys), CHECKED):
            known = keys[first : first + CHECKED]
            if len(store.get_by_ids(known)) < len(known):  # the store was deleted or cut
                store.delete(known)
                records.delete_keys(known)
        return index(
            tqdm(passages, desc="Indexing", unit=" passages", leave=False),
            records,
            store,
            batch_size=BATCH,
            cleanup="full",
            source_id_key="source",
            key_encoder=_passage_id,
        )
    finally:
        engine.dispose()


class KeywordRetriever(BaseRetriever):
    """Finds passages by BM25, which needs no model."""

    passages: list[Document]
    bm25: Any
    """None where no passage has a word of two letters."""
    k: int

    @classmethod
    def over(cls, passages: list[Document], k: int) -> KeywordRetriever:
        """Return one that searches these passages."""
        import bm25s

        texts = [passage.page_content for passage in passages]
        tokens = bm25s.tokenize(texts, return_ids=False, show_progress=False)
        bm25 = bm25s.BM25() if any(tokens) else None
        if bm25:
            bm25.index(tokens, show_progress=False)
        return cls(passages=passages, bm25=bm25, k=min(k, len(passages)))

    def _get_relevant_documents(self, query: str, **_: Any) -> list[Document]:
        import bm25s

        if self.bm25 is None:
            return []
        tokens = bm25s.tokenize(query, show_progress=False)
        rows, scores = self.bm25.retrieve(tokens, k=self.k, show_progress=False)
        return [
            self.passages[row] for row, score in zip(rows[0], scores[0], strict=True) if score > 0
        ]


def make_retriever(
    sections: Sequence[Document],
    passages: Sequence[Document],
    store: VectorStore,
    *,
    weight: float = 0.5,
    parent: bool = False,
    candidates: int = CANDIDATES,
) -> BaseRetriever:
    """Return what finds passages, or with `parent` the whole sections that they are of.

    Reciprocal ranks are added up, those of vectors with this weight, BM25's with the rest of 1.
    """
    from langchain_classic.retrievers import EnsembleRetriever, ParentDocumentRetriever
    from langchain_core.stores import InMemoryStore
    from langchain_text_splitters import RecursiveCharacterTextSplitter

    vectors: BaseRetriever
    many = {"k": candidates}
    if parent:
        found = split(sections, size=sys.maxsize)
        docstore = InMemoryStore()
        docstore.mset([(section.metadata["section"], section) for section in found])
        vectors = ParentDocumentRetriever(
            vectorstore=store,
            docstore=docstore,
            child_splitter=RecursiveCharacterTextSplitter(),  # wanted, and used by `add` only
            id_key="section",
            search_kwargs=many,
        )
    else:
        found = list(passages)
        vectors = store.as_retriever(search_kwargs=many)
    keywords = KeywordRetriever.over(found, candidates)
    return EnsembleRetriever(retrievers=[vectors, keywords], weights=[weight, 1 - weight])


def rerank(retriever: BaseRetriever, reranker: NeMoRetrieverRerank) -> BaseRetriever:
    """Return what finds the same in the order of a reranker.

    The metadata of each passage has its rank before as `before`, its score as `relevance_score`.
    """
    from langchain_classic.retrievers import ContextualCompressionRetriever

    def note_ranks(found: list[Document]) -> list[Document]:
        return [
            Document(passage.page_content, metadata={**passage.metadata, "before": rank})
            for rank, passage in enumerate(found[:CANDIDATES_TO_RERANK], 1)
        ]

    return ContextualCompressionRetriever(
        base_compressor=reranker, base_retriever=retriever | note_ranks
    )


def take_sources(found: Iterable[Document], count: int = TOP) -> list[Document]:
    """Return the first passages of as many different sections."""
    first: dict[str, Document] = {}
    for passage in found:
        first.setdefault(passage.metadata["section"], passage)
    return list(first.values())[:count]


def number(sources: Iterable[Document]) -> str:
    """Return excerpts as the prompt shows them: [1] and its text, and so on."""
    return "\n\n".join(f"[{i}] {_quote(source)}" for i, source in enumerate(sources, 1))


def _quote(source: Document) -> str:
    return EXCERPT.format(**source.metadata, page_content=source.page_content)


Judge = Callable[[str, Sequence[Document]], bool]
"""Tells whether a source answers a question."""


def make_judge(
    store: VectorStore, embeddings: NeMoRetrieverEmbeddings, bound: float | None = None
) -> Judge:
    """Return a judge by cosine, or by the logit of sources that a reranker has scored.

    Args:
        bound: Lowest score that answers; None for MIN_LOGIT, or for a cosine that is measured.
    """

    def find_best(question: str) -> float:
        return max(compare(question, store.similarity_search(question, k=1), embeddings))

    @cache
    def lowest() -> float:
        return find_bound(list(map(find_best, ELSEWHERE))) if bound is None else bound

    def judge(question: str, sources: Sequence[Document]) -> bool:
        if not sources:
            return False
        logits = [source.metadata.get("relevance_score") for source in sources]
        if None not in logits:
            return max(logits) >= (MIN_LOGIT if bound is None else bound)
        texts = [source.page_content for source in sources]
        return find_best(question) >= lowest() or has_all_words(question, texts)

    return judge


def make_chain(
    retriever: BaseRetriever,
    chat: BaseChatModel,
    judge: Judge,
    prompt: ChatPromptTemplate = PROMPT,
    shown: int = TOP,
) -> Runnable[dict[str, str], dict[str, Any]]:
    """Return the chain: {"question"} in; "sources", then the "answer" piece by piece, out.

    The language model is shown the first `shown` sources; it is not asked where none answers.
    """
    answer = prompt | chat | StrOutputParser()
    return (
        RunnablePassthrough.assign(sources=itemgetter("question") | retriever | take_sources)
        .assign(excerpts=lambda known: number(known["sources"][:shown]))
        .assign(
            answer=lambda known: answer if judge(known["question"], known["sources"]) else NO_ANSWER
        )
        .pick(["sources", "answer"])
    )


def make_agent(
    retriever: BaseRetriever, chat: BaseChatModel, judge: Judge, about: str
) -> Runnable[Any, Any]:
    """Return an agent that may search the documents, as often as it wants and in its own words."""
    from langchain.agents import create_agent
    from langchain_core.tools import StructuredTool

    def search(query: str) -> tuple[str, list[Document]]:
        found = take_sources(retriever.invoke(query))
        if not judge(query, found):
            return NO_ANSWER, []
        return "\n\n".join(map(_quote, found)), found

    tool = StructuredTool.from_function(
        search,
        name="search_documents",
        description=f"Search {about}. Give it what you want to know, in a few words.",
        response_format="content_and_artifact",  # the artifact is the passages themselves
    )
    system = (
        "Search the documents before you answer, and name the files that you used. If they do not "
        "answer the question, you must say so, and answer nothing."
    )
    return create_agent(chat, [tool], system_prompt=system)


def stream_agent(agent: Runnable[Any, Any], question: str) -> Iterator[dict[str, Any]]:
    """Yield what an agent does as `make_chain` gives it: sources of each search, pieces of text."""
    from langchain_core.messages import AIMessage, ToolMessage

    asked = {"messages": [{"role": "user", "content": question}]}
    for message, _ in agent.stream(asked, {"recursion_limit": 12}, stream_mode="messages"):
        if isinstance(message, ToolMessage):
            yield {"sources": message.artifact or []}
        elif isinstance(message, AIMessage) and message.text:
            yield {"answer": message.text}


class Answerer(NamedTuple):
    """A language model, and how to ask it."""

    chat: BaseChatModel
    about: str
    """What to know of it."""
    prompt: ChatPromptTemplate
    shown: int
    """Sources that it is shown: a small model mixes up more than one."""


@contextmanager
def open_llm(url: str | None, name: str | None) -> Iterator[Answerer]:
    """Give the language model that answers: at a server that was named, or in this process.

    Raises:
        ConfigurationError: as `chat.choose_server`.
        ConnectionError: no language model answers at the address, or no longer.
    """
    prompt, shown = PROMPT, TOP
    with ExitStack() as stack:
        server = chat.choose_server(url, name)
        if server:
            where = f"at {server.url}"
        else:
            try:
                url = stack.enter_context(llm.serve())
            except (ImportError, OSError, RuntimeError, ValueError) as exc:
                raise ConnectionError(
                    f"the language model of this demo does not run here ({exc}); name a server "
                    "with --llm-url, or a model of NVIDIA's catalogue with --llm"
                ) from exc
            server = chat.Server(url, llm.NAME, None)
            prompt, shown = PROMPT_SMALL, 1
            where = f"in this process, shown the first source (an agent: all).\n{llm.CAVEAT}"
        model = chat.connect(server, ANSWER_TOKENS)
        yield Answerer(model, f"{model.model}, {where}", prompt, shown)


def ask(
    question: str,
    stream: Iterable[dict[str, Any]],
    embeddings: NeMoRetrieverEmbeddings,
    folders: Sequence[Path] = (),
) -> bool:
    """Print an answer while it comes, and then its sources; return whether it came to its end.

    Args:
        folders: Where the files of the sources are.
    """
    print(f"\n{escape(question)}")
    found: list[Document] = []
    answer = ""
    is_complete = True
    try:
        for part in stream:
            found += part.get("sources", [])
            answer += part.get("answer", "")
            print(escape(part.get("answer", "")), end="", flush=True)
    except ConnectionError as exc:  # the sources are found, and the next question may be answered
        is_complete = False
        print(escape(f"No answer: {exc}."), end="")
    print(" The nearest sections:" if answer == NO_ANSWER and found else "")
    sources = take_sources(found, len(found))
    for i, (source, cosine) in enumerate(
        zip(sources, compare(question, sources, embeddings), strict=True), 1
    ):
        known = source.metadata
        place = f"{known['source']}, {known['place']}"
        before = f", was {ordinal(known['before'])}" if "before" in known else ""
        print(f"  [{i}] {escape(place)}, cosine {cosine:.3f}{before}")
        text = source.page_content.removeprefix(known["title"])
        for path in (folder.resolve() / known["source"] for folder in folders):
            if path.exists():
                print(" " * 6 + find_address(path, known["place"]))
        print(" " * 6 + escape(textwrap.shorten(text, WIDTH - 6, placeholder=" ...")))
    return is_complete


def find_address(path: Path, place: str) -> str:
    """Return what a terminal or browser opens: the file, and of a PDF the page.

    >>> find_address(Path("/docs/a b.pdf"), "page 3, part 2")
    'file:///docs/a%20b.pdf#page=3'
    """
    page = re.match(r"page (\d+)", place)
    return path.as_uri() + (f"#page={page[1]}" if page else "")


def compare(
    question: str, sources: Sequence[Document], embeddings: NeMoRetrieverEmbeddings
) -> list[float]:
    """Return the cosine similarity of the question and each source.

    A retriever keeps its scores back, stores mean different things by them, and keywords have none.
    """
    if not sources:
        return []
    question_vector = np.array(embeddings.embed_query(question))  # (dimensions,), of unit length
    vectors = np.array(embeddings.embed_documents([found.page_content for found in sources]))
    return (vectors @ question_vector).tolist()


def read(docs: Path | None, store: Path) -> tuple[list[Document], list[str]]:
    """Return the sections of a folder, or of the handbook, and what had to be left out."""
    if docs:
        return reading.read(docs)
    handbook.write(store / "handbook")
    handbook.write_reports(store / "handbook")
    (texts, _), (pages, left_out) = reading.read(GUIDE), reading.read(store / "handbook")
    return texts + pages, left_out


def questions_to_ask(asked: Sequence[str] | None, docs: Path | None) -> Iterator[str]:
    """Yield the questions: those asked for, or examples, and then those that somebody types."""
    if asked:
        yield from asked
        return
    if not docs:
        yield from QUESTIONS
    while sys.stdin.isatty():
        try:
            question = input("\nYour question (Enter ends): ").strip()
        except EOFError:
            return
        if not question:
            return
        yield question


def run(args: argparse.Namespace) -> None:
    """Say what runs, bring the store up to date, answer."""
    chosen, why = choose_model(args.model, DEFAULT)
    model = Path(chosen["model"])
    show("Model", f"{model.name if model.is_dir() else model}: {why}")
    show("Switch", DEFAULT.switch)
    embeddings = NeMoRetrieverEmbeddings(**chosen, device=args.device, truncate="END")
    show("Runs", embeddings.embedder.description.removeprefix(str(model)).strip())
    reranker = None
    if args.rerank:
        reranker = NeMoRetrieverRerank(**rerank_options(args), top_n=None)
        show("Rerank", reranker.reranker.description)

    sections, left_out = read(args.docs, args.store)
    folders = [args.docs] if args.docs else [GUIDE, args.store / "handbook"]
    passages = split(sections)[: args.limit]
    files = len({section.metadata["source"] for section in sections})
    what = args.docs or "the handbook of this package"
    show("Texts", f"{what}: {files} files, {len(sections)} sections, {len(passages)} passages")
    if left_out:
        show("Left out", "\n".join(left_out))

    with open_llm(args.llm_url, args.llm) as answerer:
        show("Answers", answerer.about)
        folder = (
            args.store / model.name / embeddings.embedder.cache_key("document") / args.vector_store
        )
        folder.mkdir(parents=True, exist_ok=True)
        name = "rag-" + hashlib.sha256(str(what).encode()).hexdigest()[:12]
        try:
            store = STORES[args.vector_store](folder, name, embeddings)
            done = bring_up_to_date(passages, store, folder, name)
        except (NeMoRetrieverError, OSError):
            raise
        except Exception as exc:  # of Chroma, of Qdrant, of SQLAlchemy
            sys.exit(
                f"\nThe store does not work ({escape(first_line(exc))}). Delete {folder}; the next "
                "run embeds the documents again."
            )
        show(
            "Index",
            f"{done['num_added']} embedded, {done['num_skipped']} unchanged, "
            f"{done['num_deleted']} removed",
        )
        candidates = CANDIDATES_TO_RERANK if reranker else CANDIDATES
        retriever = make_retriever(
            sections, passages, store, weight=args.weight, parent=args.parent, candidates=candidates
        )
        if reranker:
            retriever = rerank(retriever, reranker)
        judge = make_judge(store, embeddings, args.min_score)
        chain = make_chain(retriever, answerer.chat, judge, answerer.prompt, answerer.shown)
        agent = make_agent(retriever, answerer.chat, judge, str(what)) if args.agent else None
        results = []
        for question in questions_to_ask(args.question, args.docs):
            stream = (
                stream_agent(agent, question) if agent else chain.stream({"question": question})
            )
            results.append(ask(question, stream, embeddings, folders))
        if results and not any(results):
            sys.exit(1)


def options() -> argparse.ArgumentParser:
    """Return the options of the command line."""
    made = parser((__doc__ or "").splitlines()[0], "passages to embed (default: all)")
    add_questions(made)
    add_rerank(made)
    made.add_argument("--docs", type=Path, help="folder of .md, .txt, .pdf, .docx, .html and .csv")
    made.add_argument(
        "--llm-url", metavar="URL", help="server of the language model: a NIM or another"
    )
    made.add_argument(
        "--llm",
        metavar="MODEL",
        help="language model (default: the first of the server); without --llm-url, a model of "
        "NVIDIA's catalogue, such as meta/llama-3.3-70b-instruct",
    )
    made.add_argument(
        "--agent", action="store_true", help="answer with an agent that searches by a tool"
    )
    made.add_argument(
        "--parent", action="store_true", help="pass whole sections to the model, not passages"
    )
    made.add_argument(
        "--weight",
        type=_share,
        default=WEIGHT,
        help="weight of vectors against BM25, from 0 to 1 (default: %(default)s)",
    )
    made.add_argument(
        "--vector-store",
        choices=sorted(STORES),
        default="chroma",
        help="vector store (default: %(default)s)",
    )
    return made


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError("is from 0 to 1")
    return share


if __name__ == "__main__":
    start(run, options())
