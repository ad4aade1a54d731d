"""Ten thousand inputs through a server that misbehaves, over real sockets."""

from __future__ import annotations

import asyncio
import logging
import threading
import time

import numpy as np
import pytest

from shared_engine import ConnectionFailedError, Embedder, Options, PartialResultError
from tests.support.faulty_nim import FAULTS, FaultyNim
from tests.support.nim import vectors

RATES = {
    "429": 0.10,
    "503": 0.05,
    "reset": 0.03,
    "slow": 0.03,
    "truncated": 0.03,
    "missing": 0.02,
    "doubled": 0.02,
    "nan": 0.02,
}
TEXTS = [f"text {i} of ten thousand" for i in range(10_000)]


def embedder(nim: FaultyNim, **options: object) -> Embedder:
    return Embedder(Options(model="nvidia/m", base_url=nim.url, **options))


def assert_right_and_once(nim: FaultyNim, out: np.ndarray, texts: list[str]) -> None:
    np.testing.assert_allclose(out, vectors(texts), atol=1e-6)
    assert set(nim.answered) == set(texts)
    assert set(nim.answered.values()) == {1}, "a text was sent again after its vector had arrived"


@pytest.mark.slow
def test_every_row_arrives_correctly_and_once_through_every_fault() -> None:
    with FaultyNim(RATES, latency=0.005) as nim, embedder(nim, max_batch_size=20) as engine:
        out = asyncio.run(engine.aembed(TEXTS))  # the same test with images is synchronous
        assert set(nim.happened) == set(FAULTS), "a fault never happened"
        assert_right_and_once(nim, out, TEXTS)
        assert engine.usage == 5 * len(TEXTS)


@pytest.mark.slow
def test_every_row_arrives_though_the_server_is_killed_and_restarted() -> None:
    with FaultyNim({"503": 0.05, "reset": 0.03}, latency=0.05) as nim, embedder(nim) as engine:

        def kill_and_restart() -> None:
            while len(nim.embedded) < 60:
                time.sleep(0.01)
            nim.down()
            time.sleep(1.0)
            nim.up()

        killer = threading.Thread(target=kill_and_restart)
        killer.start()
        out = engine.embed(TEXTS)
        killer.join()
        assert_right_and_once(nim, out, TEXTS)


def test_vectors_are_kept_when_the_server_dies() -> None:
    with FaultyNim(latency=0.02) as nim, embedder(nim, max_retries=0) as engine:

        def kill() -> None:
            while len(nim.embedded) < 60:
                time.sleep(0.005)
            nim.down()

        killer = threading.Thread(target=kill)
        killer.start()
        with pytest.raises(PartialResultError) as caught:
            engine.embed(TEXTS)
        killer.join()
        failed = caught.value.errors
        assert 0 < len(failed) < len(TEXTS)
        assert {type(error) for error in failed.values()} == {ConnectionFailedError}
        kept = [row for row in range(len(TEXTS)) if row not in failed]
        expected = vectors([TEXTS[row] for row in kept])
        np.testing.assert_allclose(caught.value.vectors[kept], expected, atol=1e-6)
        assert np.isnan(caught.value.vectors[list(failed)]).all()


def test_fewer_requests_are_in_flight_while_the_server_is_busy(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "shared_engine")
    with FaultyNim({"429": 0.3}, 0.005) as nim, embedder(nim, max_batch_size=10) as engine:
        engine.embed(TEXTS[:600])
        assert "at most 10 requests in flight" in caplog.text
        nim.rates = {}
        nim.latency = 0.1  # or the server is done before there are many
        nim.most_in_flight = 0
        engine.embed(TEXTS[:3000])
        assert nim.most_in_flight > 10, "the limit did not recover"
