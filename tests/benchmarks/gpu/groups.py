"""What is measured: a function for each group of `run.py`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray

from shared_engine import Embedder, EmbeddingInput, Reranker, RerankOptions, images
from shared_engine.local import attention, elementwise
from shared_engine.local.attention import Layout
from tests.benchmarks import measuring, search_latency, suite
from tests.benchmarks.gpu import fp8_steps
from tests.benchmarks.gpu.bench import CORPORA, Bench
from tests.support.rerankers import TEXT, add_head
from tests.support.vl_checkpoints import page

ROOT = Path(__file__).parents[3]

# The machine.


def measure_machine(bench: Bench) -> None:
    """The card, and the most that it gives: copies, products of the models' shapes, attention."""
    if not bench.is_tiny:
        card = torch.cuda.get_device_properties(0)
        bench.add("card", f"{card.name}, {card.multi_processor_count} SMs, {card.total_memory} B")
        query = "driver_version,clocks.sm,clocks.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        with bench.attempt("nvidia-smi"):
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
            bench.add("nvidia-smi", done.stdout.strip())
        bench.add("C compiler, for Triton", shutil.which("gcc"))
    size = 2**16 if bench.is_tiny else 2**31
    source, target = (torch.empty(size, dtype=torch.int8, device=bench.device) for _ in range(2))
    seconds = bench.time_on_device(target.copy_, source)
    bench.add("copy", 2 * size / seconds / 1e12, "TB/s")
    shapes = {
        "square": (8192, 8192),
        "300m qkv": (2048, 3072),
        "300m gate_up": (2048, 7680),
        "300m down": (3840, 2048),
        "1b gate_up": (2048, 16_384),
        "1b down": (8192, 2048),
        "tower qkv": (1152, 3456),
        "tower down": (4304, 1152),
    }
    rows, fastest = 64 if bench.is_tiny else 16_384, 0.0
    for name, shape in shapes.items():
        k, n = (size // 32 if bench.is_tiny else size for size in shape)
        x, weight = draw(bench, rows, k), draw(bench, n, k)
        tflop = 2 * rows * k * n / 1e12
        tflops = tflop / bench.time_on_device(torch.mm, x, weight.T)
        bench.add(f"product, {name}", tflops, "TFLOP/s")
        fastest = max(fastest, tflops)
        with bench.attempt(f"product in fp8, {name}"):
            ours, theirs = fp8_steps.quantize(x), fp8_steps.quantize(weight)
            seconds = bench.time_on_device(fp8_steps.multiply, ours, theirs, bench.dtype)
            bench.add(f"product in fp8, {name}", tflop / seconds, "TFLOP/s")
    (bench.scratch / "peak").write_text(str(fastest * 1e12))
    kernel = attention.per_sequence if bench.is_tiny else attention.varlen
    for corpus, title in CORPORA.items():
        counts = bench.lengths(corpus, 512 if bench.is_tiny else 16_384)
        q, k, v = draw(bench, counts.sum(), 48, 64).split([32, 8, 8], dim=1)
        ends = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32, device=bench.device)
        layout = Layout(counts.tolist(), ends)
        tflop = 4 * 32 * 64 * float((counts.astype(float) ** 2).sum()) / 1e12
        with bench.attempt(f"attention, {title}"):
            seconds = bench.time_on_device(kernel, q, k, v, layout)
            bench.add(f"attention, {title}", tflop / seconds, "TFLOP/s")


def draw(bench: Bench, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=bench.device).to(bench.dtype)


def measure_tests(bench: Bench) -> None:
    """Run the tests that need a GPU. After an illegal access all others of a process fail, too."""
    files = ["tests/test_gpu.py"]
    names = ("llama", "siglip", "cut_on_device", "ministral", "pixtral")
    files += [f"tests/local/test_{name}.py" for name in names]
    options = ["-q", "-o", "filterwarnings=default", "-p", "no:cacheprovider", "--tb=short"]
    options += ["--continue-on-collection-errors", "-m", "gpu"]
    if bench.is_tiny:
        files, options[-1] = ["tests/local/test_pooling.py"], "not slow"
    log = bench.results.with_name("tests.txt")
    command = [sys.executable, "-m", "pytest", *options]

    def run(names: list[str]) -> list[str]:
        with log.open("a") as file:
            start = file.tell()
            subprocess.run([*command, *names], cwd=ROOT, stdout=file, stderr=file, check=False)
        return log.read_text()[start:].splitlines()

    log.unlink(missing_ok=True)
    lines = run(files)
    failed = [line.split()[1] for line in lines if line.startswith(("FAILED ", "ERROR "))]
    bench.add("summary", lines[-1] if lines else "pytest printed nothing")
    bench.add("failed", len(failed) if lines and "passed" in lines[-1] else len(failed) + 1)
    for name in failed[:6]:
        bench.add(f"again, alone: {name}", run([name])[-1])


