"""A GPU's memory goes back to the system, and each encoder is loaded on its own GPU."""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from shared_engine.local import backend, device
from shared_engine.local.backend import LocalBackend
from shared_engine.local.checkpoint import Checkpoint
from shared_engine.local.config import ModelConfig
from shared_engine.local.device import Placement
from shared_engine.local.llama import Encoder
from shared_engine.options import Options
from tests.support.fake_gpu import fake_gpu


@pytest.fixture
def open_backend(checkpoint: Path, monkeypatch) -> Callable[[], LocalBackend]:
    """Open a backend on two GPUs; they are a CPU, and its encoder passes for one of a GPU."""
    select = device.select_devices
    gpu = types.SimpleNamespace(type="cuda")

    def select_devices(_: str, __: str, ___: None, config: ModelConfig) -> list[Placement]:
        placements = select("cpu,cpu", "float32", None, config)
        return [replace(placement, device=gpu) for placement in placements]

    def load(found: Checkpoint, placement: Placement, size: int) -> Encoder:
        encoder = Encoder(found, replace(placement, device=torch.device("cpu")), size)
        encoder.device = gpu
        return encoder

    monkeypatch.setattr(backend, "select_devices", select_devices)
    monkeypatch.setattr(backend, "make_current", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    return lambda: LocalBackend(Options(model=checkpoint), load)


def test_a_cache_that_torch_cannot_empty_is_left_as_it_is(open_backend, monkeypatch):
    """It refuses after a recording of graphs that failed; a worker must not end of it."""
    refuse = mock.Mock(side_effect=RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED"))
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    ended: list[object] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    open_backend().close()
    assert refuse.call_count == 2  # devices
    assert not ended


def test_each_encoder_is_loaded_with_its_gpu_as_the_current_one(checkpoint):
    loaded: list[tuple[str, int]] = []

    def load(_: Any, placement: Placement, __: int) -> Any:
        loaded.append((str(placement.device), torch.cuda.current_device()))
        return types.SimpleNamespace(device=torch.device("cpu"), description="", runs_ahead=False)

    with fake_gpu(count=2):
        LocalBackend(Options(model=checkpoint, device="cuda:1,cuda:0"), load).close()
    assert loaded == [("cuda:1", 1), ("cuda:0", 0)]
