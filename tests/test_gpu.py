"""What only a GPU can tell; `tests/benchmarks/README.md` has the command.

Runs on torch 2.10 and newer without the frameworks' packages, so that a borrowed machine will do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shared_engine import Embedder, EmbeddingInput, Options, Reranker, RerankOptions
from shared_engine.local import attention, elementwise
from shared_engine.local.attention import Layout
from shared_engine.local.device import select_devices
from tests.support.configs import config
from tests.support.rerankers import build_reranker, build_vl_reranker
from tests.support.vl_checkpoints import build_vl_checkpoint, page

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here"),
]
TEXTS = [f"text {i} " + "word " * (i * 37 % 300) for i in range(2000)]
LEAST_COSINE = {"float32": 0.999999, "bfloat16": 0.999, "float16": 0.9999}


@pytest.fixture(scope="module")
def on_cpu(checkpoint: Path) -> np.ndarray:
    with Embedder(Options(model=checkpoint, device="cpu", dtype="float32")) as embedder:
        return embedder.embed(TEXTS)


@pytest.fixture(scope="module")
def embedder(checkpoint: Path) -> Iterator[Embedder]:
    with Embedder(Options(model=checkpoint, device="cuda", dtype="bfloat16")) as made:
        made.embed(TEXTS[:50])  # whatever is done once
        yield made


def test_memory_is_released_at_a_close(checkpoint):
    """But for the workspaces of cuBLAS: torch keeps them, before 2.13 one for each model."""
    options = Options(model=checkpoint, device="cuda", max_batch_tokens=2**19)
    used = []
    for _ in range(2):
        with Embedder(options) as embedder:
            embedder.embed(TEXTS[:100])
            used.append(torch.cuda.memory_reserved())
        used.append(torch.cuda.memory_reserved())
    while_open, after, _, later = used
    assert while_open - after > 2**27
    assert later - after <= 2**25 + 2**21


def test_the_choice_is_the_fast_one(embedder):
    """Printed, so that a run says what it measured; on a card before Ampere it is another."""
    print(embedder.description)
    if torch.cuda.get_device_capability() >= (8, 0):
        assert "varlen flash kernel" in embedder.description
        assert "Triton's kernels;" in embedder.description
        assert "CUDA graphs for up to 128 tokens" in embedder.description


@pytest.mark.parametrize("dtype", list(LEAST_COSINE))
def test_two_thousand_texts_as_on_a_cpu(checkpoint, on_cpu, dtype):
    with Embedder(Options(model=checkpoint, device="cuda", dtype=dtype)) as embedder:
        assert (embedder.embed(TEXTS) * on_cpu).sum(1).min() >= LEAST_COSINE[dtype]


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-3), ("bfloat16", 0.2)])
@pytest.mark.parametrize("build", [build_reranker, build_vl_reranker])
def test_scores_as_on_a_cpu(tmp_path, build, dtype, most):
    """Of a single short pair by a graph, and of images that the second query finds encoded."""
    documents: list[Any] = TEXTS[:50]
    if build is build_vl_reranker:
        documents += [EmbeddingInput(image=page(seed, 32, 32)) for seed in range(5)]
    options = RerankOptions(model=build(tmp_path / "reranker"), device="cpu", dtype="float32")
    with Reranker(options) as cpu, Reranker(options.replace(device="cuda", dtype=dtype)) as gpu:
        for query in ("a search", "another one"):
            expected = cpu.score(query, documents)
            assert np.abs(gpu.score(query, documents) - expected).max() <= most
            assert np.abs(gpu.score(query, documents[:1]) - expected[:1]).max() <= most


def test_no_step_waits_for_the_device(embedder):
    """Every operator that synchronises raises; waiting for the event of a step does not count."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        embedder.embed(TEXTS)
        embedder.embed(["a search"], role="query")
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_memory_does_not_grow_with_the_steps(embedder):
    for _ in range(2):
        embedder.embed(TEXTS)
    before = torch.cuda.memory_reserved()
    for seed in range(5):
        embedder.embed(list(np.random.default_rng(seed).permutation(TEXTS)))
    assert torch.cuda.memory_reserved() <= before * 1.05


def test_memory_that_runs_out_halves_the_step(checkpoint, on_cpu):
    """True exhaustion: the process may have only a little more than it holds."""
    options = Options(model=checkpoint, device="cuda", dtype="float32", max_batch_tokens=65_536)
    with Embedder(options) as embedder:
        embedder.embed(TEXTS[:4])
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        allowed = torch.cuda.memory_reserved() + 2**26
        torch.cuda.set_per_process_memory_fraction(allowed / total)
        try:
            assert (embedder.embed(TEXTS) * on_cpu).sum(1).min() >= 0.99999
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


