"""Ray on this machine, by our command line: whatever is killed, the files are a local run's."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NoReturn

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from shared_engine import ConfigurationError, Embedder, EngineError, Options
from shared_engine.bulk.batch import EmbedBatch
from shared_engine.bulk.job import Fragment, Job
from shared_engine.bulk.run import find_work
from shared_engine.cli.main import main
from shared_engine.distributed.bulk import embed_fragments
from shared_engine.distributed.nodes import Share, connect
from tests.conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),  # of its own settings
]

ROWS, ROWS_PER_FILE = 6_000, 300
HERE = ["--dtype", "float32", "--device", "cpu"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    lines = (json.dumps({"id": n, "text": f"passage {n} about {n % 13}"}) for n in range(ROWS))
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Run our command line in another process, with a cluster of its own, until the test ends."""
    begun = []

    environment = os.environ | {"PYTHONPATH": str(ROOT), "RAY_ADDRESS": "local"}

    def run(*arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "shared_engine.cli", *arguments]
        with (tmp_path / f"log-{len(begun)}").open("wb") as log:
            begun.append(
                subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            )
        return begun[-1]

    yield run
    for process in begun:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(60)


def embed(source: Path, out: Path, checkpoint: Path) -> list[str]:
    return [
        *("embed", str(source), "--out", str(out), "--model", str(checkpoint), *HERE),
        *("--id-column", "id", "--rows-per-file", str(ROWS_PER_FILE), "--max-batch-tokens", "512"),
    ]


