"""What the vectors find: XQuAD's questions and paragraphs, with the stand-in's real weights.

Unlike random weights these tell a bidirectional mean from a causal one by what matters in the end.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from shared_engine import Embedder, Options
from tests.support.oracles import llama_4d_mask

pytestmark = [pytest.mark.slow, pytest.mark.data("xquad")]

LANGUAGES = ("en", "de", "es", "ru", "ar", "hi", "zh")
EVERY = 10  # one in ten paragraphs of each language: 24, each of another article
CHANCE = np.reciprocal(np.log2(np.arange(2, 12))).sum() / 24  # nDCG@10 of a random order: 0.19


class Corpus:
    """One language: paragraphs, questions, and the row of the paragraph that answers each."""

    def __init__(self, folder: Path, language: str) -> None:
        data = json.loads((folder / f"xquad.{language}.json").read_text(encoding="utf-8"))["data"]
        entries = [entry for article in data for entry in article["paragraphs"]]
        self.paragraphs = [entry["context"] for entry in entries]
        asked = [(row, qa) for row, entry in enumerate(entries) for qa in entry["qas"]]
        self.questions = [qa["question"] for _, qa in asked]
        self.answers = np.array([row for row, _ in asked])


@pytest.fixture(scope="module")
def embedder(standin: Path) -> Embedder:
    return Embedder(Options(model=str(standin), device="cpu", dtype="float32"))


@pytest.fixture(scope="module")
def corpus(data: Path) -> Callable[[str], Corpus]:
    return cache(lambda language: Corpus(data / "xquad", language))


@pytest.fixture(scope="module")
def english(embedder: Embedder, corpus: Callable[[str], Corpus]) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of all 240 paragraphs (240, 576) and all 1190 questions (1190, 576)."""
    found = corpus("en")
    assert (len(found.paragraphs), len(found.questions)) == (240, 1190)
    return embedder.embed(found.paragraphs), embedder.embed(found.questions, "query")


@pytest.fixture
def report(
    record_property: Callable[[str, object], None], capsys: pytest.CaptureFixture[str]
) -> Callable[[str, float], None]:
    """Put a figure into the test report, and on the screen too."""

    def say(name: str, figure: float) -> None:
        record_property(name, round(figure, 4))
        with capsys.disabled():
            print(f"\n  {name}: {figure:.4f}", end="")

    return say


def ndcg(questions: np.ndarray, paragraphs: np.ndarray, answers: np.ndarray) -> float:
    """Return nDCG@10 where each question has one answer: 1 / log2(1 + its rank), ties last."""
    scores = questions @ paragraphs.T  # (q, p)
    own = scores[np.arange(len(scores)), answers]
    ranks = (scores >= own[:, None]).sum(axis=1)
    assert ranks.all()  # 0 would be NaN
    return float(np.where(ranks <= 10, 1 / np.log2(1 + ranks), 0).mean())


def cut(vectors: np.ndarray, size: int = 384) -> np.ndarray:
    """Return the first values of vectors, of length 1."""
    shorter = vectors[:, :size]
    return shorter / np.linalg.norm(shorter, axis=1, keepdims=True)


def causal_vectors(folder: Path, texts: list[str], batch: int = 16) -> np.ndarray:
    """Embed with transformers' LlamaModel as it comes: the same ids and mean, a causal mask.

    Padding on the right needs no mask of its own, because nothing before it sees it.
    """
    import torch
    from safetensors.torch import load_file
    from tokenizers import Tokenizer
    from transformers import LlamaConfig, LlamaModel

    config = json.loads((folder / "config.json").read_text())
    for name in ("architectures", "auto_map", "model_type", "torch_dtype"):
        del config[name]
    model = LlamaModel(LlamaConfig(**config)).eval()
    model.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    )
    ids = [
        found.ids
        for found in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    ]
    order = sorted(range(len(texts)), key=lambda i: len(ids[i]))
    out = np.empty((len(texts), config["hidden_size"]), np.float32)
    with torch.inference_mode():
        for start in range(0, len(order), batch):
            rows = order[start : start + batch]
            longest = max(len(ids[row]) for row in rows)
            padded = torch.tensor([ids[row] + [0] * (longest - len(ids[row])) for row in rows])
            states = model(input_ids=padded, use_cache=False).last_hidden_state  # (b, t, hidden)
            for row, state in zip(rows, states, strict=True):
                mean = state[: len(ids[row])].mean(dim=0).numpy()
                out[row] = mean / np.linalg.norm(mean)
    return out


def test_the_engine_and_transformers_agree_but_for_the_mask(
    embedder: Embedder, standin: Path, corpus: Callable[[str], Corpus]
) -> None:
    """So the comparison below is of the mask alone, and the causal run is causal."""
    texts = [corpus("en").questions[0], corpus("en").paragraphs[0], "one"]
    ours = embedder.embed(texts)
    expected = llama_4d_mask(standin, texts, "passage: ")
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)
    causal = causal_vectors(standin, [f"passage: {text}" for text in texts])
    assert (np.abs(ours - causal).max(axis=1)[:2] > 0.01).all()


def test_english_retrieval_is_what_a_bidirectional_model_gives(
    english: tuple[np.ndarray, np.ndarray],
    standin: Path,
    corpus: Callable[[str], Corpus],
    report: Callable[[str, float], None],
) -> None:
    """All of XQuAD English, where BM25 gets 0.958."""
    paragraphs, questions = english
    found = corpus("en")
    bidirectional = ndcg(questions, paragraphs, found.answers)
    causal = ndcg(
        causal_vectors(standin, [f"query: {text}" for text in found.questions]),
        causal_vectors(standin, [f"passage: {text}" for text in found.paragraphs]),
        found.answers,
    )
    report("nDCG@10 of XQuAD English", bidirectional)
    report("nDCG@10 of XQuAD English under a causal mask", causal)
    assert bidirectional >= 0.89  # 0.90, as it was trained
    assert bidirectional >= causal + 0.04
    assert ndcg(cut(questions), cut(paragraphs), found.answers) >= bidirectional - 0.02


@pytest.mark.parametrize("language", LANGUAGES)
def test_seven_languages(
    language: str,
    english: tuple[np.ndarray, np.ndarray],
    embedder: Embedder,
    corpus: Callable[[str], Corpus],
    report: Callable[[str, float], None],
) -> None:
    """24 paragraphs and all their questions, asked in the paragraphs' language and in English."""
    found = corpus(language)
    assert (found.answers == corpus("en").answers).all()  # the translations are parallel
    asked = np.flatnonzero(found.answers % EVERY == 0)
    answers = found.answers[asked] // EVERY
    if language == "en":
        paragraphs, questions = english[0][::EVERY], english[1][asked]
    else:
        paragraphs = embedder.embed(found.paragraphs[::EVERY])
        questions = embedder.embed([found.questions[i] for i in asked], "query")
    for vectors in (paragraphs, questions):
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=1e-5)
    own = ndcg(questions, paragraphs, answers)
    report(f"nDCG@10 of {language} among 24, asked in {language}", own)
    if language != "en":
        crossed = ndcg(english[1][asked], paragraphs, answers)
        report(f"nDCG@10 of {language} among 24, asked in en", crossed)
    assert own > 1.5 * CHANCE
