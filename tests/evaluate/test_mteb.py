"""MTEB: our model in it, its tasks with data of a folder, and figures equal to ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared_engine import Embedder, Options
from shared_engine.cli.main import main
from shared_engine.errors import ConfigurationError
from shared_engine.evaluate import EngineModel, MTEBModel, evaluate, run_tasks
from shared_engine.evaluate.mteb import CARDS
from shared_engine.evaluate.search import decode
from tests.support.beir import convert_xquad, write_beir
from tests.support.vl_checkpoints import build_vl_checkpoint, page

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # MTEB's own

WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta", "iota", "kappa"]
NAMES = {
    **{f"Recall@{k}": f"recall_at_{k}" for k in (1, 5, 10, 100)},
    **{"nDCG@10": "ndcg_at_10", "MRR@10": "mrr_at_10"},
}
"""Our names of the measures, and MTEB's."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Data of a task with subsets, of which one is there."""
    write_beir(
        tmp_path / "task" / "en",
        [{"_id": f"d{n}", "title": w, "text": f"of {WORDS[-n]}"} for n, w in enumerate(WORDS)],
        [{"_id": f"q{n}", "text": word} for n, word in enumerate(WORDS)],
        [(f"q{n}", f"d{n}", 1) for n in range(len(WORDS))],
    )
    return tmp_path / "task"


@pytest.fixture
def options(checkpoint: Path) -> Options:
    return Options(model=str(checkpoint), device="cpu", truncate="END")


@pytest.fixture
def task() -> Any:
    """A task with data that MTEB accepts though much of it is irregular: 120 documents."""
    import mteb

    task = mteb.get_task("FiQA2018")
    task.k_values = (1, 5, 10, 100)
    texts = [f" {a} {b}\n" for a in WORDS for b in WORDS] + ["twice the same"] * 20
    titles = ["", "Title", "A longer title "]
    task.corpus = {
        "test": {f"d{n}": {"title": titles[n % 3], "text": t} for n, t in enumerate(texts)}
    }
    task.queries = {"test": {f"q{n}": f" about {texts[7 * n]}" for n in range(12)}}
    task.relevant_docs = {"test": {f"q{n}": {f"d{7 * n}": 1} for n in range(9)}}
    task.relevant_docs["test"] |= {
        "q3": {"d21": 2, "gone": 1, "d5": 1, "d6": 0, "d7": -1},
        "q9": {"d1": 0},  # none is relevant
        "q10": {"gone": 1},
        "unknown": {"d0": 1},
    }
    task.data_loaded = True
    return task


@pytest.mark.parametrize("kind", ["float", "int8", "binary"])
@pytest.mark.parametrize("size", [16, 64])
def test_figures_are_those_of_mteb(task, options, tmp_path, size, kind):
    """MTEB has the data from memory, we from a folder; with bits many scores are equal."""
    import mteb

    write_beir(
        tmp_path / "folder",
        [{"_id": name, **document} for name, document in task.corpus["test"].items()],
        [{"_id": name, "text": text} for name, text in task.queries["test"].items()],
        [(q, d, n) for q, row in task.relevant_docs["test"].items() for d, n in row.items()],
    )
    with Embedder(options.replace(dimensions=size, embedding_type=kind)) as embedder:
        found = mteb.evaluate(MTEBModel(embedder), task, cache=None, co2_tracker=False)
    (theirs,) = found.task_results[0].scores["test"]
    report = evaluate(
        tmp_path / "folder",
        [EngineModel(options)],
        dimensions=[size],
        embedding_types=[kind],
        cache=tmp_path / "cache",
    )
    (ours,) = (row.figures for row in report.rows if row.dimensions == size)
    for name, figure in ours.items():
        assert figure.value == pytest.approx(theirs[NAMES[name]], abs=1e-5), name


@pytest.mark.parametrize(("prompt_type", "role"), [("query", "query"), ("document", "document")])
def test_a_prompt_type_is_a_role(options, prompt_type, role):
    from mteb.types import PromptType

    embedder = Embedder(options.replace(dimensions=32, embedding_type="int8"))
    batches = [{"text": ["one", "two"]}, {"text": ["three"]}]
    given = MTEBModel(embedder).encode(batches, prompt_type=PromptType(prompt_type))
    wanted = embedder.embed(["one", "two", "three"], role)
    np.testing.assert_array_equal(given, decode(wanted, 32, "int8"))


