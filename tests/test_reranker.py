"""`Reranker`: scores against an independent model, errors by index, and what it shares."""

from __future__ import annotations

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from shared_engine import (
    CheckpointError,
    ConfigurationError,
    Embedder,
    EmbeddingInput,
    EngineClosedError,
    ImageError,
    InputTooLongError,
    InputTypeError,
    NonFiniteVectorError,
    Options,
    PartialResultError,
    Reranker,
    RerankOptions,
    UnsupportedModalityError,
    images,
    track_usage,
)
from tests.support.checkpoints import SHAPES, build_checkpoint
from tests.support.rerankers import build_reranker, build_vl_reranker, score_float64
from tests.support.vl_checkpoints import VL_SHAPES, page

QUERY = "how many tokens are there in a document?"
TEXTS = [
    "The tokens of a document are counted after the prefix has been added to the text.",
    "The quick brown fox jumps over the lazy dog.",
    "",
    "Die Anfrage wird mit den Dokumenten verglichen. " * 20,
    "passage: A retrieval model turns every passage into a vector of numbers.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_reranker(tmp_path_factory.mktemp("reranker"))


@pytest.fixture(scope="module")
def vl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_vl_reranker(tmp_path_factory.mktemp("vl-reranker"))


def make(folder: Path, **options: Any) -> Reranker:
    return Reranker(RerankOptions(model=str(folder), device="cpu", dtype="float32", **options))


@pytest.mark.parametrize("name", ["gqa", "wide-heads", "plain-rope", "large-eps", "two-layers"])
def test_scores_equal_an_independent_model(name, tmp_path):
    folder = build_reranker(tmp_path, SHAPES[name])
    with make(folder) as reranker:
        scores = reranker.score(QUERY, TEXTS)
    assert scores.shape == (len(TEXTS),)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores, score_float64(folder, QUERY, TEXTS), atol=1e-5)


@pytest.mark.parametrize("layout", ["nested", "flat"])
def test_scores_of_images_equal_an_independent_model(layout, tmp_path):
    shape = VL_SHAPES[layout]
    folder = build_vl_reranker(tmp_path, shape)
    pictures = [page(1, 90, 40), page(2, 40, 40), page(3, 30, 80)]
    tiles = [images.cut_tiles(images.accept(p), shape.max_input_tiles, 32) for p in pictures]
    documents: list[Any] = [TEXTS[0], *(EmbeddingInput(image=picture) for picture in pictures)]
    documents += [EmbeddingInput(TEXTS[1], pictures[0]), ""]
    items = [TEXTS[0], *((None, each) for each in tiles), (TEXTS[1], tiles[0]), ""]
    with make(folder) as reranker:
        scores = reranker.score(QUERY, documents)
    np.testing.assert_allclose(scores, score_float64(folder, QUERY, items), atol=1e-5)


@pytest.mark.parametrize("template", [None, "v1"])
def test_the_prompt_is_that_of_the_checkpoint(template, tmp_path):
    folder = build_vl_reranker(tmp_path, prompt_template=template)
    with make(folder) as reranker:
        pair = reranker.score(QUERY, ["a passage"])
        assert make(folder).score(QUERY, ["a passage"]) == pair
        embedder_prompt = {"v1": f"question:{QUERY} \n \n passage:a passage"}
        expected = embedder_prompt.get(template, f"{QUERY} \n a passage")
        ids = reranker.load()._tokenizer.encode_pairs(QUERY, ["a passage"], "NONE")[0]
        assert ids.tolist() == reranker.load()._tokenizer._tokenizer.encode(expected).ids


