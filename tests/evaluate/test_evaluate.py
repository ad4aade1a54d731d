"""`nemoretriever evaluate`: figures, sizes and number types, cache, accepted data, errors."""

from __future__ import annotations

import json
import re
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from shared_engine import Embedder, InputError, Options, UnsupportedDimensionsError
from shared_engine.cli.main import main
from shared_engine.documents import EmbeddingInput, Role
from shared_engine.errors import ConfigurationError, MissingExtraError
from shared_engine.evaluate import EngineModel, evaluate, find_model
from shared_engine.evaluate import models as models_module
from shared_engine.evaluate.data import RetrievalData, read_folder
from shared_engine.evaluate.measure import MEASURES, Figure, measure
from shared_engine.evaluate.models import embed
from shared_engine.evaluate.search import Ranking, decode, search, search_bm25, shorten
from tests.support.beir import convert_xquad, write_beir
from tests.support.checkpoints import tokenizer
from tests.support.nim import MODEL, Nim, answer, vector
from tests.support.vl_checkpoints import build_vl_checkpoint, page

WORDS = [
    *("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"),
    *("theta", "iota", "kappa", "lambda", "omicron", "sigma"),
]
TYPES = ("float", "int8", "uint8", "binary", "ubinary")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """13 documents, half of them with a title, and a query for each."""
    return write_beir(
        tmp_path / "words",
        [
            {"_id": f"d{n}", "title": word if n % 2 else "", "text": f"{word} {WORDS[-n]} {n}"}
            for n, word in enumerate(WORDS)
        ],
        [{"_id": f"q{n}", "text": word} for n, word in enumerate(WORDS)],
        [(f"q{n}", f"d{n}", 1 + n % 2) for n in range(len(WORDS))],
    )


@pytest.fixture
def options(checkpoint: Path) -> Options:
    return Options(model=str(checkpoint), device="cpu", truncate="END")


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(0)