def find_processes(title: bytes) -> list[int]:
    """Return the ids of processes whose command line begins so."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().startswith(title):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def wait_for(is_so: Callable[[], object], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not is_so():
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until
        time.sleep(0.01)


def assert_same(one: Path, other: Path) -> None:
    names = sorted(path.name for path in (one / "vectors").iterdir())
    assert names == sorted(path.name for path in (other / "vectors").iterdir())
    assert len(names) == ROWS // ROWS_PER_FILE
    for name in names:
        ours, theirs = (pq.read_table(folder / "vectors" / name) for folder in (one, other))
        assert ours.schema.equals(theirs.schema, check_metadata=True)
        assert ours.drop_columns("vector").equals(theirs.drop_columns("vector"))
        rows = [np.stack(t["vector"].to_numpy(zero_copy_only=False)) for t in (ours, theirs)]
        np.testing.assert_allclose(*rows, atol=1e-6)


@pytest.mark.parametrize("killed", ["nothing", "actor", "driver"])
def test_a_cluster_writes_what_one_machine_does(
    killed: str,
    source: Path,
    checkpoint: Path,
    tmp_path: Path,
    begin: Callable[..., subprocess.Popen[bytes]],
) -> None:
    out = tmp_path / "cluster"
    vectors = out / "vectors"
    command = [*embed(source, out, checkpoint), "--ray", "--workers", "1"]
    process = begin(*command)
    if killed != "nothing":
        wait_for(lambda: vectors.is_dir() and len(list(vectors.glob("*.parquet"))) >= 2, process)
    if killed == "actor":
        actors = find_processes(b"ray::Worker")
        assert actors
        for actor in actors:
            os.kill(actor, signal.SIGKILL)
    if killed == "driver":
        process.kill()
        process.wait()
        assert len(list(vectors.glob("*.parquet"))) < ROWS // ROWS_PER_FILE, "killed too late"
        time.sleep(5)  # Ray ends what belonged to it
        process = begin(*command)
    assert process.wait(240) == 0, (tmp_path / "log-0").read_text()
    assert main(embed(source, tmp_path / "here", checkpoint)) == 0
    assert_same(out, tmp_path / "here")


def test_a_node_that_dies_for_good_costs_no_more_than_what_it_had_in_hand(
    source: Path,
    checkpoint: Path,
    tmp_path: Path,
    begin: Callable[..., subprocess.Popen[bytes]],
) -> None:
    """Nor does the run wait for it: the other node has no room for a second worker."""
    from ray.cluster_utils import Cluster

    out = tmp_path / "cluster"
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        doomed = cluster.add_node(num_cpus=1)
        command = [*embed(source, out, checkpoint), "--ray", cluster.address, "--workers", "2"]
        process = begin(*command, "--log-level", "info")

        def is_time() -> bool:
            vectors = out / "vectors"
            return vectors.is_dir() and len(list(vectors.glob("*.parquet"))) >= 4

        wait_for(is_time, process)
        cluster.remove_node(doomed, allow_graceful=False)
        assert process.wait(240) == 0, (tmp_path / "log-0").read_text()
    finally:
        cluster.shutdown()
    log = (tmp_path / "log-0").read_text()
    assert "fragments ended with their workers, and are begun again" in log
    assert f"{ROWS:,} rows done, 0 failed, 0 skipped" in log
    assert main(embed(source, tmp_path / "here", checkpoint)) == 0
    assert_same(out, tmp_path / "here")


class DeadlyFragment(Fragment):
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple[Callable[[int], NoReturn], tuple[int]]:
        return os._exit, (1,)


def test_an_address_of_another_kind_is_no_cluster():
    refused = pytest.raises(ConfigurationError, match="there is no Ray cluster at an address")
    with refused, connect("an address"):
        pass


def test_a_fragment_that_ends_every_worker_is_named(source: Path, tmp_path: Path) -> None:
    job = Job((str(source),), str(tmp_path / "out"), rows_per_file=ROWS)
    (fragment,) = find_work(job).fragments
    deadly = DeadlyFragment(**dataclasses.asdict(fragment))
    with (
        connect("local"),
        pytest.raises(EngineError, match=r"1 fragments ended .* 3 times, those of in\.jsonl among"),
    ):
        list(embed_fragments(job, [deadly], 1, Share(1, 0)))


def test_a_new_cluster_listens_on_loopback_only_and_follows_no_file(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import psutil
    import ray

    with TemporaryDirectory(prefix="ray-") as folder:  # short, for the paths of sockets
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.delenv("RAY_ADDRESS", raising=False)
        monkeypatch.delenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", raising=False)
        planted = Path(folder, "ray", "ray_current_cluster")
        planted.parent.mkdir()
        planted.write_text("192.0.2.1:6379")
        with connect(None):
            assert [node["NodeManagerAddress"] for node in ray.nodes()] == ["127.0.0.1"]
            ray.get(ray.remote(lambda: None).remote())  # now there is a worker
            processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
            connections = [each for process in processes for each in process.net_connections()]
            listening = {each.laddr.ip for each in connections if each.status == "LISTEN"}
        assert listening <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
        assert listening
    assert "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER" not in os.environ


def test_embed_batch_in_a_pipeline_of_ones_own(checkpoint: Path) -> None:
    """As its docstring has it, but for the GPU."""
    import ray

    options = Options(model=str(checkpoint), dtype="float32", device="cpu")
    texts = [f"passage {n}" for n in range(1_000)]
    with connect("local"):
        embedded = ray.data.from_items([{"n": n, "passage": text} for n, text in enumerate(texts)])
        embedded = embedded.map_batches(
            EmbedBatch,
            fn_constructor_kwargs={"text_column": "passage", "options": options},
            batch_format="pyarrow",
            batch_size=100,
            num_cpus=1,
            compute=ray.data.ActorPoolStrategy(
                size=1, max_concurrent_calls_per_actor=2, enable_true_multi_threading=True
            ),
        )
        tables = list(embedded.iter_batches(batch_size=None, batch_format="pyarrow"))
    table = pa.concat_tables(tables).sort_by("n")
    assert table["passage"].to_pylist() == texts
    assert table.schema.field("vector").type == pa.list_(pa.float32(), 64)
    found = np.stack(table["vector"].to_numpy(zero_copy_only=False))
    with Embedder(options) as embedder:
        np.testing.assert_allclose(found, embedder.embed(texts), atol=1e-6)


Serve = Callable[..., tuple[subprocess.Popen[bytes], str]]


@pytest.fixture
def serve(checkpoint: Path, begin: Callable[..., subprocess.Popen[bytes]]) -> Serve:
    """Serve with replicas of half a core; return the process and its address when it is ready."""

    def run(*arguments: str) -> tuple[subprocess.Popen[bytes], str]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        url = f"http://127.0.0.1:{port}/v1"
        share = ("--port", str(port), "--cpus-per-replica", "0.5")
        process = begin("serve", "--model", str(checkpoint), *HERE, *share, *arguments)

        def is_ready() -> bool:
            try:
                return httpx.get(f"{url}/health/ready").is_success
            except httpx.HTTPError:
                return False

        wait_for(is_ready, process)
        return process, url

    return run


def post(client: httpx.Client, url: str, texts: list[str]) -> httpx.Response:
    """Ask as a client does that does not try again."""
    body = {"model": "checkpoint", "input": texts, "input_type": "query"}
    return client.post(f"{url}/embeddings", json=body)


def test_replicas_are_added_for_the_load_and_finish_what_they_have_when_stopped(
    serve: Serve,
) -> None:
    process, url = serve(
        *("--served-name", "checkpoint", "--max-batch-tokens", "256"),
        *("--replicas", "1", "--max-replicas", "2"),
    )
    assert len(find_processes(b"ray::ServeReplica")) == 1
    texts = [f"passage {n} " + "of many words " * 40 for n in range(20)]
    are_enough = threading.Event()

    def ask() -> int:
        asked = 0
        with httpx.Client(timeout=120) as client:
            while not are_enough.is_set():
                assert post(client, url, texts).is_success
                asked += 1
        return asked

    with ThreadPoolExecutor(64) as pool:  # four times what a replica is to have
        asking = [pool.submit(ask) for _ in range(64)]
        try:
            wait_for(lambda: len(find_processes(b"ray::ServeReplica")) == 2, process)
        finally:
            are_enough.set()
    assert all(each.result() for each in asking)

    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=120) as client:
        last = pool.submit(post, client, url, texts * 25)
        time.sleep(1)
        assert not last.done()
        process.terminate()
        assert last.result().is_success
        assert len(last.result().json()["data"]) == 500
    assert process.wait(60) == 0


def test_a_replica_that_dies_costs_our_client_nothing(
    checkpoint: Path, serve: Serve, record_property: Callable[[str, object], None]
) -> None:
    process, url = serve("--served-name", "checkpoint", "--replicas", "2")
    replicas = find_processes(b"ray::ServeReplica")
    assert len(replicas) == 2
    version = httpx.get(f"{url}/version", headers={"x-request-id": "abc"})
    assert version.headers.get_list("x-request-id") == ["abc"]
    assert len(httpx.get(f"{url}/version").headers.get_list("x-request-id")) == 1
    texts = [f"passage {n}" for n in range(200)]
    expected = Embedder(Options(model=str(checkpoint), dtype="float32", device="cpu")).embed(texts)
    asked = lost = 0
    done = threading.Event()

    def ask() -> None:
        nonlocal asked, lost
        with httpx.Client(timeout=60) as client:
            while not done.is_set():
                asked += 1
                try:
                    lost += not post(client, url, ["a"]).is_success
                except httpx.HTTPError:
                    lost += 1

    foreign = threading.Thread(target=ask)
    foreign.start()
    try:
        with Embedder(Options(base_url=url)) as embedder:
            until = time.monotonic() + 15
            for call in range(1_000_000):
                np.testing.assert_allclose(embedder.embed(texts), expected, atol=1e-6)
                if call == 5:
                    os.kill(replicas[0], signal.SIGKILL)
                if call > 20 and time.monotonic() > until:
                    break
    finally:
        done.set()
        foreign.join()
    record_property("lost_by_a_client_without_retries", f"{lost} of {asked}")
    print(f"a client that does not try again lost {lost} of {asked} requests")
    wait_for(lambda: len(find_processes(b"ray::ServeReplica")) == 2, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
