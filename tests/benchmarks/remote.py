"""Clients of a NIM side by side: 2,000 texts from a loopback server that takes 50 ms a request.

    python tests/benchmarks/remote.py [--texts 2000] [--latency 0.05] [--rounds 5]

The server runs in a process of its own and replies with 2048 values a text, as floats or base64, as
it is asked. Every client embeds the same texts with its default settings, in turn, after one call
to warm up. Of several rounds the least counts: the rest is the work of others on the machine. The
OpenAI client makes no batches itself: it gets lists of 50 in a loop, which is the default of
LangChain's NVIDIA client. The CPU time is this process's, which is the client's alone.

`arrays` of ours is `embed`, `lists` what a framework's class returns: each peer makes lists.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import multiprocessing
import os
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))

MODEL = "nvidia/llama-nemotron-embed-1b-v2"
WIDTH = 2048
Run = Callable[[list[str]], Sequence[Sequence[float]]]


def serve(address: Connection, latency: float) -> None:
    """Answer with vectors made beforehand, so that the server's own work stays small."""
    row = np.random.default_rng(0).standard_normal(WIDTH).astype("<f4")
    values = {
        "base64": json.dumps(base64.b64encode(row.tobytes()).decode()),
        "float": json.dumps([float(f"{value:.7g}") for value in row.tolist()]),
    }
    ready: dict[tuple[str, int], bytes] = {}

    def content(encoding: str, n: int) -> bytes:
        if (encoding, n) not in ready:
            items = (f'{{"object":"embedding","index":{i},"embedding":' for i in range(n))
            data = ",".join(f"{item}{values[encoding]}}}" for item in items)
            usage = '"usage":{"prompt_tokens":9,"total_tokens":9}'
            ready[encoding, n] = f'{{"object":"list","data":[{data}],"model":"m",{usage}}}'.encode()
        return ready[encoding, n]

    async def one(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = head.partition("content-length: ")[2].partition("\r\n")[0]
                body = json.loads(await reader.readexactly(int(length))) if length else {}
                out = json.dumps({"data": [{"id": MODEL}]}).encode()
                if body:
                    await asyncio.sleep(latency)
                    texts = body["input"]
                    n = 1 if isinstance(texts, str) else len(texts)
                    out = content(body.get("encoding_format", "float"), n)
                kind = "Content-Type: application/json"
                writer.write(
                    f"HTTP/1.1 200 OK\r\n{kind}\r\nContent-Length: {len(out)}\r\n\r\n".encode()
                )
                writer.write(out)
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
    return {"ours, arrays": engine.embed, "ours, lists": engine.embed_lists}


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
    best = {name: (min(w for w, _ in t), min(c for _, c in t)) for name, t in taken.items()}
    wall0, cpu0 = best["ours, arrays"]
    lists_wall, lists_cpu = best["ours, lists"]
    print(f"{arguments.texts} texts, {arguments.latency * 1000:.0f} ms, best of {arguments.rounds}")
    print(f"{'client':20} {'wall s':>7} {'CPU s':>7} {'us/vector':>10}  ratio to our arrays, lists")
    for name, (wall, cpu) in best.items():
        ratios = f"wall {wall / wall0:5.1f}x {wall / lists_wall:5.1f}x  CPU {cpu / cpu0:5.1f}x "
        each = cpu / arguments.texts * 1e6
        print(f"{name:20} {wall:7.3f} {cpu:7.3f} {each:10.0f}  {ratios}{cpu / lists_cpu:5.1f}x")
    server.terminate()


if __name__ == "__main__":
    main()
