"""Device, number type and step are decided once, and say why."""

from __future__ import annotations

import platform
import types

import pytest
import torch

from shared_engine.errors import ConfigurationError
from shared_engine.local import device, memory
from tests.support.configs import config

CUDA = torch.device("cuda", 0)
FIND = device.find_bfloat16_instructions
"""The true one, which all tests run without."""


@pytest.mark.parametrize(
    ("gpu", "free_mb", "model", "step"),
    [
        ("H100", 79_000, "300M", 16_384),
        ("H100", 79_000, "tiny", 16_384),
        ("H100", 79_000, "1B", 6_400),  # else a search would wait 130 to 170 ms behind an ingest
        ("H100", 6_000, "300M", 6_000),
        ("H100", 300, "1B", 1_024),
        ("A100", 79_000, "300M", 6_400),
        ("L4", 23_000, "300M", 2_304),  # 8 times slower than an H100
        ("L4", 23_000, "1B", 1_024),
    ],
)
def test_a_gpus_step_takes_some_26_ms_and_fits_its_free_memory(
    monkeypatch, gpu, free_mb, model, step
):
    sms, major, minor = {"H100": (132, 9, 0), "A100": (108, 8, 0), "L4": (58, 8, 9)}[gpu]
    made = types.SimpleNamespace(multi_processor_count=sms, major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: made)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free_mb * 2**20, 80 * 2**30))
    size, why = device._select_step(CUDA, config(model))
    assert size == step
    assert f"{free_mb:,} MB are free" in why


def test_devices_share_the_smallest_step(monkeypatch):
    steps = iter([(16_384, "much is free"), (4_000, "little is free")])
    monkeypatch.setattr(device, "_select_step", lambda *_: next(steps))
    placements = device.select_devices("cpu,cpu", "float32", None, config("tiny"))
    assert [placement.max_batch_tokens for placement in placements] == [4_000, 4_000]


@pytest.mark.parametrize(
    ("has", "dtype", "said"),
    [
        ("amx avx512", torch.bfloat16, "this CPU has bfloat16 instructions (AMX)"),
        ("avx512", torch.bfloat16, "this CPU has bfloat16 instructions (AVX512_BF16)"),
        ("arm", torch.bfloat16, "this CPU has bfloat16 instructions (BF16)"),
        ("", torch.float32, "this CPU has no bfloat16 instructions"),
    ],
)
def test_a_cpu_has_bfloat16_where_it_multiplies_it(monkeypatch, has, dtype, said):
    """Told by the processor and not by a race, whose end another program may decide."""
    monkeypatch.setattr(device, "find_bfloat16_instructions", FIND)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: "amx" in has)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: "avx512" in has)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)  # emulated
    monkeypatch.setattr(platform, "machine", lambda: "aarch64" if "arm" in has else "x86_64")
    (placement,) = device.select_devices("cpu", "auto", None, config("tiny"))
    assert placement.dtype == dtype
    assert said in placement.description


def test_a_fork_of_a_process_that_used_the_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: True)
    for name in ("auto", "cuda", "cuda:0"):
        with pytest.raises(ConfigurationError, match=r'forked .* start it with .*"spawn"'):
            device.select_devices(name, "auto", None, config("tiny"))
    assert device.select_devices("cpu", "auto", None, config("tiny"))


def test_a_requested_step_size_is_used():
    (placement,) = device.select_devices("cpu", "float32", 77, config("tiny"))
    assert placement.max_batch_tokens == 77
    assert "step: requested" in placement.description


@pytest.mark.parametrize(
    ("name", "said"), [("moon", "is unknown to torch"), ("cuda:0", "finds no CUDA GPU")]
)
def test_an_unavailable_device_is_refused(monkeypatch, name, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigurationError, match=said):
        device.select_devices(name, "auto", None, config("tiny"))


def test_a_reserve_without_memory_does_nothing():
    buffer = memory.Buffer(device.select_devices("cpu", "float32", None, config("tiny"))[0])
    buffer.reserve(4, 100)
    address = buffer(1).data_ptr()
    assert buffer(4, 100).data_ptr() == address  # nothing grew
    exhausted = torch.OutOfMemoryError("CUDA out of memory")

    class Full:
        def new_empty(self, size):
            raise exhausted

    buffer._empty = Full()
    buffer.reserve(5, 100)
