"""A GPU's memory goes back to the system, and workspaces that others use stay."""

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
def calls(monkeypatch) -> list[str]:
    """What torch is asked to release, in order."""
    made: list[str] = []
    clear = "_cuda_clearCublasWorkspaces"
    monkeypatch.setattr(torch._C, clear, lambda: made.append("workspaces"), raising=False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: made.append("cache"))
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    return made


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
    return lambda: LocalBackend(Options(model=checkpoint), load)


def test_the_last_engine_on_a_gpu_frees_the_workspaces_of_cublas(calls, open_backend):
    first, second = open_backend(), open_backend()
    first.close()
    assert calls == ["cache"] * 2  # the second computes with the workspaces
    calls.clear()
    second.close()
    assert calls[-2:] == ["workspaces", "cache"]


def test_an_engine_on_a_cpu_keeps_no_workspace(calls, open_backend, checkpoint, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(backend, "select_devices", device.select_devices)
        on_cpu = LocalBackend(Options(model=checkpoint, device="cpu"))
    open_backend().close()
    assert calls[-2:] == ["workspaces", "cache"]
    on_cpu.close()


def test_a_cache_that_torch_cannot_empty_is_left_as_it_is(calls, open_backend, monkeypatch):
    """It refuses after a recording of graphs that failed; a worker must not end of it."""
    refuse = mock.Mock(side_effect=RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED"))
    monkeypatch.setattr(torch.cuda, "empty_cache", refuse)
    ended: list[object] = []
    monkeypatch.setattr(threading, "excepthook", ended.append)
    open_backend().close()
    assert refuse.called
    assert not ended


def test_each_encoder_is_loaded_with_its_gpu_as_the_current_one(checkpoint):
    loaded: list[tuple[str, int]] = []

    def load(_: Any, placement: Placement, __: int) -> Any:
        loaded.append((str(placement.device), torch.cuda.current_device()))
        return types.SimpleNamespace(device=torch.device("cpu"), description="", runs_ahead=False)

    with fake_gpu(count=2):
        LocalBackend(Options(model=checkpoint, device="cuda:1,cuda:0"), load).close()
    assert loaded == [("cuda:1", 1), ("cuda:0", 0)]