# Texts.


def measure_300m(bench: Bench) -> None:
    measure_texts(bench, "300m")


def measure_1b(bench: Bench) -> None:
    measure_texts(bench, "1b")
    with bench.attempt("rerank"):
        measure_rerank(bench)


def measure_rerank(bench: Bench) -> None:
    """Score candidates with the same weights and a head."""
    folder = Path(shutil.copytree(bench.checkpoint("1b"), bench.scratch / "reranker"))
    add_head(folder, {"architectures": [TEXT]})
    candidates = bench.source.texts([256] * 40)
    dtype: Any = str(bench.dtype).removeprefix("torch.")
    options = RerankOptions(model=str(folder), device=str(bench.device), dtype=dtype)
    with Reranker(options) as reranker:
        seconds = bench.time(reranker.score, "which of them answers a question?", candidates)
        bench.add("rerank 40 candidates of 256 tokens", seconds * 1e3, "ms")


def measure_texts(bench: Bench, kind: str) -> None:
    """Steps as the device sees them, texts as a user gives them, searches, and what helps."""
    bench.checkpoint(kind)
    start = time.perf_counter()
    embedder = bench.open(kind)
    bench.add("loading", time.perf_counter() - start, "s")
    bench.add("description", embedder.description)
    encoder = embedder.load()._encoders[0]
    with bench.attempt("steps"):
        measure_steps(bench, kind, encoder)
    with bench.attempt("searches"):
        measure_searches(bench, embedder, encoder)
    with bench.attempt("texts"):
        measure_rates(bench, embedder, "")
    with bench.attempt("profile"):
        counts = bench.lengths("uniform", encoder._max_batch_tokens)
        sequences = bench.sequences(counts)
        profile(bench, encoder, sequences)
    with bench.attempt("variants"):
        measure_variants(bench, kind, encoder)
    if not bench.is_tiny:
        bench.add("peak memory", torch.cuda.max_memory_allocated() / 1e9, "GB")
    embedder.close()
    for tokens in (8_192, 32_768) if kind == "300m" else ():
        with bench.attempt(f"steps of {tokens:,} tokens"):
            other = bench.open(kind, max_batch_tokens=tokens)
            measure_rates(bench, other, f", steps of {tokens:,}", ["skewed"])
            other.close()


def measure_steps(bench: Bench, kind: str, encoder: Any, suffix: str = "") -> None:
    """Add the rate of full steps of each kind of text."""
    for corpus, title in CORPORA.items():
        counts = bench.lengths(corpus, encoder._max_batch_tokens)
        sequences = bench.sequences(counts)
        seconds = bench.time_on_device(encoder, sequences)
        bench.add_rate(f"step, {title}{suffix}", counts, seconds)
        if corpus == "uniform" and not suffix:
            bench.add("full step", seconds * 1e3, "ms")
            work = measuring.text_work(bench.config(kind), counts)
            add_share(bench, f"step, {title}", work / seconds)


def add_share(bench: Bench, name: str, flops: float) -> None:
    """Add FLOP/s as a share of the fastest product, if the group "machine" measured that."""
    peak = bench.scratch / "peak"
    if peak.exists():
        bench.add(f"{name}, share of the peak", flops / float(peak.read_text()))


def measure_variants(bench: Bench, kind: str, encoder: Any) -> None:
    """Change one thing at a time."""
    eager = {"rotate": elementwise.EAGER.rotate, "gate": elementwise.EAGER.gate}
    changes = {"torch's operators": eager}
    if not bench.is_tiny:
        changes["memory-efficient attention"] = {"attend": attention.efficient}
    for change, values in changes.items():
        with bench.attempt(change), mock.patch.multiple(encoder._layers, **values):
            measure_steps(bench, kind, encoder, f", {change}")


