"""Images per second, and where the time goes: reading and cutting, the tower, the language model.

    python tests/benchmarks/images.py                       # a ninth of the 1.7B model's layers
    python tests/benchmarks/images.py --checkpoint DIR --device cuda --pages 64

Pages of 1275 x 1650 pixels (letter paper at 150 dots an inch) as PNG and as JPEG files, at one tile
and at six with their thumbnail. The parts are timed one after another, the whole as a user calls
it; each once a round, in turn, and the figures are medians. The projection says how many pages a
second 16 cores can prepare, from the measured cost on one, against what a GPU can compute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from shared_engine import Document, Embedder, Options, images
from shared_engine.encoder import Encoder
from tests.vl_checkpoints import TRUE_VL, build_vl_checkpoint, page

WIDTH, HEIGHT = 1275, 1650
TRUE_FLOPS = 400e12
"""Half of the bfloat16 peak that was measured on an H100 (790 TFLOP/s): an optimistic forward."""


def work(tiles: int) -> float:
    """Return the FLOPs of the 1.7B model over an image of so many tiles."""
    text, hidden, inner = TRUE_VL.text, TRUE_VL.vision_hidden_size, TRUE_VL.vision_intermediate_size
    patches = (TRUE_VL.image_size // TRUE_VL.patch_size) ** 2
    layer = 2 * patches * (4 * hidden**2 + 2 * hidden * inner) + 4 * patches**2 * hidden
    tower = tiles * TRUE_VL.vision_layers * layer
    tokens, d = tiles * patches // 4 + 8, text.head_dim
    heads, kv = text.num_attention_heads, text.num_key_value_heads
    weights = (
        2 * text.hidden_size * d * (heads + kv) + 3 * text.hidden_size * text.intermediate_size
    )
    llama = text.num_hidden_layers * (2 * tokens * weights + 4 * heads * d * tokens**2)
    return float(tower + llama)


def ninth(folder: Path) -> Path:
    """Write a checkpoint of the true widths with 3 of the tower's 27 layers and 2 of Llama's 16."""
    text = replace(TRUE_VL.text, num_hidden_layers=2, vocab_size=None)
    return build_vl_checkpoint(folder, replace(TRUE_VL, text=text, vision_layers=3))


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="folder; default: a ninth of the layers")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--pages", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    return parser.parse_args()


class Timed:
    """A callable that adds up the seconds spent in it."""

    def __init__(self, call: Callable[..., torch.Tensor], device: torch.device) -> None:
        self._call, self._device, self.seconds = call, device, 0.0

    def __call__(self, *args: object) -> torch.Tensor:
        """Call, and wait for the device."""
        start = time.perf_counter()
        out = self._call(*args)
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        return out

    def __getattr__(self, name: str) -> object:
        return getattr(self._call, name)


def measure(embedder: Embedder, paths: dict[str, list[Path]], max_tiles: int) -> dict[str, float]:
    """Return the seconds of each part for one page, and of the whole."""
    out: dict[str, float] = {}
    for kind, files in paths.items():
        start = time.perf_counter()
        cut = [images.tiles(path, 0, max_tiles) for path in files]
        out[f"prepare {kind}"] = (time.perf_counter() - start) / len(files)
    backend = embedder._backend
    encoder: Encoder = backend._encoder  # type: ignore[attr-defined]
    ids = [backend._tokenizer.encode_with_image(len(t), "")[0] for t in cut]  # type: ignore[attr-defined]
    tower = Timed(encoder._vision, encoder.device)  # type: ignore[arg-type]
    encoder._vision, kept = tower, encoder._vision  # type: ignore[assignment]
    start = time.perf_counter()
    for one, tiles in zip(ids, cut, strict=True):
        encoder([one], [tiles])
    seconds = (time.perf_counter() - start) / len(cut)
    encoder._vision = kept
    out["tower"] = tower.seconds / len(cut)
    out["language model"] = seconds - out["tower"]
    for kind, files in paths.items():
        start = time.perf_counter()
        embedder.embed([Document(image=path) for path in files])
        out[f"whole {kind}"] = (time.perf_counter() - start) / len(files)
    return out


def main() -> None:
    """Measure and print."""
    asked = arguments()
    figures: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.checkpoint or ninth(Path(scratch) / "ninth")
        paths: dict[str, list[Path]] = {"png": [], "jpeg": []}
        for seed in range(asked.pages):
            for kind, files in paths.items():
                files.append(Path(scratch) / f"{seed}.{kind}")
                page(seed, WIDTH, HEIGHT).save(files[-1])
        options = Options(model=folder, device=asked.device, dtype=asked.dtype)
        for max_tiles in (1, 6):
            with Embedder(options.model_copy(update={"max_tiles": max_tiles})) as embedder:
                print(embedder.description)
                embedder.embed([Document(image=paths["png"][0])])
                rounds = [measure(embedder, paths, max_tiles) for _ in range(asked.rounds)]
            median = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
            report(max_tiles, median)
            figures[str(max_tiles)] = median
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2))


def report(max_tiles: int, seconds: dict[str, float]) -> None:
    """Print the figures of one number of tiles, and the projection."""
    tiles = len(images.tiles(page(0, WIDTH, HEIGHT), 0, max_tiles))
    parts = [seconds["prepare png"], seconds["tower"], seconds["language model"]]
    shares = np.array(parts) / sum(parts)
    print(f"{tiles} tiles with the thumbnail:")
    for kind in ("png", "jpeg"):
        print(
            f"  {kind:4}  {1 / seconds[f'whole {kind}']:8.2f} pages/s, prepared on one core in "
            f"{1000 * seconds[f'prepare {kind}']:.1f} ms"
        )
    print("  share  prepare {:.1%}, tower {:.1%}, language model {:.1%}".format(*shares))
    gpu, cpu = TRUE_FLOPS / work(tiles), 16 / seconds["prepare png"]
    print(
        f"  projected: 16 cores prepare {cpu:.0f} PNG pages/s, an H100 at {TRUE_FLOPS / 1e12:.0f} "
        f"TFLOP/s computes {gpu:.0f}: {cpu / gpu:.1f} times what is needed"
    )


if __name__ == "__main__":
    main()