def unit_rows(random: np.random.Generator, count: int, width: int) -> np.ndarray:
    rows = random.standard_normal((count, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# Vectors: shortened as the options would.


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("size", [16, 32, 64])
def test_shortened_vectors_are_those_of_the_options(options, size, kind):
    texts = [f"{word} and more" for word in WORDS]
    wanted = Embedder(options.replace(dimensions=size, embedding_type=kind)).embed(texts)
    given = shorten(Embedder(options).embed(texts), size, kind)
    assert (given.shape, given.dtype) == (wanted.shape, wanted.dtype)
    if kind == "float":
        np.testing.assert_allclose(given, wanted, rtol=0, atol=2e-7)
    else:
        np.testing.assert_array_equal(given, wanted)


# Search: by hand in numpy.


def rank_by_hand(queries: np.ndarray, corpus: np.ndarray, kind: str) -> np.ndarray:
    """Rank all documents from the formulas, equal ones from the last to the first."""
    if kind == "float":
        scores = queries.astype(np.float64) @ corpus.T
    elif kind in ("int8", "uint8"):
        levels = [
            np.rint(v / np.abs(v).max(axis=1, keepdims=True) * 127) for v in (queries, corpus)
        ]
        levels = [level.astype(np.float64) for level in levels]
        scores = levels[0] @ levels[1].T / np.linalg.norm(levels[1], axis=1)
    else:
        scores = -((queries > 0)[:, None] != (corpus > 0)[None]).sum(axis=2)  # Hamming
    return np.argsort(scores, axis=1, kind="stable")[:, ::-1]


def name_rows(count: int) -> list[str]:
    """Return ids in the order of the rows: 1, 2, 3, ... as characters."""
    return [chr(row + 1) for row in range(count)]


def to_rows(found: list[list[str]]) -> list[list[int]]:
    return [[ord(name) - 1 for name in names] for names in found]


@pytest.mark.parametrize("kind", TYPES)
def test_search_ranks_as_a_computation_by_hand(random, kind, monkeypatch):
    monkeypatch.setattr("shared_engine.evaluate.search.ROWS_PER_BLOCK", 7)
    queries, corpus = unit_rows(random, 15, 21), unit_rows(random, 40, 21)
    found = search(queries, corpus, Ranking(name_rows(40), 10), 21, kind)
    assert to_rows(found) == rank_by_hand(queries, corpus, kind)[:, :10].tolist()


@pytest.mark.parametrize("rows_per_block", [1, 3, 4096])
def test_equal_scores_rank_by_descending_id(rows_per_block, monkeypatch):
    monkeypatch.setattr("shared_engine.evaluate.search.ROWS_PER_BLOCK", rows_per_block)
    same = np.tile(np.array([[0.6, -0.8]], np.float32), (9, 1))
    best = Ranking(["d1", "d9", "d3", "d4", "d20", "d6", "d7", "d8", "d2"], 4)
    for queries in (same[:2], -same[:2], np.array([[0.8, 0.6], [-0.8, -0.6]], np.float32)):  # ±0.0
        assert search(queries, same, best, 2) == [["d9", "d8", "d7", "d6"]] * 2
    assert search(same[:1], same[:2], Ranking(["a", "b"], 4), 2) == [["b", "a"]]  # fewer than k


def test_memory_does_not_grow_with_the_corpus(random, tmp_path):
    """That of numpy, with vectors in a file."""
    peaks = []
    for count in (10_000, 40_000):
        np.save(tmp_path / "vectors.npy", np.tile(unit_rows(random, 100, 64), (count // 100, 1)))
        corpus = np.load(tmp_path / "vectors.npy", mmap_mode="r")
        ranking = Ranking(name_rows(count), 100)
        tracemalloc.start()
        search(unit_rows(random, 20, 64), corpus, ranking, 64, "binary")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_bits_decode_to_their_hamming_distance(random):
    vectors = unit_rows(random, 6, 13)
    signs = decode(shorten(vectors, 13, "binary"), 13, "binary")
    np.testing.assert_array_equal(signs, np.where(vectors > 0, 1, -1))
    np.testing.assert_array_equal(signs, decode(shorten(vectors, 13, "ubinary"), 13, "ubinary"))


def test_bm25_finds_words_only():
    ranking = Ranking(["a", "b", "c"], 3)
    texts = ["green apples", "red pears", ""]
    assert search_bm25(texts, ["pears", "nothing known", ""], ranking) == [["b"], [], []]
    assert search_bm25(["", "a", ""], ["b"], ranking) is None


# Figures.


def test_figures_by_hand():
    qrels = {"a": {"d2": 2, "d5": 1, "d0": 0, "gone": 1}, "d1": {"d11": 1}, "none": {"d1": 0}}
    found = [["d0", "d2", "d1", "d5"], ["d1", "d3", "d4"], []]
    ideal = 2 + 1 / np.log2(3) + 1 / 2
    first = [0, 2 / 3, 2 / 3, 2 / 3, (2 / np.log2(3) + 1 / np.log2(5)) / ideal, 0.5]
    np.testing.assert_allclose(measure(found, qrels), [first, [0] * 6, [0] * 6])
    one = {"d1": qrels["d1"]}
    late = [[f"d{n}" for n in range(12)]]  # the relevant one is the twelfth
    np.testing.assert_allclose(measure(late, one), [[0, 0, 0, 1, 0, 0]])


def test_documents_with_the_id_of_the_query_can_be_excluded(folder, options, tmp_path):
    for name in ("corpus", "queries"):  # each query is the document of its id
        rows = [{"_id": f"x{n}", "text": word} for n, word in enumerate(WORDS)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines)
    (folder / "qrels" / "test.tsv").write_text("".join(f"x{n}\tx{n}\t1\n" for n in range(13)))
    for excluded in (False, True):
        report = evaluate(
            folder,
            [EngineModel(options)],
            embedding_types=["float"],
            cache=tmp_path / "cache",
            bm25=False,
            ignore_identical_ids=excluded,
        )
        assert report.rows[0].figures["Recall@100"].value == 1 - excluded


def test_a_report_has_every_row_with_intervals(folder, options, tmp_path):
    report = evaluate(
        folder, [EngineModel(options)], dimensions=[16, 64, 32], cache=tmp_path / "cache"
    )
    again = evaluate(
        folder, [EngineModel(options)], dimensions=[16, 64, 32], cache=tmp_path / "cache"
    )
    assert report == again
    kinds = [(row.dimensions, row.embedding_type) for row in report.rows]
    wanted = [(size, kind) for size in (64, 32, 16) for kind in ("float", "int8", "binary")]
    assert kinds == [*wanted, (None, None)]
    assert report.rows[-1].figures["Recall@5"].value == 1  # BM25: the words are there
    for row in report.rows:
        assert list(row.figures) == list(MEASURES)
        assert all(f.low <= f.value <= f.high for f in row.figures.values())
    assert set(report.rows[0].differences.values()) == {Figure(0, 0, 0)}
    difference = report.rows[-1].differences["nDCG@10"].value
    values = [report.rows[row].figures["nDCG@10"].value for row in (-1, 0)]
    assert difference == pytest.approx(values[0] - values[1])


# The cache.


class Counting(EngineModel):
    """Counts what it embeds, and fails after a number of documents."""

    embedded = 0
    breaks_at = 10**9

    def stream(self, documents: Iterator[EmbeddingInput], role: Role) -> Iterator[np.ndarray]:
        for vectors in super().stream(documents, role):
            if self.embedded >= self.breaks_at:
                raise KeyboardInterrupt
            self.embedded += len(vectors)
            yield vectors


def test_a_second_run_embeds_nothing(folder, options, tmp_path):
    first, second = Counting(options), Counting(options)
    one = evaluate(folder, [first], cache=tmp_path / "cache")
    two = evaluate(folder, [second], cache=tmp_path / "cache")
    assert (first.embedded, second.embedded) == (2 * len(WORDS), 0)
    assert one.rows == two.rows
    changed = Counting(options.replace(max_tokens=3))  # other vectors
    evaluate(folder, [changed], cache=tmp_path / "cache")
    assert changed.embedded == 2 * len(WORDS)


@pytest.mark.parametrize("torn", [0, 5, 200])
def test_a_crash_loses_no_more_than_a_window(folder, options, tmp_path, monkeypatch, torn):
    monkeypatch.setattr(models_module, "WINDOW", 3)
    corpus, cache = read_folder(folder).corpus, tmp_path / "cache"
    broken, next_one = Counting(options), Counting(options)
    broken.breaks_at = 6
    with pytest.raises(KeyboardInterrupt):
        embed(broken, corpus, "document", cache)
    (path,) = cache.iterdir()
    with path.open("r+b") as file:  # as if the last write had not been whole
        file.truncate(path.stat().st_size - torn)
    vectors = embed(next_one, corpus, "document", cache)
    assert next_one.embedded == len(WORDS) - 6 + (torn > 0)
    np.testing.assert_array_equal(vectors, Embedder(options).embed(corpus.inputs.values()))


@pytest.mark.parametrize(
    ("damage", "lost"),
    [
        (lambda content: b"", None),
        (lambda content: content[:50], None),
        (lambda content: content[:-8], 1),
        (lambda content: content[:-600] + bytes(600), 3),
        (lambda content: content[:128] + b"\xff" * 4 + content[132:], None),
        (lambda content: bytes(128) + content[128:], 0),
    ],
)
def test_a_damaged_cache_is_completed(folder, options, tmp_path, damage, lost):
    """Of a header of 128 bytes, and vectors of 256 bytes each."""
    corpus, counting = read_folder(folder).corpus, Counting(options)
    expected = np.array(embed(counting, corpus, "document", tmp_path / "cache"))
    (path,) = (tmp_path / "cache").iterdir()
    path.write_bytes(damage(path.read_bytes()))
    counting.embedded = 0
    found = embed(counting, corpus, "document", tmp_path / "cache")
    np.testing.assert_array_equal(found, expected)
    assert counting.embedded == (len(corpus) if lost is None else lost)
    assert list((tmp_path / "cache").iterdir()) == [path]


def test_other_texts_have_other_vectors(folder, options, tmp_path):
    before = embed(EngineModel(options), read_folder(folder).corpus, "document", tmp_path)
    lines = (folder / "corpus.jsonl").read_text().replace("alpha", "omega", 1)
    (folder / "corpus.jsonl").write_text(lines)
    after = embed(EngineModel(options), read_folder(folder).corpus, "document", tmp_path)
    assert not np.array_equal(before[0], after[0])


# Data that BEIR and MTEB accept.


def names(data: RetrievalData) -> set[str]:
    """Return the counted irregularities without their explanation."""
    return {f"{name.partition(' (')[0]}: {count}" for name, count in data.counts.items()}


@pytest.mark.parametrize(
    ("content", "counted"),
    [
        ("query-id\tcorpus-id\tscore\nq0\td0\t1\n", set()),
        ("q0\td0\t1\n", set()),
        ("\ufeffquery\tdocument\trelevance\r\n\r\nq0\td0\t1\r\n\n", set()),
        ('"query-id"\t"corpus-id"\t"score"\n"q0"\t"d0"\t"1"\n', set()),
        ("score\tcorpus-id\tnote\tquery-id\n1.0\td0\t-\tq0\n", set()),
        ("q0\t0\td0\t1\n", set()),
        ("qid iter docid rel2\nq0 0 d0 1\n", set()),
        ("q0 Q0  d0 1\n", set()),
        ("q0\td0\t2\nq0\td0\t1\n", {"judgements that change an earlier one: 1"}),
        ("q0\td0\t1\nq0\td0\t1\n", set()),
        ("q0\td0\t1\nx\td0\t1\n", {"judged queries not in queries.jsonl: 1"}),
    ],
)
def test_judgements_are_read_as_others_write_them(folder, content, counted):
    (folder / "qrels" / "test.tsv").write_text(content, encoding="utf-8")
    data = read_folder(folder)
    assert (data.qrels, names(data)) == ({"q0": {"d0": 1}}, counted)


def test_judgements_that_cannot_be_met_are_counted_and_scored(folder, options, tmp_path, capsys):
    """As trec_eval: a document that is missing is not found, a query without one scores 0."""
    (folder / "qrels" / "test.tsv").write_text("q0\td0\t1\nq0\tgone\t1\nq1\td1\t0\nq2\tno\t0\n")
    data = read_folder(folder)
    assert data.queries.ids == ["q0", "q1", "q2"]
    assert names(data) == {
        "relevant documents not in the corpus: 1",
        "queries without a relevant document: 2",
    }
    given = ["--model", options.model, "--device", "cpu", "--json", tmp_path / "all.json"]
    assert run(folder, *given, "--cache", tmp_path / "cache") == 0
    assert "not in the corpus (never found): 1; queries without" in capsys.readouterr().out
    report = json.loads((tmp_path / "all.json").read_text())
    assert report["data"]["irregularities"] == data.counts
    assert report["rows"][-1]["figures"]["Recall@100"]["value"] == pytest.approx((1 / 2) / 3)


def test_rows_are_read_as_others_write_them(folder, options, tmp_path):
    (folder / "corpus.jsonl").write_bytes(
        b'\xef\xbb\xbf{"_id": 0, "title": null, "text": " a ", "metadata": {"x": NaN}}\r\n\n'
        b'{"id": "d0", "title": "T", "text": "first"}\n{"_id": "d1"}\n'
        b'{"_id": "d0", "title": "T", "text": "last"}'
    )
    (folder / "qrels" / "test.tsv").write_text("q0\td0\t1\n")
    data = read_folder(folder)
    texts = dict(zip(data.corpus.ids, data.corpus.texts, strict=True))
    assert texts == {"0": "a", "d1": "", "d0": "T last"}
    assert names(data) == {
        "rows with the id of an earlier one: 1",
        "documents without text or image: 1",
    }
    vectors = embed(EngineModel(options), data.corpus, "document", tmp_path)
    np.testing.assert_array_equal(vectors, Embedder(options).embed(["a", "", "T last"]))


# Errors, and the places that they name.


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("corpus.jsonl", '{"_id": "d0", "text": "a"}\n{"_id": \n', "corpus.jsonl, line 2: Exp"),
        ("corpus.jsonl", '\n["d0"]\n', "corpus.jsonl, line 2: expected"),
        ("corpus.jsonl", '{"_id": "", "text": "a"}\n', "line 1: expected"),
        ("corpus.jsonl", '{"_id": "d0", "text": 3}\n', "line 1: 'text' is not a string"),
        ("corpus.jsonl", '{"_id": "d0", "image": "no.png"}', "no.png: No such file"),
        pytest.param("corpus.jsonl", "[" * 100_000, "line 1: maximum recursion", id="nested"),
        ("corpus.jsonl", "", "has no documents"),
        ("qrels/test.tsv", "q0\td0\t1\nq0\td0\tmuch\n", "test.tsv, line 2: expected query-id"),
        ("qrels/test.tsv", "q0\td0\t1\nq0\td0\t0.5\n", "test.tsv, line 2: expected query-id"),
        ("qrels/test.tsv", "q0\td0\t1\nq0\t0\td0\t1\n", "test.tsv, line 2: expected query-id"),
        ("qrels/test.tsv", "q0\td0\n", "test.tsv, line 1: expected query-id"),
        ("qrels/test.tsv", "q0\td0\t1\nq0\td1\n", r"not b'q0\td1\n'"),
        ("qrels/test.tsv", 'q0\td0\t1\nq0\t"d1\t1\n', "test.tsv, line 2: expected query-id"),
        ("qrels/test.tsv", 'q0\t0\td0\t1\nq0\t0\td1\t"1\n', "test.tsv, line 2: expected query-id"),
        ("qrels/test.tsv", "qid\titer\tdocid\trel\nq0\td0\t1\n", "test.tsv, line 2: expected"),
        *(
            ("qrels/test.tsv", f"q0\td0\t1\nq0\td1\t{score}\n", "an integer score up to 1,000,000")
            for score in (1_000_001, -1_000_001, 2**40, "1e30", "nan")
        ),
        ("qrels/test.tsv", "", "no query of queries.jsonl has a relevant document"),
        ("qrels/test.tsv", "x\td0\t1\n", "no query of queries.jsonl has a relevant document"),
        ("qrels/test.tsv", "q0\td0\t0\n", "no query of queries.jsonl has a relevant document"),
    ],
)
def test_an_error_names_file_and_line(folder, file, content, words):
    (folder / file).write_text(content)
    with pytest.raises(InputError) as caught:
        read_folder(folder)
    assert words in str(caught.value)


def test_a_document_that_cannot_be_embedded_is_named(folder, options, tmp_path):
    (folder / "queries.jsonl").write_text('\n{"_id": "q0", "text": "a b c d e f g h i j k l"}\n')
    (folder / "qrels" / "test.tsv").write_text("q0\td0\t1\n")
    model = EngineModel(options.replace(truncate="NONE", max_tokens=6))
    with pytest.raises(InputError, match=r"queries.jsonl, 'q0': has \d+ tokens"):
        evaluate(folder, [model], cache=tmp_path / "cache")


def test_missing_files_and_splits_are_named(folder):
    with pytest.raises(ConfigurationError, match=r"has no dev.tsv; it has test"):
        read_folder(folder, "dev")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(ConfigurationError, match=r"queries.jsonl is missing"):
        read_folder(folder)


def test_only_queries_of_the_split_are_measured(folder):
    (folder / "qrels" / "dev.tsv").write_text("q3\td3\t1\nq4\td4\t1\n")
    assert read_folder(folder, "dev").queries.ids == ["q3", "q4"]


def test_a_size_that_is_not_offered_is_refused(folder, options, tmp_path):
    with pytest.raises(UnsupportedDimensionsError, match="17"):
        evaluate(folder, [EngineModel(options)], dimensions=[17], cache=tmp_path / "cache")


# The command.


def run(*arguments: object) -> int:
    return main(["evaluate", *map(str, arguments)])


def test_the_command_prints_writes_and_draws(folder, checkpoint, tmp_path, capsys):
    given = (folder, "--model", checkpoint, "--device", "cpu", "--cache", tmp_path / "cache")
    files = ("--json", tmp_path / "all.json", "--plot", tmp_path / "chart.svg")
    assert run(*given, "--dimensions", 16, 32, "--against", checkpoint, *files) == 0
    printed = capsys.readouterr().out
    assert "13 documents, 13 queries" in printed
    assert printed.count("| tiny ") == 18
    assert "| BM25 " in printed
    found: dict[str, Any] = json.loads((tmp_path / "all.json").read_text())
    assert found["data"]["documents"] == 13
    assert found["models"][0]["cache_key"].keys() == {"query", "document"}
    assert {"date", "versions", "interval", "rows", "left_out"} <= found.keys()
    chart = (tmp_path / "chart.svg").read_text()
    assert "bytes per vector" in chart
    assert len(chart) < 100_000
    assert run(*given, "--plot", tmp_path / "chart.png") == 0
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "wrong",
    [
        [],
        ["--plot", "chart.pdf"],
        ["--json", "nowhere/all.json"],
        ["--json", "."],
        ["--plot", "nowhere/chart.svg"],
        ["--data", "folder"],
        *(["--dimensions", n] for n in (17, 0, -1)),
    ],
    ids=[
        "no folder",
        "plot",
        "json",
        "json is a folder",
        "chart",
        "data",
        "not offered",
        "zero",
        "negative",
    ],
)
def test_invalid_arguments_are_refused_before_anything_is_embedded(
    folder, checkpoint, tmp_path, capsys, wrong
):
    given = ["--model", checkpoint, "--device", "cpu", "--cache", tmp_path / "cache", *wrong]
    assert run(*([folder] if wrong else []), *given) == 2
    assert "nemoretriever: " in capsys.readouterr().err
    assert not list(tmp_path.glob("cache/*"))


def test_a_cache_that_cannot_be_written_is_an_error_without_a_traceback(
    folder, checkpoint, tmp_path, capsys
):
    (tmp_path / "file").touch()
    given = ("--model", checkpoint, "--device", "cpu", "--cache", tmp_path / "file" / "cache")
    assert run(folder, *given) == 1
    assert re.search(r"nemoretriever: .*Not a directory: .*cache", capsys.readouterr().err)


def test_without_sentence_transformers_its_pip_line_is_named(options, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sentence_transformers", None)
    with pytest.raises(MissingExtraError, match="pip install sentence-transformers"):
        find_model("st:any", options)


def ask_nim(body: dict[str, Any], *, cuts: bool) -> httpx.Response | None:
    """Reply with vectors of another beginning for each size, where the NIM does not cut."""
    if "dimensions" not in body or cuts:
        return None
    rows = [(n, vector(f"{body['dimensions']} {text}")) for n, text in enumerate(body["input"])]
    return httpx.Response(200, content=answer(body, [(n, row[:8]) for n, row in rows]))


@pytest.mark.parametrize("cuts", [True, False])
def test_a_nim_is_measured_where_its_sizes_are_cuts(folder, tmp_path, cuts):
    nim = Nim(lambda request, body: ask_nim(body, cuts=cuts))
    options = nim.embedder().options
    arguments: dict[str, Any] = {"dimensions": [8], "cache": tmp_path / "cache"}
    if not cuts:
        with pytest.raises(ConfigurationError, match="the vectors with dimensions=8 are not"):
            evaluate(folder, [EngineModel(options)], **arguments)
        return
    report = evaluate(folder, [EngineModel(options)], **arguments)
    assert [row.dimensions for row in report.rows] == [16] * 3 + [8] * 3 + [None]
    assert {body["input_type"] for body in nim.bodies} == {"query", "passage"}
    texts = [
        text for body in nim.bodies if body["input_type"] == "passage" for text in body["input"]
    ]
    assert sorted(texts) == sorted(read_folder(folder).corpus.texts)


def test_other_models_are_found_by_what_is_named(options, checkpoint):
    there = find_model("http://nim:8000/v1", options)
    assert there.name == "http://nim:8000/v1"
    here = find_model(str(checkpoint), options)
    assert here.cache_key("query") == EngineModel(options).cache_key("query")


@pytest.mark.parametrize("by_variable", [False, True])
def test_two_servers_of_one_model_do_not_share_vectors(by_variable, monkeypatch):
    nim, keys = Nim(), set()
    for url in ("http://nim:1/v1", "http://nim:2/v1"):
        monkeypatch.setenv("NVIDIA_BASE_URL", url)
        model = EngineModel(nim.embedder(base_url=None if by_variable else url).options)
        assert model.name == f"{MODEL} at {url}"
        keys.add(model.cache_key("query"))
    assert len(keys) == 2


def test_a_model_of_sentence_transformers_is_compared(folder, options, tmp_path):
    """With its own prompts for queries and documents, and vectors of its own in the cache."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    random = np.random.default_rng(0)
    words = StaticEmbedding(tokenizer(), random.standard_normal((len(tokenizer().get_vocab()), 8)))
    prompts = {"query": "query: ", "document": "passage: "}
    SentenceTransformer(modules=[words], prompts=prompts).save(str(tmp_path / "static"))
    st = find_model(f"st:{tmp_path / 'static'}", options)
    report = evaluate(
        folder,
        [EngineModel(options), st],
        dimensions=[16],
        embedding_types=["float"],
        cache=tmp_path / "cache",
    )
    assert [row.model for row in report.rows] == ["tiny", "tiny", "st:static", "BM25"]
    assert report.left_out == ["st:static: dimensions=16, but st:static has 8"]
    assert len(list((tmp_path / "cache").glob("*.npy"))) == 4
    data = read_folder(folder)
    for role, prefix in (("query", "query: "), ("document", "passage: ")):
        texts = [prefix + text for text in data.by_role[role].texts]
        plain = SentenceTransformer(modules=[words]).encode(texts, normalize_embeddings=True)
        given = embed(st, data.by_role[role], role, tmp_path / "cache")
        np.testing.assert_allclose(given, plain, rtol=0, atol=1e-6)


def test_code_of_a_checkpoint_is_not_run(checkpoint, options):
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        find_model(f"st:{checkpoint}", options)


# Pictures.


def test_a_corpus_of_pictures(tmp_path):
    model = build_vl_checkpoint(tmp_path / "vl")
    folder = tmp_path / "pages"
    (folder / "images").mkdir(parents=True)
    for n in range(3):
        page(n, 40 + 20 * n, 50).save(folder / "images" / f"{n}.png")
    corpus = [{"_id": f"p{n}", "image": f"images/{n}.png"} for n in range(3)]
    corpus[2]["text"] = "a caption"
    write_beir(folder, corpus, [{"_id": "q", "text": "a page"}], [("q", "p1", 1)])
    options = Options(model=str(model), device="cpu")
    report = evaluate(folder, [EngineModel(options)], embedding_types=["float"], cache=tmp_path)
    assert report.rows[0].figures["Recall@5"].value == 1
    kept = embed(EngineModel(options), read_folder(folder).corpus, "document", tmp_path)
    documents = [EmbeddingInput(row.get("text"), folder / row["image"]) for row in corpus]
    np.testing.assert_allclose(kept, Embedder(options).embed(documents), rtol=0, atol=1e-5)
    page(9, 60, 50).save(folder / "images" / "1.png")  # another picture of the same name
    other = embed(EngineModel(options), read_folder(folder).corpus, "document", tmp_path)
    assert not np.array_equal(other[1], kept[1])


# Real data.


@pytest.mark.slow
@pytest.mark.data("xquad")
def test_xquad_gives_the_known_figures(data, standin, tmp_path):
    """Those that numpy, pytrec_eval and MTEB computed from the same vectors."""
    folder = convert_xquad(data / "xquad" / "xquad.en.json", tmp_path / "XQuAD-en")
    options = Options(model=str(standin), device="cpu", dtype="float32")
    report = evaluate(folder, [EngineModel(options)], cache=tmp_path / "cache")
    shown = {row.embedding_type or row.model: row.figures for row in report.rows}
    assert round(shown["float"]["nDCG@10"].value, 3) == 0.901
    assert round(shown["float"]["Recall@5"].value, 3) == 0.97
    assert shown["BM25"]["nDCG@10"].value > 0.95
    found = read_folder(folder)
    vectors = {
        role: np.array(embed(EngineModel(options), each, role, tmp_path / "cache"))
        for role, each in found.by_role.items()
    }
    order = np.argsort(np.array(found.corpus.ids))  # equal scores rank by id
    rows = {found.corpus.ids[row]: place for place, row in enumerate(order)}
    own = np.array([rows[next(iter(found.qrels[query]))] for query in found.queries.ids])
    for kind in ("int8", "binary"):
        ranked = rank_by_hand(vectors["query"], vectors["document"][order], kind)
        places = (ranked == own[:, None]).argmax(axis=1)
        gains = np.where(places < 10, 1 / np.log2(places + 2), 0)
        assert shown[kind]["nDCG@10"].value == pytest.approx(gains.mean(), abs=1e-9)
        assert shown[kind]["Recall@5"].value == pytest.approx((places < 5).mean(), abs=1e-9)
