"""Second stages of `nemoretriever evaluate`: a reranker, BM25 fused, full vectors after bits.

Their figures are computed again here, by numpy and ir_measures.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import pytest
from ir_measures import RR, R, nDCG

from shared_engine import (
    CheckpointError,
    ConfigurationError,
    Embedder,
    EmbeddingInput,
    InputError,
    Options,
    Reranker,
    RerankOptions,
)
from shared_engine.cli.main import main
from shared_engine.evaluate import EngineModel, EngineReranker, evaluate, find_reranker
from shared_engine.evaluate.search import Ranking, fuse, reorder, search_bm25
from tests.support.beir import write_beir
from tests.support.rerankers import build_reranker, build_vl_reranker, score_float64
from tests.support.vl_checkpoints import build_vl_checkpoint, page

WORDS = [
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"),
    *("theta", "iota", "kappa", "lambda", "omicron", "sigma"),
]
MEASURES = {"nDCG@10": nDCG @ 10, "MRR@10": RR @ 10, "Recall@5": R @ 5, "Recall@100": R @ 100}
QUERIES = {f"q{n}": f"{WORDS[n]} or {WORDS[-1 - n]}" for n in range(8)}
_RANDOM = np.random.default_rng(0)
TEXTS = {f"d{n}": " ".join(_RANDOM.choice(WORDS, size=3 + n % 4)) for n in range(30)}
QRELS = {q: {f"d{(7 * n + k) % 30}": 1 + k % 2 for k in range(3)} for n, q in enumerate(QUERIES)}


@pytest.fixture(scope="module")
def reranker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reranker(tmp_path_factory.mktemp("rerank") / "reranker")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_beir(
        tmp_path / "words",
        [{"_id": name, "text": text} for name, text in TEXTS.items()],
        [{"_id": name, "text": text} for name, text in QUERIES.items()],
        [(q, d, score) for q, judged in QRELS.items() for d, score in judged.items()],
    )


@pytest.fixture
def options(checkpoint: Path) -> Options:
    return Options(model=str(checkpoint), device="cpu", truncate="END")


@pytest.fixture
def vectors(options: Options) -> tuple[np.ndarray, np.ndarray]:
    """Those of queries and documents, in float64."""
    embedder = Embedder(options)
    queries, documents = list(QUERIES.values()), list(TEXTS.values())
    return (
        embedder.embed(queries, "query").astype(np.float64),
        embedder.embed(documents).astype(np.float64),
    )


def rank(scores: np.ndarray) -> list[str]:
    names = list(TEXTS)
    return [names[n] for n in np.argsort(-scores, kind="stable")]


def order(names: list[str], scores: np.ndarray) -> list[str]:
    """Return the names by their scores, then those without one."""
    first = sorted(zip(-scores, range(len(scores)), strict=True))
    return [names[n] for _, n in first] + names[len(scores) :]


def assert_figures(row: Any, found: dict[str, list[str]]) -> None:
    run = {q: {d: -n for n, d in enumerate(names[:100])} for q, names in found.items()}
    wanted = ir_measures.calc_aggregate(list(MEASURES.values()), QRELS, run)
    for name, measure in MEASURES.items():
        assert row.figures[name].value == pytest.approx(wanted[measure], abs=1e-9), name


@pytest.mark.parametrize("candidates", [1, 7, 30, 100])
def test_a_reranked_row_is_that_of_an_independent_computation(
    folder: Path,
    options: Options,
    reranker: Path,
    vectors: tuple[np.ndarray, np.ndarray],
    candidates: int,
) -> None:
    report = evaluate(
        folder,
        [EngineModel(options)],
        cache=folder / "cache",
        rerankers=[find_reranker(str(reranker), options)],
        candidates=candidates,
    )
    searched = {q: rank(vectors[1] @ v) for q, v in zip(QUERIES, vectors[0], strict=True)}
    assert_figures(report.rows[0], searched)
    reranked = {
        q: order(names, score_float64(reranker, QUERIES[q], [TEXTS[d] for d in names[:candidates]]))
        for q, names in searched.items()
    }
    row = report.rows[-1]
    assert_figures(row, reranked)
    assert row.label == f"tiny + reranker ({candidates})"
    assert (row.dimensions, row.embedding_type, row.bytes_per_vector) == (64, "float", 256)
    assert row.seconds_per_query > 0
    assert all(other.seconds_per_query is None for other in report.rows[:-1])
    for name in MEASURES:
        difference = row.figures[name].value - report.rows[0].figures[name].value
        assert row.differences[name].value == pytest.approx(difference, abs=1e-12)
        assert row.differences[name].low <= difference <= row.differences[name].high
    assert report.models[-1]["model"] == "reranker"
    assert "in this process on cpu" in report.models[-1]["description"]


def test_bm25_is_fused_by_reciprocal_ranks(
    folder: Path, options: Options, vectors: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    report = evaluate(
        folder, [EngineModel(options)], cache=tmp_path / "cache", bm25=False, hybrid=True
    )
    words = search_bm25(TEXTS.values(), QUERIES.values(), Ranking(list(TEXTS), 100))
    assert words
    fused = {}
    for query, vector, matches in zip(QUERIES, vectors[0], words, strict=True):
        scores = np.zeros(30)
        for names in (rank(vectors[1] @ vector), matches):
            for place, name in enumerate(names):
                scores[list(TEXTS).index(name)] += 1 / (61 + place)
        fused[query] = rank(scores)
    assert [row.model for row in report.rows] == ["tiny"] * 4
    assert report.rows[-1].label == "tiny + BM25"
    assert report.rows[-1].figures["nDCG@10"].value != report.rows[0].figures["nDCG@10"].value
    assert_figures(report.rows[-1], fused)


def test_equal_fused_ranks_keep_the_order_of_the_first_ranking() -> None:
    assert fuse(["a", "b"], ["b", "a"]) == ["a", "b"]
    assert fuse(["a"], []) == ["a"]
    assert reorder(["a", "b", "c", "d"], np.array([1, 2, 1], np.float32)) == ["b", "a", "c", "d"]


def test_candidates_of_bits_are_ordered_by_full_vectors(
    folder: Path, options: Options, vectors: tuple[np.ndarray, np.ndarray], tmp_path: Path
) -> None:
    report = evaluate(
        folder,
        [EngineModel(options)],
        dimensions=[32],
        embedding_types=["float"],
        cache=tmp_path / "cache",
        bm25=False,
        rescored=True,
        candidates=6,
    )
    rows = {(row.second_stage, row.dimensions): row for row in report.rows}
    assert list(rows) == [("", 64), ("", 32), *(("full vectors (6)", size) for size in (64, 32))]
    names = sorted(TEXTS)  # equal numbers of bits rank by descending id
    corpus = vectors[1][[list(TEXTS).index(name) for name in names]]
    for size in (64, 32):
        found = {}
        for query, vector in zip(QUERIES, vectors[0], strict=True):
            equal_bits = ((vector > 0) == (corpus > 0))[:, :size].sum(axis=1)
            best = [names[n] for n in np.argsort(equal_bits, kind="stable")[::-1]]
            exact = np.array([corpus[names.index(name)] @ vector for name in best[:6]])
            found[query] = order(best, exact)
        row = rows["full vectors (6)", size]
        assert_figures(row, found)
        assert (row.embedding_type, row.bytes_per_vector) == ("binary", size // 8)


def test_documents_with_the_id_of_the_query_are_in_no_row(
    folder: Path, options: Options, reranker: Path, tmp_path: Path
) -> None:
    """Each query is the document of its id, and only that document is relevant."""
    lines = [json.dumps({"_id": name, "text": text}) for name, text in TEXTS.items()]
    (folder / "queries.jsonl").write_text("\n".join(lines))
    (folder / "qrels" / "test.tsv").write_text("".join(f"{d}\t{d}\t1\n" for d in TEXTS))
    for excluded in (False, True):
        report = evaluate(
            folder,
            [EngineModel(options)],
            embedding_types=["float"],
            cache=tmp_path / "cache",
            rerankers=[find_reranker(str(reranker), options)],
            hybrid=True,
            rescored=True,
            ignore_identical_ids=excluded,
        )
        found = [row.figures["Recall@100"].value for row in report.rows]
        assert found == [1 - excluded] * 5


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"_id": "long", "text": "word " * 80}, r"corpus.jsonl, 'long': has \d+ tokens"),
        ({"_id": "q0", "text": "word " * 80}, "queries.jsonl, 'q0': the query has"),
    ],
)
def test_a_text_that_a_reranker_refuses_is_named(
    folder: Path, options: Options, reranker: Path, row: dict[str, str], words: str
) -> None:
    with (folder / words.partition(",")[0]).open("a") as out:
        out.write(json.dumps(row))
    limited = EngineReranker(RerankOptions(model=str(reranker), device="cpu", max_tokens=60))
    with pytest.raises(InputError, match=words):
        evaluate(folder, [EngineModel(options)], cache=folder / "cache", rerankers=[limited])


def test_what_cannot_rerank_is_refused_before_anything_is_embedded(
    folder: Path, options: Options, checkpoint: Path, tmp_path: Path
) -> None:
    for wrong, error in (
        ({"rerankers": [find_reranker(str(checkpoint), options)]}, CheckpointError),
        ({"candidates": 0}, ConfigurationError),
    ):
        with pytest.raises(error):
            evaluate(folder, [EngineModel(options)], cache=tmp_path / "cache", **wrong)
    assert not list(tmp_path.glob("cache/*"))


def test_pages_go_to_a_multimodal_reranker_as_they_are(reranker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pages"
    (folder / "images").mkdir(parents=True)
    for n in range(4):
        page(n, 40 + 20 * n, 50).save(folder / "images" / f"{n}.png")
    corpus: list[dict[str, str]] = [
        {"_id": f"p{n}", "image": f"images/{n}.png"} | ({"text": "a caption"} if n == 2 else {})
        for n in range(4)
    ]
    documents = [EmbeddingInput(row.get("text"), folder / row["image"]) for row in corpus]
    multimodal = build_vl_reranker(tmp_path / "pictures")
    best, second, *_ = Reranker(RerankOptions(model=str(multimodal), device="cpu")).rank(
        "a page", documents
    )
    write_beir(
        folder,
        corpus,
        [{"_id": "q", "text": "a page"}],
        [("q", f"p{best.index}", 2), ("q", f"p{second.index}", 1)],
    )
    options = Options(model=str(build_vl_checkpoint(tmp_path / "vl")), device="cpu")
    report = evaluate(
        folder,
        [EngineModel(options)],
        embedding_types=["float"],
        cache=tmp_path / "cache",
        rerankers=[find_reranker(str(path), options) for path in (reranker, multimodal)],
    )
    assert report.left_out == ["reranker: does not accept images"]
    assert [row.label for row in report.rows] == ["vl", "BM25", "vl + pictures (100)"]
    assert report.rows[-1].figures["nDCG@10"].value == 1


def test_a_hybrid_row_needs_words(tmp_path: Path, options: Options) -> None:
    folder = write_beir(
        tmp_path / "letters", [{"_id": "d", "text": "a"}], [{"_id": "q", "text": "b"}],
        [("q", "d", 1)],
    )  # fmt: skip
    report = evaluate(folder, [EngineModel(options)], cache=tmp_path / "cache", hybrid=True)
    assert [row.label for row in report.rows] == ["tiny"] * 3
    assert report.left_out == ["BM25: the corpus has no words"]


def test_a_reranker_shares_the_options_of_the_first_model(options: Options) -> None:
    there = find_reranker("http://nim:8000/v1", options.replace(timeout=3.0, prefixes="server"))
    assert there.name == "http://nim:8000/v1"
    assert there._engine.options == RerankOptions(
        base_url="http://nim:8000/v1", truncate="END", timeout=3.0
    )
    here = find_reranker("folder", options)
    assert here._engine.options == RerankOptions(
        model="folder", backend="local", device="cpu", truncate="END"
    )


def run(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def test_the_command_prints_writes_and_draws_every_stage(
    folder: Path, checkpoint: Path, reranker: Path, tmp_path: Path, capsys: Any
) -> None:
    given = (folder, "--model", checkpoint, "--device", "cpu", "--cache", tmp_path / "cache")
    stages = ("--rerank", reranker, "--hybrid", "--rescore", "--candidates", 20)
    files = ("--json", tmp_path / "all.json", "--plot", tmp_path / "chart.svg")
    assert run(*given) == 0
    assert "s/query" not in capsys.readouterr().out
    assert run(*given, *stages, *files) == 0
    printed, progress = capsys.readouterr()
    labels = ["tiny + full vectors (20)", "tiny + BM25", "tiny + reranker (20)"]
    assert re.findall(r"^\| (tiny \+ .*?) +\|", printed, re.M) == labels
    assert "| s/query |" in printed
    assert re.search(r"^\| tiny \+ reranker .* \| +\d+\.\d{3} \|$", printed, re.M)
    assert "reranker: 20 candidates for each of 8 queries" in progress
    rows = json.loads((tmp_path / "all.json").read_text())["rows"]
    assert [row["second_stage"] for row in rows[3:]] == [
        *("full vectors (20)", "", "BM25", "reranker (20)")
    ]
    assert rows[-1]["seconds_per_query"] > 0
    chart = (tmp_path / "chart.svg").read_text()
    assert all(f"{label} " in chart for label in labels)


def test_the_command_refuses_what_cannot_be(folder: Path, checkpoint: Path, capsys: Any) -> None:
    for wrong, message in (
        ([folder, "--candidates", 0], "candidates=0: must be at least 1"),
        ([folder, "--mteb", "NQ"], "expected FOLDER, or --mteb TASK"),
        (["--mteb", "NQ", "--hybrid"], "--hybrid needs FOLDER, not --mteb"),
        (["--mteb", "NQ", "--against", "st:any"], "--against needs FOLDER, not --mteb"),
        (["--mteb", "NQ", "--no-bm25"], "--no-bm25 needs FOLDER, not --mteb"),
        (["--mteb", "NQ", "--candidates", 9], "--candidates needs FOLDER, not --mteb"),
        (["--mteb", "NQ", "--dimensions", 32, 16], "--dimensions [32, 16]: expected one value"),
        (
            ["--mteb", "NQ", "--embedding-types", "int8", "float"],
            "--embedding-types ['int8', 'float']: ",
        ),
    ):
        assert run(*wrong, "--model", checkpoint, "--device", "cpu") == 2
        assert message in capsys.readouterr().err
