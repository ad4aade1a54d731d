"""What the groups share: figures on disk, clocks, models of random weights, and texts."""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from shared_engine import Embedder, Options
from tests.benchmarks import measuring
from tests.benchmarks.gpu.expected import EXPECTED
from tests.support.checkpoints import TRUE_300M, Shape
from tests.support.vl_checkpoints import TRUE_VL, build_vl_checkpoint

CORPORA = {"uniform": "512 tokens", "skewed": "16 to 512 tokens", "long": "8,192 tokens"}
"""Kinds of texts that `measuring.lengths` knows, and their names here."""
SHAPES = {"300m": TRUE_300M, "1b": TRUE_VL.text}
TINY = Shape(num_hidden_layers=2, vocab_size=32_000)
DIFFERENT = 100_000
"""Tokens of a corpus before its texts are repeated: to cut them to length takes seconds."""


@dataclass
class Bench:
    """One group in its process."""

    group: str
    is_tiny: bool
    scratch: Path
    """Where all groups find the models."""
    results: Path
    """The file of all figures."""

    @cached_property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.is_tiny else "cuda:0")

    @property
    def kind(self) -> str:
        """The text model of this group."""
        return "1b" if self.group == "1b" else "300m"

    @cached_property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.is_tiny else torch.bfloat16

    # Figures.

    def add(self, name: str, value: Any, unit: str = "") -> None:
        """Write a figure to the file, and print it with the range that was predicted."""
        if isinstance(value, float):
            value = float(f"{value:.4g}")
        figure: dict[str, Any] = {"value": value, "unit": unit}
        remark = ""
        if expected := EXPECTED[self.group].get(name):
            low, high = expected
            figure |= {"expected": expected, "is_inside": low <= value <= high}
            remark = f"   expected of an H200: {low:,} to {high:,}"
        with change(self.results) as results:
            results[self.group].setdefault("figures", {})[name] = figure
        shown = f"{value:,}" if isinstance(value, (int, float)) else json.dumps(value)
        print(f"{self.group:8} {name:45} {shown[:200]} {unit}{remark}", flush=True)

    @contextlib.contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Let the group go on after an error of one part, but not with a GPU that is lost."""
        try:
            yield
        except Exception as exc:
            self.add(f"error: {name}", f"{type(exc).__name__}: {exc}"[:500])
            measuring.synchronise(self.device)

    def add_rate(self, name: str, tokens: NDArray[np.int64], seconds: float) -> None:
        """Add tokens per second."""
        self.add(name, tokens.sum() / seconds / 1e3, "thousand tokens/s")

    # Clocks.

    def time(self, call: Callable[..., object], *args: Any, calls: int = 1) -> float:
        """Return the seconds of a call, with the work of the device: the median of three rounds."""
        timed = measuring.Timed(lambda: [call(*args) for _ in range(calls)], self.device)
        for _ in range(3):
            timed()
        return statistics.median(timed.spans) / calls

    def time_on_device(self, call: Callable[..., object], *args: Any) -> float:
        """Return the seconds of a call among others, so that the device never waits for one."""
        self.time(call, *args)  # what is done once
        return self.time(call, *args, calls=2 if self.is_tiny else 20)

    # Models and texts.

    def checkpoint(self, kind: str) -> Path:
        """Return the folder of "300m", "1b" or "vl": true shapes, random weights."""
        folder = self.scratch / kind
        if not (folder / "model.safetensors").exists():
            start = time.perf_counter()
            if kind == "vl" and self.is_tiny:
                build_vl_checkpoint(folder)
            elif kind == "vl":
                text = TRUE_VL.text
                measuring.image_checkpoint(folder, TRUE_VL.vision_layers, text.num_hidden_layers)
            else:
                shape = TINY if self.is_tiny else replace(SHAPES[kind], vocab_size=32_000)
                measuring.text_checkpoint(folder, shape.num_hidden_layers, shape)
            print(f"wrote random weights of {kind} in {time.perf_counter() - start:.0f} s")
        return folder

    def config(self, kind: str) -> dict[str, Any]:
        config: dict[str, Any] = json.loads((self.checkpoint(kind) / "config.json").read_text())
        return config

    def open(self, kind: str, **options: Any) -> Embedder:
        """Return a loaded engine with such a model."""
        dtype = str(self.dtype).removeprefix("torch.")
        given = {"device": str(self.device), "dtype": dtype, **options}
        embedder = Embedder(Options(model=str(self.checkpoint(kind)), **given))
        embedder.wait_until_ready()
        return embedder

    @cached_property
    def source(self) -> measuring.Source:
        return measuring.Source(self.checkpoint(self.kind))

    def lengths(self, corpus: str, tokens: int) -> NDArray[np.int64]:
        """Return how many tokens texts of that kind have, at most so many together."""
        drawn = measuring.lengths(corpus, max(1, tokens // 16))
        if self.is_tiny:
            drawn = np.maximum(drawn // 16, 8)
        fit = int(np.searchsorted(np.cumsum(drawn), tokens, "right"))
        return drawn[: max(1, fit)]

    def sequences(self, counts: NDArray[np.int64]) -> list[NDArray[np.int32]]:
        random = np.random.default_rng(1)
        return [random.integers(5, 400, n).astype(np.int32) for n in counts]

    def texts(self, corpus: str, tokens: int) -> tuple[list[str], NDArray[np.int64]]:
        """Return texts of that kind and their token counts, the same ones again and again."""
        counts = self.lengths(corpus, 1_000 if self.is_tiny else tokens)
        first = counts[: max(1, int(np.searchsorted(np.cumsum(counts), DIFFERENT)))]
        texts = self.source.texts(first)
        which = np.arange(len(counts)) % len(first)
        return [texts[i] for i in which], first[which]


@contextlib.contextmanager
def change(path: Path) -> Iterator[dict[str, Any]]:
    """Read the figures of all groups, and write them, never a half of them."""
    results = json.loads(path.read_text())
    yield results
    new = path.with_suffix(".new")
    new.write_text(json.dumps(results, indent=1) + "\n")
    new.replace(path)
