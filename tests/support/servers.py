"""A server of the tests: our app on uvicorn, in a thread, with a client."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import uvicorn
from numpy.typing import NDArray
from prometheus_client.parser import text_string_to_metric_families

from shared_engine import Embedder, Options
from shared_engine.server.app import create_app
from shared_engine.server.run import build_server

NAME = "nvidia/tiny"
RERANKER = "nvidia/tiny-rerank"
QUERY = "how do I return it?"
TEXTS = [
    "How do I return a product?",
    "",
    "Der Versand kostet 4,90 €.",
    "a text of many words " * 30,
    "東京は日本の首都です。 👍🏽",
    "def f(x):\n    return x",
    "<img src='data:image/png;base64,AAAA'>",
]


class Running:
    """A server that runs, and the options of what it serves."""

    def __init__(self, url: str, options: Options, server: uvicorn.Server) -> None:
        self.url = url
        self.options = options
        self.server = server
        self.client = httpx.Client(base_url=url, timeout=30)

    def post(self, **fields: Any) -> httpx.Response:
        """Post the fields of a request; those given as None are left out."""
        body = {"model": NAME, "input": TEXTS, "input_type": "passage"} | fields
        return self.client.post("/embeddings", json={k: v for k, v in body.items() if v is not ...})

    def rank(self, path: str = "/ranking", **fields: Any) -> httpx.Response:
        """Post a request of a reranker; fields given as ... are left out."""
        own: dict[str, Any] = {"passages": [{"text": text} for text in TEXTS]}
        own |= {"query": {"text": QUERY}}
        if path == "/rerank":
            own = {"query": QUERY, "documents": TEXTS}
        body = {"model": RERANKER} | own | fields
        return self.client.post(path, json={k: v for k, v in body.items() if v is not ...})

    def expected(self, texts: list[str] = TEXTS, role: Any = "document", **changed: Any) -> Any:
        """Return what the engine gives without HTTP."""
        with Embedder(self.options.model_copy(update=changed)) as embedder:
            return embedder.embed(texts, role)

    def metric(self, name: str) -> float:
        """Return the value of the only sample of /v1/metrics with this name and these labels."""
        labels = dict(re.findall(r'(\w+)="([^"]*)"', name)).items()
        (found,) = [
            sample.value
            for family in text_string_to_metric_families(self.client.get("/metrics").text)
            for sample in family.samples
            if sample.name == name.partition("{")[0] and labels <= sample.labels.items()
        ]
        return float(found)


@contextmanager
def running(
    options: Options | None, http: str | None = None, served: str | None = NAME, **arguments: Any
) -> Iterator[Running]:
    """Run a server in a thread until the block ends: our own, or one of an HTTP parser's name."""
    app = create_app(options, served_name=served, **arguments)
    if http is None:
        server = build_server(app, arguments.get("limits"), port=0, log_config=None)
    else:
        config = uvicorn.Config(
            app,
            port=0,
            http=http,
            lifespan="on",
            ws="none",
            log_config=None,
        )
        server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        wait_for(lambda: server.started)
        port = server.servers[0].sockets[0].getsockname()[1]
        here = Running(f"http://127.0.0.1:{port}/v1", options or Options(), server)
        with here.client:
            wait_for(lambda: here.client.get("/health/ready").status_code == 200)
            yield here
    finally:
        server.should_exit = True
        thread.join(30)
    assert not thread.is_alive()


def wait_for(condition: Callable[[], bool], seconds: float = 30) -> None:
    """Return when a condition holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def vectors(response: httpx.Response) -> NDArray[Any]:
    """Return the vectors of a reply, after a look at everything else in it."""
    assert response.status_code == 200, response.text
    body = response.json()
    assert set(body) == {"object", "data", "model", "usage"}
    assert body["object"] == "list"
    assert body["model"] == NAME
    assert [item["index"] for item in body["data"]] == list(range(len(body["data"])))
    assert {item["object"] for item in body["data"]} == {"embedding"}
    assert body["usage"]["prompt_tokens"] == body["usage"]["total_tokens"] > 0
    return np.array([item["embedding"] for item in body["data"]])


def check_probes_during(post: Callable[[], httpx.Response], served: Running) -> None:
    """Post a request, and check that health probes are answered quickly until its response.

    The limits grow with the time of the request, as all times do on a busy machine. A blocked event
    loop would hold one probe for nearly all of it.
    """
    waits = []
    begun = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        response = pool.submit(post)
        while not response.done():
            started = time.perf_counter()
            assert served.client.get("/health/live").status_code == 200
            waits.append(time.perf_counter() - started)
            time.sleep(0.005)
    seconds = time.perf_counter() - begun
    assert response.result().status_code == 200
    assert np.median(waits) < max(0.1, seconds / 20)
    assert max(waits) < max(1, seconds / 2)
