"""Pages per second, and where the time goes: reading and cutting, the tower, the language model.

    python tests/benchmarks/images.py                       # a ninth of the 1.7B model's layers
    python tests/benchmarks/images.py --checkpoint DIR --device cuda --pages 64

Pages of 1275 x 1650 pixels (letter paper at 150 dots an inch) as PNG and as JPEG files, at one tile
and at six with their thumbnail. The parts are timed one after another, the whole as a user calls
it; each once a round, in turn, and the figures are medians. A CPU cuts the tiles, too; for a GPU,
which cuts them itself, it only decodes. The projection says how many pages a second 16 cores can
decode, from the measured cost on one, against what an H100 can compute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

from shared_engine import Embedder, EmbeddingInput, Options, images
from tests.benchmarks.measuring import (
    LEAST_COSINE,
    Setting,
    Timed,
    gemm_peak,
    image_checkpoint,
    image_work,
)
from tests.support.vl_checkpoints import TRUE_VL, page
from tests.support.vl_oracles import internvl

WIDTH, HEIGHT = 1275, 1650
TRUE_FLOPS = 0.55 * 790e12
"""What the project wants of an H100, as a share of the bfloat16 peak that was measured on one."""


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


def one_round(embedder: Embedder, paths: dict[str, list[Path]], max_tiles: int) -> dict[str, float]:
    """Return the seconds of each part for one page, and of the whole."""
    out: dict[str, float] = {}
    for kind, files in paths.items():
        start = time.perf_counter()
        cut = [images.cut_tiles(path, max_tiles) for path in files]
        out[f"prepare {kind}"] = (time.perf_counter() - start) / len(files)
        start = time.perf_counter()
        for path in files:
            images.decode_picture(path, max_tiles)
        out[f"decode {kind}"] = (time.perf_counter() - start) / len(files)
    backend: Any = embedder.load()
    encoder = backend._encoders[0]
    ids = [backend._tokenizer.encode_with_image(tiles, "", "NONE") for tiles in cut]
    kept, encoder._vision = encoder._vision, Timed(encoder._vision, encoder.device)
    start = time.perf_counter()
    for one, tiles in zip(ids, cut, strict=True):
        encoder([one], [tiles]).numpy()
    seconds = (time.perf_counter() - start) / len(cut)
    out["tower"] = sum(encoder._vision.spans) / len(cut)
    out["language model"] = seconds - out["tower"]
    encoder._vision = kept
    for kind, files in paths.items():
        start = time.perf_counter()
        embedder.embed([EmbeddingInput(image=path) for path in files])
        out[f"whole {kind}"] = (time.perf_counter() - start) / len(files)
    return out


def measure(
    folder: Path, device: str, dtype: str, pages: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Return the figures for one tile and for six: seconds a page, the whole's share of the peak.

    Raises:
        ValueError: transformers' InternVL gives another vector for a page (`cosine` compares them).
    """
    figures: dict[str, dict[str, Any]] = {}
    config = json.loads((folder / "config.json").read_text())
    with tempfile.TemporaryDirectory() as scratch:
        paths: dict[str, list[Path]] = {"png": [], "jpeg": []}
        for seed in range(pages):
            for kind, files in paths.items():
                files.append(Path(scratch) / f"{seed}.{kind}")
                page(seed, WIDTH, HEIGHT).save(files[-1])
        for max_tiles in (1, 6):
            options = Options(model=folder, device=device, dtype=dtype, max_tiles=max_tiles)
            tiles = images.cut_tiles(paths["png"][0], max_tiles)
            peaks, spans = [], []
            with Embedder(options) as embedder:
                vector = embedder.embed([EmbeddingInput(image=paths["png"][0])])[0]
                backend: Any = embedder.load()
                place = backend._encoders[0].device
                setting = Setting(config["llm_config"], place, backend._dtype)
                for _ in range(rounds):
                    peaks.append(gemm_peak(setting))
                    spans.append(one_round(embedder, paths, max_tiles))
            seconds = {name: statistics.median(span[name] for span in spans) for name in spans[0]}
            achieved = image_work(config, len(tiles)) / seconds["whole png"]
            figures[str(max_tiles)] = {
                "tiles": len(tiles),
                "layers": [
                    config[part]["num_hidden_layers"] for part in ("vision_config", "llm_config")
                ],
                "seconds": seconds,
                "of_peak": achieved / statistics.median(peaks),
                "cores_to_h100": 16 / seconds["decode png"] * _true_work(len(tiles)) / TRUE_FLOPS,
            }
            if max_tiles == 1:
                expected = internvl(folder, [(None, tiles)], "document")[0]
                figures["1"]["cosine"] = cosine = float(expected @ vector)
                if not cosine > LEAST_COSINE[setting.dtype]:
                    raise ValueError(f"transformers gives another vector: cosine {cosine}")
    return figures


def report(figures: dict[str, Any]) -> str:
    """Return the figures of one number of tiles, and the projection, as lines for a terminal."""
    tiles, seconds = figures["tiles"], figures["seconds"]
    parts = [seconds["prepare png"], seconds["tower"], seconds["language model"]]
    shares = np.array(parts) / sum(parts)
    out = [f"{tiles} tiles with the thumbnail: {figures['of_peak']:.2f} of the GEMM peak"]
    out += [
        f"  {kind:4}  {1 / seconds[f'whole {kind}']:8.2f} pages/s, prepared on one core in "
        f"{1000 * seconds[f'prepare {kind}']:.1f} ms, for a GPU in "
        f"{1000 * seconds[f'decode {kind}']:.1f} ms"
        for kind in ("png", "jpeg")
    ]
    out.append("  share  prepare {:.1%}, tower {:.1%}, language model {:.1%}".format(*shares))
    gpu, cpu = TRUE_FLOPS / _true_work(tiles), 16 / seconds["decode png"]
    out.append(
        f"  projected: 16 cores decode {cpu:.0f} PNG pages/s, an H100 at {TRUE_FLOPS / 1e12:.0f} "
        f"TFLOP/s computes {gpu:.0f}: {figures['cores_to_h100']:.1f} times what is needed"
    )
    return "\n".join(out)


def _true_work(tiles: int) -> float:
    vision = {
        "hidden_size": TRUE_VL.vision_hidden_size,
        "intermediate_size": TRUE_VL.vision_intermediate_size,
        "num_hidden_layers": TRUE_VL.vision_layers,
        "image_size": TRUE_VL.image_size,
        "patch_size": TRUE_VL.patch_size,
    }
    return image_work({"llm_config": vars(TRUE_VL.text), "vision_config": vision}, tiles)


def main() -> None:
    """Measure and print."""
    asked = arguments()
    with tempfile.TemporaryDirectory() as scratch:
        folder = asked.checkpoint or image_checkpoint(Path(scratch), 3, 2)
        figures = measure(folder, asked.device, asked.dtype, asked.pages, asked.rounds)
    print("\n".join(report(each) for each in figures.values()))
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