def measure_rates(
    bench: Bench, embedder: Embedder, suffix: str, corpora: Any = tuple(CORPORA)
) -> None:
    """Add the rate of texts in and vectors out, as a user calls it."""
    for corpus in corpora:
        texts, counts = bench.texts(corpus, 400_000)
        embedder.embed(texts[: len(texts) // 4 + 1])
        seconds = bench.time(embedder.embed, texts)
        bench.add_rate(f"texts, {CORPORA[corpus]}{suffix}", counts, seconds)


def measure_searches(bench: Bench, embedder: Embedder, encoder: Any) -> None:
    """Time queries of 32 tokens alone, without a graph, and during an ingest."""
    count = 20 if bench.is_tiny else 200
    queries = bench.source.texts([32] * count, "query", seed=1)

    def ask(query: str) -> NDArray[np.float32]:
        vector: NDArray[np.float32] = embedder.embed([query], role="query")[0]
        return vector

    def add(name: str, seconds: list[float]) -> None:
        for percent in (50, 99):
            bench.add(f"{name}, p{percent}", np.percentile(seconds, percent) * 1e3, "ms")

    add("query alone", [seconds_of(ask, query) for query in queries])
    with mock.patch.object(encoder, "_graphs", None):
        ask(queries[0])
        add("query without graph", [seconds_of(ask, query) for query in queries])
    documents, counts = bench.texts("skewed", 150_000)

    def ingest() -> int:
        embedder.embed(documents)
        return int(counts.sum())

    contender = search_latency.Contender(measuring.OURS, ask, ingest, tolerance=0.02)
    contender.run_round(queries, np.random.default_rng(0).uniform(0, 0.02, count), ingest())
    figures = contender.summarize(step=0.02)
    bench.add("query during an ingest, p50", figures["during"]["p50"] * 1e3, "ms")
    bench.add("query during an ingest, p99", figures["during"]["p99"] * 1e3, "ms")
    bench.add("the ingest keeps", figures["kept"])


def seconds_of(ask: Callable[[str], Any], query: str) -> float:
    start = time.perf_counter()
    ask(query)
    return time.perf_counter() - start


def profile(bench: Bench, encoder: Any, *step: Any) -> None:
    """Add the kernels of a step that take longest: share, calls and microseconds of each."""
    kind = torch.profiler.ProfilerActivity
    activity, clock = (kind.CPU, "cpu") if bench.is_tiny else (kind.CUDA, "device")
    encoder(*step).numpy()
    with torch.profiler.profile(activities=[activity]) as profiler:
        encoder(*step).numpy()
        measuring.synchronise(bench.device)
    events = [
        (getattr(e, f"self_{clock}_time_total"), e.count, e.key) for e in profiler.key_averages()
    ]
    total = sum(us for us, _, _ in events) or 1.0
    events.sort(reverse=True)
    bench.add("kernels of a step", total / 1e3, "ms")
    for us, count, name in events[:15]:
        bench.add(f"kernel {name[:80]}", f"{us / total:.1%}, {count} times, {us:.0f} us")


# Pages.


def measure_pages(bench: Bench) -> None:
    """Pages per second at 1 and 7 tiles: as a user gives them, decoded alone, and as steps."""
    width, height = (64, 80) if bench.is_tiny else (1275, 1650)
    files = [bench.scratch / f"page {seed}.png" for seed in range(2 if bench.is_tiny else 16)]

    def write(seed: int) -> None:
        page(seed, width, height).save(files[seed])

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(write, range(len(files))))
    for max_tiles, copies in ((1, 16), (6, 3)):
        many = [EmbeddingInput(image=file) for file in files * (1 if bench.is_tiny else copies)]
        with bench.open("vl", max_tiles=max_tiles) as embedder:
            backend: Any = embedder.load()
            encoder, vision = backend._encoders[0], backend._vision
            prepare = images.cut_tiles if bench.is_tiny else images.decode_picture
            pictures = [prepare(file, max_tiles, vision.tile_size) for file in files]
            name = "1 tile" if max_tiles == 1 else f"{len(pictures[0])} tiles"
            embedder.embed(many[: len(files)])
            seconds = bench.time(embedder.embed, many)
            bench.add(name, len(many) / seconds, "pages/s")
            work = measuring.image_work(bench.config("vl"), len(pictures[0]))
            add_share(bench, name, work * len(many) / seconds)
            bench.add(f"{name}, decoding alone", decode_rate(bench, files, vision), "pages/s")
            some = pictures[: 8 if max_tiles == 1 else 1]
            encode = backend._tokenizer.encode_with_image
            ids = [encode(picture, "", "NONE") for picture in some]
            seconds = bench.time_on_device(encoder, ids, some)
            bench.add(f"{name}, a step", len(some) / seconds, "pages/s")
            if max_tiles > 1:
                with bench.attempt("profile"):
                    profile(bench, encoder, ids, some)


def decode_rate(bench: Bench, files: list[Path], vision: Any) -> float:
    """Return how many pages per second the host decodes."""

    def decode(file: Path) -> Any:
        return images.decode_picture(file, vision.max_tiles, vision.tile_size)

    with ThreadPoolExecutor(16) as pool:
        return len(files) / bench.time(lambda: list(pool.map(decode, files)))


# Others.


def measure_peers(bench: Bench) -> None:
    """sentence-transformers on the same weights, padded, and without padding by flash attention."""
    texts, counts = bench.texts("skewed", 200_000)
    folder = measuring.peer_folder(bench.checkpoint("300m"), bench.scratch / "peer")
    prompt = bench.source.prompts["document"]
    with bench.open("300m") as embedder:
        expected = embedder.embed(texts[:64])
        embedder.embed(texts)
        ours = bench.time(embedder.embed, texts)
    ways = {"padded": ("sdpa", (32, 128))}
    if not bench.is_tiny:
        ways["without padding"] = ("flash_attention_2", (64, 256))
    fastest = float("inf")
    for way, (kernel, sizes) in ways.items():
        with bench.attempt(way):
            model = measuring.sentence_transformer(folder, str(bench.device), bench.dtype, kernel)

            def encode(some: list[str], size: int, model: Any = model) -> NDArray[np.float32]:
                out: NDArray[np.float32] = model.encode(
                    some, prompt=prompt, batch_size=size, normalize_embeddings=True
                )
                return out

            cosine = float((encode(texts[:64], 32) * expected).sum(1).min())
            if not cosine > measuring.LEAST_COSINE[bench.dtype]:
                raise ValueError(f"its vectors are others: cosine {cosine}")
            seconds = min(bench.time(encode, texts, size) for size in sizes)
            bench.add_rate(f"sentence-transformers, {way}", counts, seconds)
            fastest = min(fastest, seconds)
    bench.add("times sentence-transformers", fastest / ours)


def measure_fresh(bench: Bench) -> None:
    """A fresh process until its first vector, without and with Triton's cache."""
    texts = bench.scratch / "texts.json"
    texts.write_text(json.dumps(["a text of some words"] * 64))
    arguments = ["ours", str(bench.checkpoint("300m")), str(texts), "--device", str(bench.device)]
    with mock.patch.dict("os.environ", {"TRITON_CACHE_DIR": str(bench.scratch / "triton")}):
        for name in ("first vector", "first vector, kernels cached"):
            bench.add(name, suite.cold(arguments)["ready"], "s")


def measure_fp8(bench: Bench) -> None:
    """Steps whose products are in fp8: their rate, and how far their vectors are from ours.

    A GPU before compute capability 8.9 has none.
    """
    with bench.open("300m") as embedder, bench.attempt("fp8"):
        encoder: Any = embedder.load()._encoders[0]
        counts = bench.lengths("skewed", encoder._max_batch_tokens)
        sequences = bench.sequences(counts)
        expected = encoder(sequences).numpy()
        with fp8_steps.use_fp8(encoder):
            vectors = encoder(sequences).numpy()
            cosines = (vectors * expected).sum(1)
            cosines /= np.linalg.norm(vectors, axis=1) * np.linalg.norm(expected, axis=1)
            bench.add("least cosine", float(cosines.min()))
            bench.add("mean cosine", float(cosines.mean()))
            measure_steps(bench, "300m", encoder, "")
