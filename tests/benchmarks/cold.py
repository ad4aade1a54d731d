"""One cold start, in the process that it is for: time to the first vector, then memory of a corpus.

    python tests/benchmarks/cold.py ours FOLDER texts.json
    python tests/benchmarks/cold.py sentence-transformers FOLDER texts.json --prompt "passage: "

Prints JSON: seconds of the imports, the loading and the first vector, the moment (`time.time()`)
when that was there, and the peak in MB after all texts, of the process and of the GPU. Linux only:
`ru_maxrss` would be that of the process that started this one.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))


def main() -> None:
    """Start, embed, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("who", choices=("ours", "sentence-transformers"))
    parser.add_argument("folder")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--batch-size", type=int, default=32, help="of sentence-transformers")
    parser.add_argument("--prompt", default="", help="likewise; the engine knows its own")
    asked = parser.parse_args()
    moments = [time.time()]
    embed: Any
    if asked.who == "ours":
        from shared_engine import Embedder, Options

        moments.append(time.time())
        embedder = Embedder(Options(model=asked.folder, device=asked.device, dtype=asked.dtype))
        embedder.wait_until_ready()
        embed = embedder.embed
    else:
        import torch
        from sentence_transformers import SentenceTransformer

        moments.append(time.time())
        kwargs = {"dtype": getattr(torch, asked.dtype)}
        model = SentenceTransformer(asked.folder, device=asked.device, model_kwargs=kwargs)

        def embed(texts: list[str]) -> Any:
            return model.encode(texts, prompt=asked.prompt, batch_size=asked.batch_size)

    moments.append(time.time())
    embed(["first"])
    moments.append(time.time())
    embed(json.loads(asked.texts.read_text()))

    import torch

    gpu = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    spans = [after - before for before, after in pairwise(moments)]
    result = {
        **dict(zip(("import", "load", "first"), spans, strict=True)),
        "ready": moments[-1],
        "peak_mb": int(peak[1]) / 1000 if peak else None,
        "gpu_peak_mb": gpu / 1e6,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
