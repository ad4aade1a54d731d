"""The health of a replica: that of its app, without the cluster around it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from shared_engine import EngineError, Options
from shared_engine.distributed.serving import Replicas, _create_app, _Replica


def check_health(folder: Path) -> None:
    replica = _Replica()
    replica.app = _create_app(Replicas(options=Options(model=str(folder), device="cpu")))

    async def run() -> None:
        async with replica.app.router.lifespan_context(replica.app):
            await replica.check_health()  # which waits until the model is loaded
            assert replica.app.state.failures == []
            await replica.check_health()

    asyncio.run(run())


def test_a_replica_is_healthy_when_its_model_is_loaded(checkpoint: Path) -> None:
    check_health(checkpoint)


def test_a_replica_whose_model_cannot_be_loaded_has_the_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(
        EngineError, match=r"no request can be answered: .*architectures is missing"
    ):
        check_health(tmp_path)
