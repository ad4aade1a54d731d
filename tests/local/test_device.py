"""Device, number type and step are decided once, and say why."""

from __future__ import annotations

import pytest
import torch

from shared_engine.errors import ConfigurationError
from shared_engine.local import device
from shared_engine.local.config import ModelConfig

CUDA = torch.device("cuda", 0)
SHAPES = {"300M": (9, 3840), "1B": (16, 8192), "tiny": (2, 128)}


def config(name: str) -> ModelConfig:
    layers, inner = SHAPES[name]
    return ModelConfig.model_validate(
        {
            "vocab_size": 128_256,
            "hidden_size": 2048,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "max_position_embeddings": 131_072,
            "rope_theta": 5e5,
        }
    )


@pytest.mark.parametrize(
    ("free_mb", "model", "step"),
    [
        (79_000, "300M", 16_384),
        (79_000, "tiny", 16_384),
        (79_000, "1B", 6_144),  # else a search would wait 130 to 170 ms behind an ingest
        (6_000, "300M", 6_000),
        (300, "1B", 1_024),
    ],
)
def test_a_gpus_step_takes_some_25_ms_and_fits_its_free_memory(monkeypatch, free_mb, model, step):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_mb * 2**20, 80 * 2**30))
    size, why = device._select_step(CUDA, config(model))
    assert size == step
    assert f"{free_mb:,} MB are free" in why


def test_devices_share_the_smallest_step(monkeypatch):
    steps = iter([(16_384, "much is free"), (4_000, "little is free")])
    monkeypatch.setattr(device, "_select_step", lambda *_: next(steps))
    placements = device.select_devices("cpu,cpu", "float32", None, config("tiny"))
    assert [placement.tokens_per_step for placement in placements] == [4_000, 4_000]


@pytest.mark.parametrize(
    ("gain", "dtype", "said"),
    [
        (2.13, torch.bfloat16, "this CPU multiplies bfloat16 2.1 times as fast as float32"),
        (1.0, torch.float32, "does not multiply bfloat16 faster"),
        (0.1, torch.float32, "does not multiply bfloat16 faster"),
    ],
)
def test_a_cpu_has_bfloat16_where_that_was_measured_to_be_faster(monkeypatch, gain, dtype, said):
    monkeypatch.setattr(device, "measure_bfloat16_gain", lambda: gain)
    (placement,) = device.select_devices("cpu", "auto", None, config("tiny"))
    assert placement.dtype == dtype
    assert said in placement.description


def test_the_gain_of_bfloat16_is_measured_within_50_ms_and_leaves_no_thread(python):
    """Where oneDNN only emulates it, nothing is multiplied at all."""
    said = python(
        "import threading, time, torch\n"
        "from shared_engine.local import device\n"
        "torch.set_num_threads(1)\n"
        "device._race_dtypes()\n"  # the libraries load
        "start = time.perf_counter()\n"
        "gain = device.measure_bfloat16_gain()\n"
        "print(time.perf_counter() - start, threading.active_count())\n"
        "assert device.measure_bfloat16_gain() == gain\n"
        "device.measure_bfloat16_gain.cache_clear()\n"
        "torch.ops.mkldnn._is_mkldnn_bf16_supported = lambda: False\n"
        "device._race_dtypes = None\n"
        "assert device.measure_bfloat16_gain() == 0\n"
    )
    seconds, threads = said.split()
    assert float(seconds) < 0.5  # 0.04 where nothing else runs
    assert threads == "1"


def test_a_fork_of_a_process_that_used_the_gpu_is_told_to_spawn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    for name in ("auto", "cuda", "cuda:0"):
        with pytest.raises(ConfigurationError, match=r'forked .* start it with "spawn"'):
            device.select_devices(name, "auto", None, config("tiny"))
    assert device.select_devices("cpu", "auto", None, config("tiny"))


def test_a_step_that_is_asked_for_is_taken():
    (placement,) = device.select_devices("cpu", "float32", 77, config("tiny"))
    assert placement.tokens_per_step == 77
    assert "step: asked for" in placement.description


@pytest.mark.parametrize(
    ("name", "said"), [("moon", "not one torch knows"), ("cuda:0", "sees no CUDA GPU")]
)
def test_a_device_that_is_not_there_is_refused(monkeypatch, name, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=said):
        device.select_devices(name, "auto", None, config("tiny"))


def test_memory_that_is_not_there_is_not_reserved():
    buffer = device.Buffer(device.select_devices("cpu", "float32", None, config("tiny"))[0])
    buffer.reserve(4, 100)
    memory = buffer(1).data_ptr()
    assert buffer(4, 100).data_ptr() == memory  # nothing grew
    exhausted = torch.OutOfMemoryError("CUDA out of memory")

    class Full:
        def new_empty(self, size):
            raise exhausted

    buffer._empty = Full()
    buffer.reserve(5, 100)
