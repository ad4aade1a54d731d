"""What the benchmarks share: text of so many tokens, contenders on the same weights, a fair race.

A race runs every contender once a round, in turn, so that a machine whose speed drifts drifts for
all; figures are medians over the rounds, ratios those within a round. Tokens computed are counted
where they enter the layers, padding included, and everybody's vectors are compared with ours.
"""

from __future__ import annotations

import ast
import importlib.util
import itertools
import json
import platform
import shutil
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from shared_engine import Embedder, Options
from shared_engine.documents import Role
from shared_engine.local.checkpoint import resolve
from tests.support.checkpoints import (
    BOS,
    EOS,
    PROMPTS,
    TRUE_300M,
    Shape,
    build_checkpoint,
    write_tokenizer,
)
from tests.support.checkpoints import tokenizer as tiny_tokenizer
from tests.support.vl_checkpoints import TRUE_VL, build_vl_checkpoint

OURS, PEER = "this engine", "sentence-transformers"
LEAST_COSINE = {torch.float32: 0.9999, torch.bfloat16: 0.98, torch.float16: 0.98}
"""Of a contender's vectors to ours: below it, somebody computes something else."""
Config = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What every contender computes, and where."""

    config: Config
    """Of the language model."""
    device: torch.device
    dtype: torch.dtype


@cache
def words() -> list[str]:
    """Return the words of the standard library's docstrings, in order."""
    out: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8", errors="replace"))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                out += (ast.get_docstring(node) or "").split()
    return out


class Source:
    """Real text, cut to the number of tokens that a checkpoint's tokenizer makes of it."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.prompts = resolve(Options(model=folder)).prompts
        encodings = self._tokenizer.encode_batch_fast(
            [f" {word}" for word in words()], add_special_tokens=False
        )
        self._ends = np.cumsum([len(encoding.ids) for encoding in encodings])

    def texts(self, lengths: Iterable[int], role: Role = "document", seed: int = 0) -> list[str]:
        """Return a text for each length; prefix and special tokens count."""
        rng = np.random.default_rng(seed)
        return [self._text(int(length), role, rng) for length in lengths]

    def _text(self, tokens: int, role: Role, rng: np.random.Generator) -> str:
        last = int(np.searchsorted(self._ends, self._ends[-1] - tokens))
        start = int(rng.integers(0, last))
        stop = int(np.searchsorted(self._ends, self._ends[start] + tokens))
        kept = words()[start:stop]
        while over := len(self._tokenizer.encode(self.prompts[role] + " ".join(kept)).ids) - tokens:
            kept = kept[: -max(1, over // 8)] if over > 0 else [*kept, *["a"] * -over]
        return " ".join(kept)


def lengths(kind: str, count: int) -> NDArray[np.int64]:
    """Return how many tokens the texts of a corpus have."""
    rng = np.random.default_rng(0)
    drawn: NDArray[Any] = {
        "skewed": np.clip(np.exp(rng.normal(np.log(110), 0.8, count)), 16, 512),
        "short": rng.integers(8, 33, count),
        "uniform": np.full(count, 512),
        "long": np.full(count, 8192),
    }[kind]
    return drawn.astype(np.int64)


def text_checkpoint(folder: Path, layers: int, like: Shape = TRUE_300M) -> Path:
    """Write random weights of the 300M or another model's widths, with a tokenizer of its kind.

    A byte-level BPE of 32,000 entries with Llama 3's split, trained on the text of the benchmarks:
    it makes about as many tokens of a word, and takes about as long, as the true one.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers

    tiny = tiny_tokenizer()
    made = Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer, made.decoder = tiny.pre_tokenizer, tiny.decoder
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=31_998, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator([" ".join(words())], trainer)
    made.add_special_tokens([BOS, EOS])
    bos, eos = made.token_to_id(BOS), made.token_to_id(EOS)
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, bos)]
    )
    shape = replace(
        like,
        num_hidden_layers=layers,
        prompts=PROMPTS,
        config={"bos_token_id": bos, "eos_token_id": eos},
    )
    build_checkpoint(folder, shape)
    write_tokenizer(folder, made, shape.max_position_embeddings)
    return folder


def image_checkpoint(folder: Path, vision_layers: int, layers: int) -> Path:
    """Write random weights of the 1.7B model's widths, with so many layers and a tiny vocabulary.

    Of the true shape are 27 layers in the tower and 16 after it.
    """
    text = replace(TRUE_VL.text, num_hidden_layers=layers, vocab_size=None)
    return build_vl_checkpoint(folder, replace(TRUE_VL, text=text, vision_layers=vision_layers))


def text_work(config: Config, tokens: NDArray[np.int64]) -> float:
    """Return the FLOPs of the linear layers and attention over sequences of these token counts."""
    hidden, inner, heads = (
        config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")
    )
    d = config.get("head_dim") or hidden // heads
    kv = config.get("num_key_value_heads") or heads
    layer = 2 * hidden * d * (heads + kv) + 3 * hidden * inner
    per_text = 2.0 * layer * tokens + 4.0 * heads * d * tokens.astype(float) ** 2
    return float(config["num_hidden_layers"] * per_text.sum())