def test_an_invalid_task_is_refused(folder, options):
    with pytest.raises(ConfigurationError, match="XQuADRetrieval"):
        run_tasks(["XQuADRetrieva"], options, folder)
    with pytest.raises(ConfigurationError, match="has no subfolder for a subset"):
        run_tasks(["XQuADRetrieval"], options, folder / "en")
    with pytest.raises(ConfigurationError, match="for one task, but 3 are selected"):
        run_tasks(["qa"], options, folder)


@pytest.mark.parametrize(
    ("files", "measured"),
    [
        (["dev", "test"], {"dev": 1}),  # the only split of the task is dev
        (["test", "train"], {"test": 0}),
        (["train"], {"train": 0}),
    ],
)
def test_the_splits_of_a_folder_have_their_own_names(options, tmp_path, files, measured):
    """The judgements of dev can be met, those of the others cannot."""
    corpus = [{"_id": "d0", "text": "alpha"}, {"_id": "d1", "text": "beta"}]
    for split in files:
        qrels = [("q0", "d0" if split == "dev" else "gone", 1)]
        write_beir(tmp_path, corpus, [{"_id": "q0", "text": "alpha"}], qrels, split)
    rows = run_tasks(["MSMARCO"], options, tmp_path)
    assert {row["split"]: row["Recall@5"] for row in rows} == measured


def test_the_tasks_of_the_cards_are_there():
    import mteb

    for card in CARDS.values():
        for name in card.tasks:
            task = mteb.get_task(name)
            assert set(card.subsets or ()) <= set(task.hf_subsets)


def test_the_command_shows_the_figures_of_a_task_and_of_the_card(
    folder, checkpoint, tmp_path, capsys
):
    given = ["--model", str(checkpoint), "--device", "cpu", "--json", str(tmp_path / "all.json")]
    assert main(["evaluate", "--mteb", "FiQA2018", "--data", str(folder / "en"), *given]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].endswith("embed-v2: 0.6292, averaged over NQ, HotpotQA, FiQA, TechQA.")
    printed = [line.split() for line in lines]
    (row,) = json.loads((tmp_path / "all.json").read_text())
    assert printed[0][1::2] == list(row) == ["task", "subset", "split", "Recall@5", "nDCG@10"]
    figures = [f"{row['Recall@5']:.4f}", f"{row['nDCG@10']:.4f}"]
    assert printed[2][1::2] == ["FiQA2018", "default", "test", *figures]


def test_a_task_with_local_data_needs_no_network(folder, checkpoint, python):
    """Nor does it need HF_HUB_OFFLINE."""
    printed = python(f"""if True:
        import os, socket, sys, warnings
        warnings.simplefilter("ignore")
        del os.environ["HF_HUB_OFFLINE"]
        def audit(event, args):
            if event in ("socket.connect", "socket.getaddrinfo"):
                print(event, args)
        sys.addaudithook(audit)
        from shared_engine.cli.main import main
        given = ["--model", {str(checkpoint)!r}, "--device", "cpu"]
        print(main(["evaluate", "--mteb", "XQuADRetrieval", "--data", {str(folder)!r}, *given]))
    """)
    assert "socket." not in printed
    assert printed.splitlines()[-1] == "0"


def test_a_corpus_of_texts_and_images(tmp_path):
    folder, model = tmp_path / "pages", build_vl_checkpoint(tmp_path / "vl")
    folder.mkdir()
    page(1, 60, 50).save(folder / "1.png")
    corpus = [
        {"_id": "text", "text": "only a text"},
        {"_id": "image", "image": "1.png"},
        {"_id": "both", "text": "a caption", "image": "1.png"},
    ]
    write_beir(folder, corpus, [{"_id": "q", "text": "a page"}], [("q", "both", 1)])
    options = Options(model=str(model), device="cpu")
    (row,) = run_tasks(["WebQAT2ITRetrieval"], options, folder)
    assert row["Recall@5"] == 1


@pytest.mark.data("xquad")
def test_xquad_is_what_mteb_finds(data, standin, tmp_path):
    convert_xquad(data / "xquad" / "xquad.en.json", tmp_path / "xquad" / "en")
    options = Options(model=str(standin), device="cpu", dtype="float32", truncate="END")
    report = evaluate(
        tmp_path / "xquad" / "en", [EngineModel(options)], cache=tmp_path / "cache", bm25=False
    )
    shown = {row.embedding_type: row.figures for row in report.rows}
    assert round(shown["float"]["nDCG@10"].value, 3) == 0.901
    bits = options.replace(embedding_type="binary")  # the type with the most equal scores
    (theirs,) = run_tasks(["XQuADRetrieval"], bits, tmp_path / "xquad")
    for name in ("Recall@5", "nDCG@10"):
        assert shown["binary"][name].value == pytest.approx(theirs[name], abs=1e-5)
