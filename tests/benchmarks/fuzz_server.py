"""Thousands of odd requests to a server in a process of its own: what it answers, what it keeps.

    python tests/benchmarks/fuzz_server.py                # 20,000 requests
    python tests/benchmarks/fuzz_server.py --requests 2000 --seed 1
    python tests/benchmarks/fuzz_server.py --hostile 200  # large ones, made to take memory

The server has an embedding model and a reranker; a third of the requests each goes to
/v1/embeddings, /v1/ranking and /v1/rerank. Half of them are valid, the others are broken in one of
many ways; some clients hang up.
Exit status 1 where a request got a 5xx or no reply within 30 s, or where the server's memory grew
by more than `--growth` MB between the first tenth of the requests and the end.

Of the hostile requests each is as large as a body may be. Exit status 1 where one got a 5xx, or
where the server's memory after them is over 1.5 times what it was before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.support.checkpoints import SHAPES, build_checkpoint
from tests.support.rerankers import build_reranker

NAME, RERANKER = "nvidia/tiny", "nvidia/tiny-rerank"
PATHS = ("/embeddings", "/ranking", "/rerank")
ALPHABET = "abc XYZ,.;'\"\\{}[]<|>\n\t\0é€東👍"
CHOICES: dict[str, list[Any]] = {
    "input_type": ["query", "passage"],
    "encoding_format": ["float", "base64"],
    "embedding_type": ["float", "int8", "uint8", "binary", "ubinary"],
    "dimensions": [16, 32, 64],
    "truncate": ["START", "END"],
    "modality": ["text", ["text"]],
    "user": ["somebody"],
}
JUNK: list[Any] = [
    None,
    True,
    -1,
    0,
    10**40,
    0.5,
    "",
    "x" * 5000,
    [],
    [[]],
    [None],
    {},
    {"a": {"b": []}},
    "image",
    ["text", 1],
    [1] * 20_000,
]


def text(rng: random.Random) -> str:
    """Return a text, now and then an empty or a longer one."""
    length = rng.choice((0, 1, 300)) if rng.random() < 0.1 else rng.randrange(60)
    return "".join(rng.choices(ALPHABET, k=length))


def valid(rng: random.Random, path: str = "/embeddings") -> dict[str, Any]:
    """Return a request that must be answered with vectors or scores."""
    if path == "/embeddings":
        return valid_embeddings(rng)
    texts = [text(rng) for _ in range(rng.randint(1, 8))]
    query = text(rng) + "?"
    body: dict[str, Any] = {"model": RERANKER, "truncate": "END"}
    if path == "/ranking":
        return body | {"query": {"text": query}, "passages": [{"text": each} for each in texts]}
    parts = [{"content": [{"type": "text", "text": each}]} for each in texts]
    body |= {"query": query, "documents": texts if rng.random() < 0.7 else parts}
    for name in ("top_n", "return_documents"):
        if rng.random() < 0.3:
            body[name] = {"top_n": 3, "return_documents": True}[name]
    return body


def valid_embeddings(rng: random.Random) -> dict[str, Any]:
    """Return a request that must be answered with vectors."""
    several = [text(rng) for _ in range(rng.randint(1, 8))]
    body: dict[str, Any] = {"model": NAME, "input": several if rng.random() < 0.7 else text(rng)}
    if rng.random() < 0.2:
        body["model"] += rng.choice(("-query", "-passage"))
    else:
        body["input_type"] = rng.choice(CHOICES["input_type"])
    body["truncate"] = rng.choice(CHOICES["truncate"])
    for name in ("encoding_format", "embedding_type", "dimensions", "modality", "user"):
        if rng.random() < 0.3:
            body[name] = rng.choice(CHOICES[name])
    return body


def junk_value(rng: random.Random, path: str) -> bytes:
    """Return a request with one field that cannot be."""
    body = valid(rng, path)
    names = [*CHOICES, "input"] if path == "/embeddings" else list(body)
    body[rng.choice([*names, "model"])] = rng.choice(JUNK)
    return json.dumps(body).encode()


def junk_fields(rng: random.Random, path: str) -> bytes:
    """Return a request with fields that nobody knows, or without some that it needs."""
    body = valid(rng, path)
    if rng.random() < 0.5:
        del body[rng.choice(list(body))]
    else:
        body |= {text(rng): rng.choice(JUNK) for _ in range(rng.choice((1, 2, 1000)))}
    return json.dumps(body).encode()


def torn(rng: random.Random, path: str) -> bytes:
    """Return a request with bytes missing, doubled or flipped."""
    body = bytearray(json.dumps(valid(rng, path)).encode())
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(body))
        if rng.random() < 0.5:
            del body[at : at + rng.randint(1, 40)]
        else:
            body[at:at] = rng.randbytes(rng.randint(1, 4))
        body = body or bytearray(b"x")
    return bytes(body)


def nested(rng: random.Random, path: str) -> bytes:
    """Return JSON that is deep, or only brackets."""
    depth = rng.choice((10, 1000, 100_000))
    return b'{"input":' * depth if rng.random() < 0.5 else b"[" * depth + b"]" * depth


def too_long(rng: random.Random, path: str) -> bytes:
    """Return a request with a text over the limit, which may not be cut."""
    texts = ["short", "word " * 3000]
    body: dict[str, Any] = {"model": NAME, "input": texts, "input_type": "query"}
    if path == "/ranking":
        passages = [{"text": each} for each in texts]
        body = {"model": RERANKER, "query": {"text": "a"}, "passages": passages}
    elif path == "/rerank":
        body = {"model": RERANKER, "query": "a", "documents": texts}
    return json.dumps(body).encode()


BROKEN: list[Callable[[random.Random, str], bytes]] = [
    junk_value,
    junk_value,
    junk_fields,
    torn,
    nested,
    too_long,
    lambda rng, _: rng.randbytes(rng.randrange(300)),
]


def _wrap(value: bytes, **fields: Any) -> bytes:
    head = json.dumps({"model": NAME, "input_type": "passage"} | fields).encode()
    return head[:-1] + b',"input":' + value + b"}"


def _wrap_scores(value: bytes, **fields: Any) -> bytes:
    head = json.dumps({"model": RERANKER, "query": {"text": "a"}, "truncate": "END"} | fields)
    return head[:-1].encode() + b',"passages":' + value + b"}"


MOST = 60 * 2**20
HOSTILE: dict[str, Callable[[], bytes]] = {
    "a text": lambda: _wrap(b'"' + b"word " * (MOST // 5) + b'"', truncate="END"),
    "a text, not cut": lambda: _wrap(b'"' + b"word " * (MOST // 5) + b'"'),
    "its start cut": lambda: _wrap(b'"' + b"word " * (MOST // 5) + b'"', truncate="START"),
    "one word": lambda: _wrap(b'"' + b"x" * MOST + b'"', truncate="END"),
    "spaces": lambda: _wrap(b'"' + b" " * MOST + b'"', truncate="END"),
    "wide characters": lambda: _wrap(
        b'"' + b"word " * (MOST // 5) + "👍".encode() + b'"', truncate="END"
    ),
    "escapes": lambda: _wrap(b'"' + b"\\u20ac" * (MOST // 6) + b'"', truncate="END"),
    "long texts": lambda: _wrap(
        b"[" + b",".join([b'"' + b"word " * (MOST // 5 // 64) + b'"'] * 64) + b"]", truncate="END"
    ),
    "objects": lambda: _wrap(b"[" + b",".join([b"{}"] * (MOST // 3)) + b"]"),
    "lists": lambda: _wrap(b"[" + b",".join([b"[]"] * (MOST // 3)) + b"]"),
    "numbers": lambda: _wrap(b"[" + b",".join([b"1"] * (MOST // 2)) + b"]"),
    "floats": lambda: _wrap(b"[" + b",".join([b".5"] * (MOST // 3)) + b"]"),
    "empty texts": lambda: _wrap(b"[" + b",".join([b'""'] * (MOST // 3)) + b"]"),
    "short texts": lambda: _wrap(b"[" + b",".join([b'"a\\u0416"'] * (MOST // 10)) + b"]"),
    "modalities": lambda: _wrap(b'"a"', modality=["text"] * (MOST // 8)),
    "fields": lambda: _wrap(b'"a",' + b",".join(b'"%d":1' % n for n in range(MOST // 12))),
    "brackets": lambda: b"[" * MOST,
    "an unclosed text": lambda: _wrap(b'"' + b"a" * MOST)[:-1],
    "data URLs": lambda: _wrap(b'"data:image/png;base64,' + b"A" * MOST + b'"'),
}
"""What a body of the most bytes may hold to take more."""
HOSTILE_RANKING: dict[str, Callable[[], bytes]] = {
    "a passage": lambda: _wrap_scores(b'[{"text":"' + b"word " * (MOST // 5) + b'"}]'),
    "a query": lambda: _wrap_scores(b'[{"text":"a"}]', query={"text": "word " * (MOST // 5)}),
    "a query of spaces": lambda: _wrap_scores(
        b"[" + b",".join([b'{"text":"a"}'] * 512) + b"]", query={"text": "a" + " " * MOST}
    ),
    "long passages": lambda: _wrap_scores(
        b"[" + b",".join([b'{"text":"' + b"word " * (MOST // 5 // 64) + b'"}'] * 64) + b"]"
    ),
    "no passages": lambda: _wrap_scores(b"[" + b",".join([b"{}"] * (MOST // 3)) + b"]"),
    "short passages": lambda: _wrap_scores(
        b"[" + b",".join([b'{"text":""}'] * (MOST // 12)) + b"]"
    ),
    "an image": lambda: _wrap_scores(b'[{"image":"data:image/png;base64,' + b"A" * MOST + b'"}]'),
}
"""The same for /v1/ranking."""


async def attack(base: str, process: psutil.Process, requests: int, at_once: int) -> int:
    """Send hostile requests, print what each kind took; return how many were answered with 5xx."""
    faults = 0
    kinds = [("/embeddings", *item) for item in HOSTILE.items()]
    kinds += [("/ranking", *item) for item in HOSTILE_RANKING.items()]
    each = -(-requests // len(kinds))
    async with httpx.AsyncClient(base_url=base, timeout=600) as client:
        for path, kind, make in kinds:
            content, turns = make(), asyncio.Semaphore(at_once)
            taken: list[float] = []

            async def send(
                path: str = path, content: bytes = content, turns: Any = turns, taken: Any = taken
            ) -> int:
                async with turns:
                    started = time.perf_counter()
                    headers = {"Content-Type": "application/json"}
                    response = await client.post(path, content=content, headers=headers)
                    taken.append(time.perf_counter() - started)
                    return response.status_code

            sending = asyncio.gather(*(send() for _ in range(each)))
            peak = 0
            while not sending.done():
                peak = max(peak, process.memory_info().rss // 2**20)
                await asyncio.sleep(0.02)
            statuses = sorted(Counter(sending.result()).items())
            faults += sum(count for status, count in statuses if status >= 500)
            said = ", ".join(f"{count} x {status}" for status, count in statuses)
            await asyncio.sleep(1)
            left = process.memory_info().rss // 2**20
            times = f"slowest {max(taken):4.1f} s"
            print(f"  {kind:16} {said:9} {times}, peak {peak} MB, left {left} MB", flush=True)
    return faults


class Fuzz:
    """The requests, and what became of them."""

    def __init__(self, port: int, process: psutil.Process, requests: int, seed: int) -> None:
        self.base = f"http://127.0.0.1:{port}/v1"
        self.process = process
        self.requests = requests
        self.rng = random.Random(seed)
        self.statuses: Counter[str] = Counter()
        self.faults: list[str] = []
        self.seconds: list[float] = []
        self.memory: list[float] = []

    async def run(self) -> None:
        """Send them all, thirty-two at a time."""
        numbers = iter(range(self.requests))
        async with httpx.AsyncClient(base_url=self.base, timeout=30) as client:
            await asyncio.gather(*(self._work(client, numbers) for _ in range(32)))

    async def _work(self, client: httpx.AsyncClient, numbers: Any) -> None:
        for number in numbers:
            if number % (self.requests // 10 or 1) == 0:
                self.memory.append(self.process.memory_info().rss / 2**20)
            kind, to = self.rng.random(), self.rng.choice(PATHS)
            started = time.perf_counter()
            if kind < 0.02:
                await self._hang_up(to)
            elif kind < 0.05:
                method = self.rng.choice(("GET", "PUT", "POST", "DELETE", "HEAD", "OPTIONS"))
                path = self.rng.choice((to, "/models", "/metrics", "/metadata", "/x"))
                await self._send(client, "other routes", method, path, b"{}")
            elif kind < 0.5:
                make = self.rng.choice(BROKEN)
                await self._send(client, "broken", "POST", to, make(self.rng, to))
            else:
                content = json.dumps(valid(self.rng, to)).encode()
                await self._send(client, "valid", "POST", to, content)
            self.seconds.append(time.perf_counter() - started)

    async def _send(
        self, client: httpx.AsyncClient, kind: str, method: str, path: str, content: bytes
    ) -> None:
        try:
            response = await client.request(
                method, path, content=content, headers={"Content-Type": "application/json"}
            )
        except httpx.HTTPError as exc:
            self.statuses[f"{kind}: {type(exc).__name__}"] += 1
            self.faults.append(f"{exc!r} after {content[:200]!r}")
            return
        self.statuses[f"{kind}: {response.status_code}"] += 1
        unexpected = kind == "valid" and response.status_code != 200
        if response.status_code >= 500 or unexpected:
            self.faults.append(f"{response.text[:300]} after {content[:200]!r}")

    async def _hang_up(self, path: str) -> None:
        content = json.dumps(valid(self.rng, path)).encode()
        port = httpx.URL(self.base).port
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1{path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        request = f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content
        writer.write(request[: self.rng.randint(1, len(request))])
        await writer.drain()
        await asyncio.sleep(self.rng.choice((0, 0.002)))
        writer.close()
        await writer.wait_closed()
        self.statuses["hung up"] += 1


def main() -> int:
    """Start a server, send the requests, print what happened."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=float, default=40.0, help="MB that memory may grow")
    parser.add_argument(
        "--dtype",
        default="float32",
        help="of the model; in bfloat16 on a CPU, oneDNN keeps some dozens of kernels",
    )
    parser.add_argument("--hostile", type=int, default=0, help="send so many large ones instead")
    parser.add_argument("--at-once", type=int, default=4, help="of the large ones")
    asked = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        embedder = build_checkpoint(Path(folder, "embedder"), SHAPES["sentence-transformers"])
        reranker = build_reranker(Path(folder, "reranker"))
        command = [sys.executable, "-m", "shared_engine.cli", "serve", "--model", str(embedder)]
        command += ["--rerank-model", str(reranker), "--rerank-served-name", RERANKER]
        command += ["--served-name", NAME, "--port", str(port), "--log-level", "warning"]
        command += ["--dtype", asked.dtype]
        root = Path(__file__).parents[2]
        with subprocess.Popen(command, cwd=root, env=os.environ | {"OMP_NUM_THREADS": "1"}) as sub:
            try:
                fuzz = Fuzz(port, psutil.Process(sub.pid), asked.requests, asked.seed)
                _wait_until_ready(fuzz.base)
                if asked.hostile:
                    return _survive(fuzz, asked.hostile, asked.at_once)
                started = time.perf_counter()
                asyncio.run(fuzz.run())
                wall = time.perf_counter() - started
                fuzz.memory.append(fuzz.process.memory_info().rss / 2**20)
                queue = httpx.get(f"{fuzz.base}/metrics").text
            finally:
                sub.terminate()
    seconds = sorted(fuzz.seconds)
    print(f"{asked.requests} requests in {wall:.0f} s")
    for status, count in sorted(fuzz.statuses.items()):
        print(f"  {status:24} {count}")
    print(f"slowest {seconds[-1]:.2f} s, median {1000 * seconds[len(seconds) // 2]:.0f} ms")
    print("memory (MB):", " ".join(f"{size:.0f}" for size in fuzz.memory))
    growth = fuzz.memory[-1] - fuzz.memory[1]
    print(f"grown by {growth:.0f} MB since the first tenth")
    left = next(line for line in queue.splitlines() if line.startswith("nemoretriever_queue"))
    print(left)
    for fault in fuzz.faults[:5]:
        print("FAULT", fault)
    return 1 if fuzz.faults or growth > asked.growth or not left.endswith(" 0.0") else 0


def _survive(fuzz: Fuzz, requests: int, at_once: int) -> int:
    before = fuzz.process.memory_info().rss / 2**20
    started = time.perf_counter()
    faults = asyncio.run(attack(fuzz.base, fuzz.process, requests, at_once))
    after = fuzz.process.memory_info().rss / 2**20
    print(f"{requests} hostile requests in {time.perf_counter() - started:.0f} s, {faults} faults")
    print(f"memory: {before:.0f} MB before, {after:.0f} MB after: {after / before:.2f} times")
    return 1 if faults or after > 1.5 * before else 0


def _wait_until_ready(base: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{base}/health/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.1)
    raise TimeoutError(base)


if __name__ == "__main__":
    sys.exit(main())