def image_work(config: Config, tiles: int) -> float:
    """Return the FLOPs of the tower and the language model over an image of so many tiles."""
    vision = config["vision_config"]
    hidden, inner = vision["hidden_size"], vision["intermediate_size"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    layer = 2 * patches * (4 * hidden**2 + 2 * hidden * inner) + 4 * patches**2 * hidden
    tower = tiles * vision["num_hidden_layers"] * layer
    return float(tower) + text_work(config["llm_config"], np.array([tiles * patches // 4 + 8]))


def gemm_peak(setting: Setting) -> float:
    """Return the most FLOP/s of a matrix product: of the shapes of the model's MLP, or square."""
    hidden, inner = setting.config["hidden_size"], setting.config["intermediate_size"]
    device = setting.device
    shapes = [(hidden, 2 * inner), (inner, hidden)]
    rows, enough = (1024, 2048), 4e10
    if device.type == "cuda":
        shapes.append((8192, 8192))
        rows, enough = (8192, 16_384), 4e13
    best = 0.0
    for m, (k, n) in itertools.product(rows, shapes):
        x = torch.randn(m, k, device=device, dtype=setting.dtype)
        weight = torch.randn(n, k, device=device, dtype=setting.dtype)
        repeats = max(1, int(enough / (2 * m * k * n)))
        for _ in range(2):  # the first to warm up
            synchronise(device)
            start = time.perf_counter()
            for _ in range(repeats):
                F.linear(x, weight)
            synchronise(device)
            seconds = time.perf_counter() - start
        best = max(best, 2 * m * k * n * repeats / seconds)
    return best


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """Return what the device is called, of a CPU with its cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(named, platform.machine())}, {torch.get_num_threads()} threads"


class Timed:
    """A callable with a stopwatch, in place of what it calls."""

    def __init__(self, call: Callable[..., Any], device: torch.device) -> None:
        self.inner, self._device = call, device
        self.spans: list[float] = []
        """Seconds of each call."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call, and wait for the device."""
        start = time.perf_counter()
        try:
            out = self.inner(*args, **kwargs)
            synchronise(self._device)
            return out
        finally:
            self.spans.append(time.perf_counter() - start)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)


@dataclass(frozen=True)
class Contender:
    """A way to embed texts."""

    name: str
    run: Callable[[list[str]], NDArray[np.float32]]
    computed: Callable[[], int]
    """Tokens that have entered its layers so far."""


def ours(embedder: Embedder, name: str = OURS) -> Contender:
    """Return the engine as a user calls it."""
    encoder: Any = embedder.load()._encoders[0]  # type: ignore[attr-defined]
    forward, computed = encoder._forward, 0

    def counted(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        nonlocal computed
        computed += len(x)
        out: torch.Tensor = forward(x, *rest)
        return out

    encoder._forward = counted
    return Contender(name, embedder.embed, lambda: computed)


def variants(options: Options, embedder: Embedder, steps: Sequence[int]) -> list[Contender]:
    """Return the engine as it is, and with other steps."""
    made = [ours(embedder)]
    for step in steps:
        other = Embedder(options.model_copy(update={"max_batch_tokens": step}))
        made.append(ours(other, f"steps of {step:,} tokens"))
    return made


def peer_folder(folder: Path, copy: Path) -> Path:
    """Make a checkpoint one that transformers reads as a Llama without causal mask."""
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    for weights in folder.glob("*.safetensors"):
        (copy / weights.name).symlink_to(weights.resolve())
    config = json.loads((copy / "config.json").read_text())
    config.pop("auto_map", None)
    config |= {"model_type": "llama", "architectures": ["LlamaModel"], "is_causal": False}
    (copy / "config.json").write_text(json.dumps(config | {"use_cache": False}))
    return copy


def sentence_transformer(
    folder: Path, device: str, dtype: torch.dtype, kernel: str | None = None
) -> Any:
    """Return a SentenceTransformer with an attention kernel: flash, so unpadded, if installed."""
    from sentence_transformers import SentenceTransformer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    flash = device.startswith("cuda") and importlib.util.find_spec("flash_attn") is not None
    kernel = kernel or ("flash_attention_2" if flash else "sdpa")
    kwargs = {"dtype": dtype, "attn_implementation": kernel}
    return SentenceTransformer(str(folder), device=device, model_kwargs=kwargs)


def peers(theirs: Any, prompt: str, batch_sizes: Sequence[int], padded: int) -> list[Contender]:
    """Return sentence-transformers at these batch sizes, and transformers padded at one.

    transformers takes the texts as they come. All share the model of `theirs`.
    """
    model, tokenizer = theirs[0].auto_model, theirs.tokenizer
    computed = 0

    def count(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal computed
        computed += args[0].shape[:-1].numel()  # of (batch, longest, hidden)

    model.layers[0].register_forward_pre_hook(count)

    def encode(size: int) -> Callable[[list[str]], NDArray[np.float32]]:
        return lambda texts: theirs.encode(
            texts, prompt=prompt, batch_size=size, normalize_embeddings=True
        )

    @torch.inference_mode()
    def transformers(texts: list[str]) -> NDArray[np.float32]:
        out = []
        for start in range(0, len(texts), padded):
            batch = [prompt + text for text in texts[start : start + padded]]
            inputs = tokenizer(batch, padding=True, return_tensors="pt").to(model.device)
            states = model(**inputs).last_hidden_state.float()  # (batch, longest, hidden)
            mask = inputs["attention_mask"][..., None]
            means = (states * mask).sum(1) / mask.sum(1)
            out.append(F.normalize(means, dim=-1).cpu().numpy())
        return np.concatenate(out)

    made = [Contender(f"{PEER}, batch {n}", encode(n), lambda: computed) for n in batch_sizes]
    return [
        *made,
        Contender(f"transformers padded, batch {padded}", transformers, lambda: computed),
    ]


def race(
    contenders: list[Contender],
    texts: list[str],
    tokens: NDArray[np.int64],
    rounds: int,
    setting: Setting,
) -> dict[str, Any]:
    """Run the rounds; the first contender's vectors are those that all must have.

    Raises:
        ValueError: a contender gives other vectors.
    """
    gpu = setting.device.type == "cuda"
    running = []
    for contender in contenders:
        try:
            contender.run(texts if gpu else [texts[0][:200]])
            running.append(contender)
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
    seconds: dict[str, list[float]] = {contender.name: [] for contender in running}
    vectors: dict[str, NDArray[np.float32]] = {}
    computed: dict[str, int] = {}
    peaks = []
    for number in range(rounds):
        peaks.append(gemm_peak(setting))
        first = number % len(running)  # nobody is always the first, or always after the same one
        for contender in running[first:] + running[:first]:
            before, start = contender.computed(), time.perf_counter()
            vectors[contender.name] = contender.run(texts)
            synchronise(setting.device)
            seconds[contender.name].append(time.perf_counter() - start)
            computed[contender.name] = contender.computed() - before
    flops, peak = text_work(setting.config, tokens), median(peaks)
    rivals = [name for name in seconds if name.startswith(PEER)] or list(seconds)[:1]
    best = min(rivals, key=lambda name: median(seconds[name]))
    rows: dict[str, dict[str, Any]] = {}
    for contender in running:
        name, middle = contender.name, median(seconds[contender.name])
        ratios = [b / s for b, s in zip(seconds[best], seconds[name], strict=True)]
        reference = vectors[running[0].name]
        cosine = float((vectors[name] * reference).sum(1).min())
        if not cosine > LEAST_COSINE[setting.dtype]:
            raise ValueError(f"{name} gives other vectors: cosine {cosine}")
        rows[name] = {
            "seconds": middle,
            "spread": [min(seconds[name]), max(seconds[name])],
            "texts_per_second": len(texts) / middle,
            "tokens_per_second": int(tokens.sum()) / middle,
            "of_peak": flops / middle / peak,
            "waste": computed[name] / int(tokens.sum()),
            "ratio": median(ratios),
            "ratios": [min(ratios), max(ratios)],
            "cosine": cosine,
            "difference": float(np.abs(vectors[name] - reference).max()),
        }
    return {
        "texts": len(texts),
        "tokens": int(tokens.sum()),
        "longest": int(tokens.max()),
        "tflop": flops / 1e12,
        "gemm_peak_gflops": peak / 1e9,
        "rounds": rounds,
        "best_peer": best,
        "out_of_memory": [each.name for each in contenders if each not in running],
        "rows": rows,
    }


def table(result: dict[str, Any]) -> str:
    """Return a race as lines for a terminal."""
    out = [
        f"{result['texts']} texts, {result['tokens']} tokens (longest {result['longest']}), "
        f"{result['tflop']:.2f} TFLOP; GEMM peak {result['gemm_peak_gflops']:.0f} GFLOP/s; "
        f"median of {result['rounds']} rounds",
        f"{'':36}"
        + "".join(
            f"{name:>11}"
            for name in ("s", "texts/s", "tokens/s", "of peak", "waste", "ratio", "largest diff.")
        ),
    ]
    for name, row in result["rows"].items():
        figures = [f"{row[key]:11.2f}" for key in ("seconds", "texts_per_second")]
        figures.append(f"{row['tokens_per_second']:11.0f}")
        figures += [f"{row[key]:11.2f}" for key in ("of_peak", "waste", "ratio")]
        out.append(f"{name:36}{''.join(figures)}{row['difference']:13.1e}")
    out += [f"{name:36}   ran out of memory" for name in result["out_of_memory"]]
    return "\n".join(out)
