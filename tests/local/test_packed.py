"""Packed weights give what plain ones give, where a CPU has them; else nothing changes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from shared_engine.local import packed
from shared_engine.local.checkpoint import resolve
from shared_engine.local.device import select_devices
from shared_engine.local.llama import Encoder
from shared_engine.options import Options

CPU = torch.device("cpu")
PACKS, WHY = packed.select(CPU, torch.bfloat16)


@pytest.mark.skipif(not PACKS, reason=f"weights stay {WHY}")
@pytest.mark.parametrize("tokens", [1, 63, 300])
def test_a_packed_gate_equals_a_plain_one(tokens):
    torch.manual_seed(0)
    x, gate, up = (torch.randn(n, 48).bfloat16() for n in (tokens, 100, 100))
    exact = F.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
    ours = packed.pack(gate, up)(x).double()
    assert ours.shape == (tokens, 100)
    assert (ours - exact).norm() / exact.norm() < 1e-2


@pytest.mark.skipif(not PACKS, reason=f"weights stay {WHY}")
def test_an_encoder_with_packed_weights_gives_the_same_vectors(checkpoint):
    found = resolve(Options(model=checkpoint))
    (placement,) = select_devices("cpu", "bfloat16", None, found.config)
    assert placement.packs_weights
    assert "weights: packed for oneDNN" in placement.reasons
    random = np.random.default_rng(0)
    ids = [random.integers(5, 300, n).astype(np.int32) for n in (7, 1, 33, 200)]
    ours = Encoder(found, placement)(ids).numpy()
    plain = Encoder(found, replace(placement, packs_weights=False))(ids).numpy()
    cosines = (ours * plain).sum(1) / np.linalg.norm(ours, axis=1) / np.linalg.norm(plain, axis=1)
    assert cosines.min() >= 0.9999


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "bfloat16")])
def test_only_a_cpu_in_bfloat16_packs(device, dtype):
    chosen = packed.select(torch.device(device), getattr(torch, dtype))
    assert chosen == (False, "not packed")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (RuntimeError("could not create a primitive\nmore"), "does not support it: could not"),
        (AttributeError("no such operator"), "does not support it: no such operator"),
        (None, "packed weights change values by"),
    ],
)
def test_a_cpu_that_cannot_pack_keeps_its_weights(monkeypatch, fault, said):
    def pack(gate, up):
        if fault:
            raise fault
        return lambda x: x + 100

    monkeypatch.setattr(packed, "pack", pack)
    packs, why = packed.select(CPU, torch.bfloat16)
    assert not packs
    assert said in why
    assert "\n" not in why