def test_a_score_does_not_depend_on_other_documents(folder):
    random = np.random.default_rng(0)
    words = " ".join(TEXTS).split()
    texts = [" ".join(random.choice(words, random.integers(1, 200))) for _ in range(60)]
    with make(folder, max_batch_tokens=512) as reranker:
        together = reranker.score(QUERY, texts)
        alone = [reranker.score(QUERY, [text])[0] for text in texts]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_the_head_is_float32_whatever_the_dtype(folder):
    logits = Reranker(RerankOptions(model=str(folder), device="cpu", dtype="bfloat16"))
    with logits:
        scores = logits.score(QUERY, TEXTS)
    assert np.abs(scores - score_float64(folder, QUERY, TEXTS)).max() < 0.1
    as_bfloat16 = torch.from_numpy(scores).bfloat16().float().numpy()
    assert not np.array_equal(scores, as_bfloat16)  # as they would be with a bfloat16 head


def test_documents_are_ranked_by_score(folder):
    with make(folder) as reranker:
        scores = reranker.score(QUERY, [*TEXTS, TEXTS[0]])
        ranking = reranker.rank(QUERY, [*TEXTS, TEXTS[0]])
        first = reranker.rank(QUERY, [*TEXTS, TEXTS[0]], top_n=2)
        assert ranking[:2] == first
        assert [index for index, _ in ranking] == np.argsort(-scores, kind="stable").tolist()
        assert [score for _, score in ranking] == sorted(scores.tolist(), reverse=True)
        positions = [index for index, _ in ranking]
        assert positions.index(0) + 1 == positions.index(5)  # equal scores keep their order
        assert reranker.rank(QUERY, [], top_n=3) == []
        for wrong in (0, -1):
            with pytest.raises(ConfigurationError, match=f"top_n={wrong}: must be at least 1"):
                reranker.rank(QUERY, TEXTS, top_n=wrong)


def test_sigmoid_turns_logits_into_probabilities(folder):
    with make(folder) as logits, make(folder, activation="sigmoid") as probabilities:
        assert (logits.score_kind, probabilities.score_kind) == ("logit", "probability")
        expected = 1 / (1 + np.exp(-logits.score(QUERY, TEXTS).astype(np.float64)))
        np.testing.assert_allclose(probabilities.score(QUERY, TEXTS), expected, rtol=1e-5)
        assert logits.load() is probabilities.load()
        changed = logits.with_options(activation="sigmoid")
        np.testing.assert_allclose(changed.score(QUERY, TEXTS), expected, rtol=1e-5)


@pytest.mark.parametrize("query", ["", " \n", None, 3, ["a query"], b"bytes", "\ud800"])
def test_a_query_that_is_no_text_is_refused(folder, query):
    with make(folder) as reranker, pytest.raises(InputTypeError) as failed:
        reranker.score(query, TEXTS)
    assert failed.value.index is None


def test_documents_are_checked_before_anything_is_computed(folder):
    with make(folder) as reranker:
        for wrong in (None, 3, b"bytes"):
            with pytest.raises(InputTypeError, match=r"input 1 is of type") as failed:
                reranker.score(QUERY, [TEXTS[0], wrong])
            assert failed.value.index == 1
        with pytest.raises(UnsupportedModalityError, match=r"input 0 is of modality 'image'"):
            reranker.score(QUERY, [EmbeddingInput(image=page(1, 40, 40))])
        with pytest.raises(InputTypeError, match="expected a list of documents, got one str"):
            reranker.score(QUERY, "a passage")
        assert reranker.usage == 0


