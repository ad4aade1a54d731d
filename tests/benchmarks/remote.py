"""Clients of a NIM side by side: 2,000 texts from a loopback server that takes 50 ms a request.

    python tests/benchmarks/remote.py [--texts 2000] [--latency 0.05] [--rounds 5]

The server runs in a process of its own and replies with 2048 values a text, as floats or base64, as
it is asked; which values depends on the text and its role, and some vectors of each run are
compared. Every client embeds the same texts with its default settings, in turn, after one call to
warm up; of several rounds the median counts. The OpenAI client makes no batches itself: it gets
lists of 50 in a loop, which is the default of LangChain's NVIDIA client. The CPU time is this
process's, which is the client's alone.

`arrays` of ours is `embed`, `lists` what a framework's class returns: each peer makes lists.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.nim import MODEL, encode_vector, write_models, write_reply

WIDTH = 2048
DIFFERENT = 64
Run = Callable[[list[str]], Sequence[Sequence[float]]]


def table() -> NDArray[np.float32]:
    """Return the vectors that there are, (DIFFERENT, WIDTH)."""
    return np.random.default_rng(0).standard_normal((DIFFERENT, WIDTH)).astype("<f4")


def row_of(text: str, input_type: str = "passage") -> int:
    """Return which of them a text has in a role."""
    return zlib.crc32(f"{input_type}: {text}".encode()) % DIFFERENT


def serve(address: Connection, latency: float) -> None:
    """Answer with vectors made beforehand, so that the server's own work stays small."""
    items = {name: [encode_vector(row, name) for row in table()] for name in ("base64", "float")}

    def reply(body: dict[str, Any]) -> tuple[bytes, float]:
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        rows = items[body.get("encoding_format", "float")]
        values = enumerate(rows[row_of(text, body["input_type"])] for text in texts)
        return write_reply(values, tokens=len(texts)), latency

    answer(address, MODEL, reply)


def answer(
    address: Connection, model: str, reply: Callable[[dict[str, Any]], tuple[bytes, float]]
) -> None:
    """Serve one model at a free port, until the process ends.

    Args:
        address: Gets the port.
        reply: Takes the body of a request; returns the reply and after how many seconds it comes.
    """

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                started = time.perf_counter()
                length = head.partition("content-length: ")[2].partition("\r\n")[0]
                out, seconds = write_models([model]), 0.0
                if length:
                    out, seconds = reply(json.loads(await reader.readexactly(int(length))))
                head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d"
                content = head % len(out) + b"\r\n\r\n" + out
                if seconds:
                    await asyncio.sleep(seconds - time.perf_counter() + started)
                writer.write(content)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def run() -> None:
        server = await asyncio.start_server(one, "127.0.0.1", 0)
        address.send(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(run())


def ours(url: str) -> dict[str, Run]:
    from shared_engine import Embedder, Options

    engine = Embedder(Options(model=MODEL, base_url=url))
    return {"ours, arrays": engine.embed, "ours, lists": engine._embed_lists}


def langchain(url: str) -> dict[str, Run]:
    from langchain_nvidia_ai_endpoints import NVIDIAEmbeddings

    return {"langchain-nvidia": NVIDIAEmbeddings(model=MODEL, base_url=url).embed_documents}


def llamaindex(url: str) -> dict[str, Run]:
    from llama_index.embeddings.nvidia import NVIDIAEmbedding

    engine = NVIDIAEmbedding(model=MODEL, base_url=url, api_key="none")
    return {"llama-index-nvidia": engine.get_text_embedding_batch}


def openai(url: str) -> dict[str, Run]:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="none")
    extra = {"input_type": "passage", "truncate": "NONE"}

    def embed(texts: list[str]) -> Sequence[Sequence[float]]:
        out: list[Sequence[float]] = []
        for start in range(0, len(texts), 50):
            batch = texts[start : start + 50]
            reply = client.embeddings.create(model=MODEL, input=batch, extra_body=extra)
            out += [item.embedding for item in reply.data]
        return out

    return {"openai, 50 a call": embed}


def measure(run: Run, texts: list[str]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    vectors = run(texts)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if (len(vectors), len(vectors[0])) != (len(texts), WIDTH):
        raise RuntimeError("not every text has its vector")
    some = slice(None, None, 17)
    got = np.array(vectors[some])
    expected = table()[[row_of(text) for text in texts[some]]]
    got, expected = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (got, expected))
    np.testing.assert_allclose(got, expected, atol=1e-6)
    return wall, cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=0.05)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("NVIDIA_API_KEY", "NVIDIA_BASE_URL"):
        os.environ.pop(name, None)
    here, there = multiprocessing.Pipe()
    start = multiprocessing.get_context("spawn").Process
    server = start(target=serve, args=(there, arguments.latency), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{here.recv()}/v1"
    runs: dict[str, Run] = {}
    for client in (ours, langchain, llamaindex, openai):
        try:
            runs.update(client(url))
        except ImportError as exc:
            print(f"{client.__name__}: not installed ({exc.name})")
    texts = [f"Passage {i} of a corpus, of a usual length. " * 8 for i in range(arguments.texts)]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for run in runs.values():
        run(texts[:50])
    for _ in range(arguments.rounds):
        for name, run in runs.items():
            taken[name].append(measure(run, texts))
    middle = {name: tuple(map(median, zip(*t, strict=True))) for name, t in taken.items()}
    wall0, cpu0 = middle["ours, arrays"]
    lists_wall, lists_cpu = middle["ours, lists"]
    print(
        f"{arguments.texts} texts, {arguments.latency * 1000:.0f} ms, median of {arguments.rounds}"
    )
    print(f"{'client':20} {'wall s':>7} {'CPU s':>7} {'us/vector':>10}  ratio to our arrays, lists")
    for name, (wall, cpu) in middle.items():
        ratios = f"wall {wall / wall0:5.1f}x {wall / lists_wall:5.1f}x  CPU {cpu / cpu0:5.1f}x "
        each = cpu / arguments.texts * 1e6
        print(f"{name:20} {wall:7.3f} {cpu:7.3f} {each:10.0f}  {ratios}{cpu / lists_cpu:5.1f}x")
    server.terminate()


if __name__ == "__main__":
    main()
