"""MTEB: a model that it takes, its tasks on a local copy, and the same figures as ours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shared_engine import Embedder, Options
from shared_engine.cli.main import main
from shared_engine.errors import ConfigurationError
from shared_engine.evaluate import EngineModel, MTEBModel, evaluate, run_tasks, write_tasks
from shared_engine.evaluate.mteb import CARDS
from shared_engine.evaluate.search import decode
from tests.support.beir import convert_xquad, write_beir

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("default")]  # MTEB's own

WORDS = [
    "alpha",
    "beta",
    "gamma",
    "delta",
    "epsilon",
    "zeta",
    "eta",
    "theta",
    "iota",
    "kappa",
    "lambda",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a task of several languages, of which one is there."""
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


@pytest.mark.parametrize("kind", ["float", "int8", "binary"])
@pytest.mark.parametrize("size", [16, 64])
def test_mteb_finds_what_we_find(folder, options, tmp_path, size, kind):
    ours = evaluate(
        folder / "en",
        [EngineModel(options)],
        dimensions=[size],
        embedding_types=[kind],
        cache=tmp_path / "cache",
    )
    (row,) = run_tasks(
        ["XQuADRetrieval"], options.replace(dimensions=size, embedding_type=kind), folder
    )
    figures = next(row.figures for row in ours.rows if row.dimensions == size)
    assert (row["subset"], row["split"]) == ("en", "validation")
    for name in ("Recall@5", "nDCG@10") if kind != "binary" else ():  # whose ties are many
        assert row[name] == pytest.approx(figures[name].value, abs=1e-5)


@pytest.mark.parametrize(("prompt_type", "role"), [("query", "query"), ("document", "document")])
def test_a_prompt_type_is_a_role(options, prompt_type, role):
    from mteb.types import PromptType

    embedder = Embedder(options.replace(dimensions=32, embedding_type="int8"))
    batches = [{"text": ["one", "two"]}, {"text": ["three"]}]
    given = MTEBModel(embedder).encode(batches, prompt_type=PromptType(prompt_type))
    wanted = embedder.embed(["one", "two", "three"], role)
    np.testing.assert_array_equal(given, decode(wanted, 32, "int8"))


def test_what_is_no_task_is_refused(folder, options):
    with pytest.raises(ConfigurationError, match="XQuADRetrieval"):
        run_tasks(["XQuADRetrieva"], options, folder)
    with pytest.raises(ConfigurationError, match="has no folder of a subset"):
        run_tasks(["XQuADRetrieval"], options, folder / "en")
    with pytest.raises(ConfigurationError, match="one task; 3 are to run"):
        run_tasks(["qa"], options, folder)


def test_the_tasks_of_the_cards_are_there():
    import mteb

    for card in CARDS.values():
        for name in card.tasks:
            task = mteb.get_task(name)
            assert set(card.subsets) <= set(task.hf_subsets)


def test_the_command_shows_the_card_beside_it(folder, checkpoint, tmp_path, capsys):
    given = ["--model", str(checkpoint), "--device", "cpu", "--json", str(tmp_path / "all.json")]
    assert main(["evaluate", "--mteb", "FiQA2018", "--data", str(folder / "en"), *given]) == 0
    printed = capsys.readouterr().out
    assert "| FiQA2018 | default | test |" in printed
    assert "says 0.6292, its average on NQ, HotpotQA, FiQA, TechQA dataset" in printed
    assert "Recall@5" in (tmp_path / "all.json").read_text()
    assert "card" not in write_tasks([])


@pytest.mark.data("xquad")
def test_xquad_is_what_mteb_finds(data, standin, tmp_path):
    convert_xquad(data / "xquad" / "xquad.en.json", tmp_path / "xquad" / "en")
    options = Options(model=str(standin), device="cpu", dtype="float32", truncate="END")
    (row,) = run_tasks(["XQuADRetrieval"], options, tmp_path / "xquad")
    assert (round(row["nDCG@10"], 3), round(row["Recall@5"], 3)) == (0.723, 0.816)