def test_long_documents_fail_by_index_or_are_cut_at_their_end(folder):
    long = TEXTS[3]
    with make(folder, max_tokens=80) as reranker:
        with pytest.raises(PartialResultError, match=r"1 of 5 inputs failed.*`scores`") as failed:
            reranker.score(QUERY, TEXTS)
        error = failed.value
        assert list(error.errors) == [3]
        assert isinstance(error.errors[3], InputTooLongError)
        assert np.isnan(error.scores[3])
        expected = score_float64(folder, QUERY, [text for text in TEXTS if text != long])
        np.testing.assert_allclose(np.delete(error.scores, 3), expected, atol=1e-5)
        with pytest.raises(InputTooLongError) as alone:
            reranker.score(QUERY, [long])
        assert (alone.value.index, alone.value.limit) == (0, 80)
        cut = reranker.with_options(truncate="END").score(QUERY, [long])
        tokenizer = reranker.load()._tokenizer._tokenizer
        ids = tokenizer.encode(f"question:{QUERY} \n \n passage:{long}").ids[:80]
        end = tokenizer.decode(ids, skip_special_tokens=True).split("passage:")[1]
        np.testing.assert_allclose(cut, score_float64(folder, QUERY, [end]), atol=1e-5)
    with pytest.raises(ValueError, match="'NONE' or 'END'"):
        make(folder, truncate="START")


def test_a_query_that_leaves_no_space_is_refused(folder, vl_folder):
    for model in (folder, vl_folder):
        with make(model, max_tokens=40, truncate="END") as reranker:
            with pytest.raises(InputTooLongError, match=r"the query has .* tokens") as failed:
                reranker.score(QUERY * 5, TEXTS)
            assert failed.value.index is None
            assert failed.value.limit == 40
    with make(vl_folder, max_tokens=44, truncate="END") as reranker:
        documents = [TEXTS[1], EmbeddingInput(image=page(1, 90, 40))]
        with pytest.raises(PartialResultError) as some:
            reranker.score(QUERY, documents)
        assert list(some.value.errors) == [1]
        assert "image of 15 tokens for a query of" in str(some.value.errors[1])


def test_an_unreadable_image_fails_alone(vl_folder):
    with make(vl_folder) as reranker:
        documents = [TEXTS[0], EmbeddingInput(image=b"no image"), TEXTS[1]]
        with pytest.raises(PartialResultError) as failed:
            reranker.score(QUERY, documents)
        assert list(failed.value.errors) == [1]
        assert isinstance(failed.value.errors[1], ImageError)
        expected = score_float64(vl_folder, QUERY, [TEXTS[0], TEXTS[1]])
        np.testing.assert_allclose(failed.value.scores[[0, 2]], expected, atol=1e-5)


def test_an_infinite_score_is_an_error(tmp_path):
    folder = build_reranker(tmp_path)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["score.weight"][:] = 3e38
    save_file(tensors, file, metadata={"format": "pt"})
    with make(folder) as reranker, pytest.raises(NonFiniteVectorError, match="NaN or infinite"):
        reranker.score(QUERY, TEXTS[:1])


def test_other_heads_and_temperatures_are_refused(tmp_path):
    folder = build_reranker(tmp_path / "zero", temperature=0.0)
    with pytest.raises(CheckpointError, match=r"temperature is 0\.0; expected a number greater"):
        make(folder).load()
    folder = build_reranker(tmp_path / "heads")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({**tensors, "score.weight": torch.ones(3, 64)}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"'score.weight' has shape \(3, 64\)"):
        make(folder).load()


def test_a_folder_of_the_other_task_names_the_class_to_use(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"is a reranker .* use shared_engine.Reranker"):
        Embedder(Options(model=str(folder), device="cpu")).load()
    embedder = build_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"is an embedding model .* shared_engine.Embedder"):
        make(embedder).load()
    for there in ({}, {"base_url": "http://127.0.0.1:9"}):
        name = "nvidia/llama-nemotron-rerank-vl-1b-v2"
        with pytest.raises(CheckpointError, match=f"{name} is a reranker"):
            Embedder(Options(model=name, **there)).load()
        name = "nvidia/llama-nemotron-embed-1b-v2"
        with pytest.raises(CheckpointError, match=f"{name} is an embedding model"):
            Reranker(RerankOptions(model=name, **there)).load()


def test_the_default_model_is_the_text_reranker():
    assert Reranker().model == "nvidia/llama-nemotron-rerank-1b-v2"
    assert [model.id for model in Reranker().list_models()] == [
        "nvidia/llama-nemotron-rerank-1b-v2",
        "nvidia/llama-nemotron-rerank-vl-1b-v2",
    ]