@pytest.mark.parametrize("name", ["varlen", "efficient"])
@pytest.mark.parametrize("lengths", [[1], [1] * 40, [8192], [8192, 3, 500], list(range(1, 200))])
def test_attention_at_the_edges(name, lengths):
    if name != "efficient" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("flash needs compute capability 8.0")
    torch.manual_seed(0)
    made = torch.randn(sum(lengths), 48, 64, device="cuda", dtype=torch.bfloat16)  # as qkv lies
    q, k, v = made.split([32, 8, 8], dim=1)
    ends = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32, device="cuda")
    layout = Layout(lengths, ends)
    exact = attention.per_sequence(q.float(), k.float(), v.float(), layout)
    kernel = getattr(attention, name)
    got = kernel(q, k, v, layout)
    assert got.is_contiguous()
    assert (got.float() - exact).norm() / exact.norm() < 1e-2
    assert torch.equal(got, kernel(q, k, v, layout))  # to the last bit


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_fused_kernels_are_torchs_operators_at_scale(dtype):
    (placement,) = select_devices("cuda", dtype, None, config("300M"))
    assert placement.elementwise is not elementwise.EAGER, placement.reasons
    torch.manual_seed(0)
    kind, most = placement.dtype, 1e-5 if dtype == "float32" else 2e-2
    tokens = 20_000
    cos, sin = (torch.randn(tokens, 32, device="cuda").to(kind) for _ in "cs")
    qkv = torch.randn(tokens, 48, 64, device="cuda").to(kind)
    ours, expected = qkv.clone(), qkv.float()
    ours = placement.elementwise.rotate(ours[:, :40], cos, sin, ours.new_empty)
    expected = elementwise.rotate(expected[:, :40], cos.float(), sin.float(), expected.new_empty)
    torch.testing.assert_close(ours.float(), expected, atol=most, rtol=most)
    gate_up = torch.randn(tokens, 2 * 3840, device="cuda").to(kind)
    expected = elementwise.gate(gate_up.float())
    ours = placement.elementwise.gate(gate_up)
    torch.testing.assert_close(ours.float(), expected, atol=most, rtol=most)


def test_queries_with_and_without_graphs_have_equal_vectors(embedder):
    encoder: Any = embedder.load()._encoders[0]
    if encoder._graphs is None:
        pytest.skip(embedder.description)
    queries = [" ".join(["word"] * n) for n in (1, 5, 12, 30, 60, 100, 120)]
    by_graph = np.concatenate([embedder.embed([query], role="query") for query in queries])
    kept, encoder._graphs = encoder._graphs, None
    try:
        without = np.concatenate([embedder.embed([query], role="query") for query in queries])
    finally:
        encoder._graphs = kept
    assert (by_graph * without).sum(1).min() >= 0.9999


def test_a_graph_is_unchanged_after_another_engine_was_closed(embedder, checkpoint):
    """Which gives memory back that a graph would replay over if nobody kept it."""
    queries = [" ".join(["word"] * n) for n in (1, 9, 25, 50, 90)]
    before = np.concatenate([embedder.embed([query], role="query") for query in queries])
    with Embedder(Options(model=checkpoint, device="cuda", max_tokens=333)) as other:
        other.embed(queries, role="query")
    torch._C._cuda_clearCublasWorkspaces()  # as torch.compile(mode="reduce-overhead") does
    overwritten = [torch.full((2**n,), 1.5, device="cuda") for n in range(4, 24)]
    embedder.embed(TEXTS)
    after = np.concatenate([embedder.embed([query], role="query") for query in queries])
    assert (before * after).sum(1).min() >= 0.9999
    assert all((x == 1.5).all() for x in overwritten)


def test_every_gpu_has_the_same_kernels_and_vectors(checkpoint):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU here")
    vectors = []
    for device in ("cuda:0", "cuda:1"):
        with Embedder(Options(model=checkpoint, device=device)) as embedder:
            assert "Triton's kernels;" in embedder.description
            vectors.append(embedder.embed(TEXTS[:200]))
    assert (vectors[0] * vectors[1]).sum(1).min() >= 0.9999


def test_a_vector_depends_on_its_batch_to_rounding_only(embedder):
    """Matrix products of other numbers of rows may sum in another order; nothing else differs."""
    texts = TEXTS[:64]
    alone = np.concatenate([embedder.embed([text]) for text in texts])
    for batch in (TEXTS[:64], TEXTS[:200], TEXTS):
        assert (embedder.embed(batch)[:64] * alone).sum(1).min() >= 0.9999


def test_a_search_does_not_depend_on_a_concurrent_ingest(embedder):
    alone = embedder.embed(["what is asked"], role="query")
    stop = threading.Event()

    def ingest() -> None:
        while not stop.is_set():
            embedder.embed(TEXTS)

    thread = threading.Thread(target=ingest)
    thread.start()
    try:
        for _ in range(50):
            assert (embedder.embed(["what is asked"], role="query") * alone).sum() > 0.9999
            time.sleep(0.01)
    finally:
        stop.set()
        thread.join()


def test_no_number_of_tiles_delays_a_step(tmp_path):
    """The first step of a number of tiles is about as fast as the second: cuDNN plans no more.

    It plans for heads of a multiple of 8 only; these have 72, as the public model has.
    """
    shape = {"image_size": 512, "patch_size": 16, "vision_hidden_size": 144, "vision_heads": 2}
    folder = build_vl_checkpoint(tmp_path / "vl", **shape)
    options = Options(model=folder, device="cuda", dtype="bfloat16", max_tiles=1)
    with Embedder(options) as embedder:
        documents = [EmbeddingInput(image=page(seed, 512, 512)) for seed in range(32)]

        def seconds(count: int) -> float:
            start = time.perf_counter()
            embedder.embed(documents[:count])
            return time.perf_counter() - start

        for count in (1, 3, 5, 7, 11, 13, 19, 23, 29, 31):
            first, *later = [seconds(count) for _ in range(4)]
            assert first <= 3 * min(later) + 0.02, f"{count} tiles: {first:.3f} s, then {later}"