async def test_async_calls_threads_and_pickles_agree(folder):
    with make(folder) as reranker:
        expected = reranker.score(QUERY, TEXTS)
        np.testing.assert_array_equal(await reranker.ascore(QUERY, TEXTS), expected)
        assert await reranker.arank(QUERY, TEXTS, 2) == reranker.rank(QUERY, TEXTS, 2)
        many = await asyncio.gather(*(reranker.ascore(QUERY, TEXTS) for _ in range(10)))
        np.testing.assert_allclose(many, [expected] * 10, atol=1e-5)
        with pickle.loads(pickle.dumps(reranker)) as copy:
            assert copy.load() is reranker.load()
        with ThreadPoolExecutor(4) as pool:
            scored = list(pool.map(lambda _: reranker.score(QUERY, TEXTS), range(8)))
        np.testing.assert_allclose(scored, [expected] * 8, atol=1e-5)
    with pytest.raises(EngineClosedError):
        reranker.score(QUERY, TEXTS)


def test_tokens_are_counted(folder):
    with make(folder) as reranker, track_usage() as used:
        reranker.score(QUERY, TEXTS[:2])
        ids = reranker.load()._tokenizer.encode_pairs(QUERY, TEXTS[:2], "NONE")
    assert used.tokens == reranker.usage == sum(map(len, ids))


def test_no_documents_have_no_scores(folder):
    with make(folder) as reranker:
        assert reranker.score(QUERY, []).shape == (0,)


def test_options_of_vectors_are_unknown():
    for name, value in {"dimensions": 384, "embedding_type": "int8"}.items():
        with pytest.raises(ValueError, match=name):
            RerankOptions(**{name: value})
    with pytest.raises(ValueError, match="less than or equal to 512"):
        RerankOptions(max_batch_size=513)


def test_encoded_images_are_kept_for_the_next_query(vl_folder):
    documents = [EmbeddingInput(image=page(seed, 90, 40)) for seed in range(3)]
    with make(vl_folder) as kept, make(vl_folder, vision_cache_bytes=0) as without:
        counts: dict[Reranker, list[int]] = {}
        for reranker in (kept, without):
            encoder = reranker.load()._encoders[0]
            encode, counts[reranker] = encoder._vision, []

            def counting(tiles, on_pause, encode=encode, count=counts[reranker]):
                count.append(len(tiles))
                return encode(tiles, on_pause)

            encoder._vision = counting
        for query in (QUERY, "another query"):
            first = kept.score(query, documents)
            np.testing.assert_allclose(first, without.score(query, documents), atol=1e-5)
        assert (sum(counts[kept]), sum(counts[without])) == (3, 6)


def test_the_cache_of_images_is_bounded(vl_folder):
    documents = [EmbeddingInput(image=page(seed, 90, 40)) for seed in range(3)]
    rows = 4 * 3 * 64 * 4  # tokens per tile, tiles, values, bytes
    with make(vl_folder, vision_cache_bytes=2 * rows) as reranker:
        for _ in range(2):
            reranker.score(QUERY, documents)
        cache = reranker.load()._encoders[0]._vision_cache
        assert sum(rows.nbytes for rows in cache._rows.values()) == 2 * rows


def test_a_model_may_be_given_by_its_name_alone(folder):
    for kind, options in ((Embedder, Options), (Reranker, RerankOptions)):
        assert kind("some/model").options == options(model="some/model")
        assert kind(folder).options == options(model=str(folder))
        assert kind().options == options()
        with pytest.raises(ConfigurationError, match="the name of a model, got one dict"):
            kind({"model": "some/model"})
    with pytest.raises(ConfigurationError, match=r"expected RerankOptions\(...\) .* one Options"):
        Reranker(Options())
