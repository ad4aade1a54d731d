"""Rotation, gating and norms are what they are by definition; fused ones only where they agree."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from shared_engine import local
from shared_engine.local import elementwise
from tests.support.configs import config

CUDA = torch.device("cuda", 0)
DTYPES = {"float32": (torch.float32, 1e-6), "bfloat16": (torch.bfloat16, 2e-2)}


@pytest.fixture(params=list(DTYPES))
def dtype(request):
    torch.manual_seed(0)
    return DTYPES[request.param]


@pytest.mark.parametrize("tokens", [1, 127, 300])
def test_rotation_rotates_pairs_of_numbers(dtype, tokens):
    kind, tolerance = dtype
    packed = torch.randn(tokens, 7, 16).to(kind)
    angles = torch.randn(tokens, 8)
    cos, sin = angles.cos().to(kind), angles.sin().to(kind)
    x = packed[:, :5]
    x = elementwise.rotate(x, cos, sin, x.new_empty)
    pairs = torch.complex(*packed[:, :5].double().chunk(2, dim=-1))
    turned = pairs * torch.complex(cos.double(), sin.double())[:, None]
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(x.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tokens", [1, 127, 300])
def test_gating(dtype, tokens):
    kind, tolerance = dtype
    gate_up = torch.randn(tokens, 2 * 36).to(kind)
    gate, up = gate_up.double().chunk(2, dim=-1)
    ours = elementwise.gate(gate_up.clone()).double()
    torch.testing.assert_close(ours, gate * gate.sigmoid() * up, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("tokens", [1, 127, 300])
def test_the_norm(dtype, tokens):
    kind, tolerance = dtype
    x, weight = torch.randn(tokens, 64).to(kind) * 3, torch.randn(64).to(kind)
    before = x.clone()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt() * weight.double()
    ours = elementwise.rms_norm(x, weight, 0.1, x.new_empty, torch.empty)
    assert ours.dtype == kind
    torch.testing.assert_close(ours.double(), exact, atol=tolerance, rtol=tolerance / 4)
    assert torch.equal(x, before)


def test_a_cpu_has_torchs_operators():
    assert elementwise.select(torch.device("cpu"), torch.float32, config("tiny")) == (
        elementwise.EAGER,
        "torch's operators",
    )


@pytest.fixture
def fused(monkeypatch):
    """A module in place of the kernels, on a CPU that passes for a GPU."""
    module = types.SimpleNamespace(rotate=elementwise.rotate, gate=elementwise.gate)
    monkeypatch.setitem(sys.modules, "shared_engine.local.fused", module)
    monkeypatch.setattr(local, "fused", module, raising=False)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, _, kind: x.type(kind))
    return module


def test_a_gpu_has_the_fused_kernels_where_they_agree(fused):
    chosen, why = elementwise.select(CUDA, torch.bfloat16, config("300M"))
    assert (chosen.rotate, chosen.gate) == (fused.rotate, fused.gate)
    assert why == "Triton's kernels"


def raising(error):
    def kernel(*_):
        raise error

    return kernel


@pytest.mark.parametrize(
    ("name", "kernel", "said"),
    [
        ("gate", lambda x: x.chunk(2, dim=-1)[1], "their values differ by"),
        ("gate", lambda x: elementwise.gate(x) * torch.nan, "differ by nan"),
        ("rotate", lambda x, *_: x, "their values differ by"),
        ("rotate", raising(RuntimeError("Failed to find C compiler.\nLong")), "C compiler."),
        ("gate", raising(KeyError("sm_42")), "sm_42"),
        ("gate", raising(AssertionError()), "AssertionError"),
    ],
)
def test_kernels_that_fail_or_differ_change_nothing_but_the_description(fused, name, kernel, said):
    setattr(fused, name, kernel)
    chosen, why = elementwise.select(CUDA, torch.bfloat16, config("300M"))
    assert chosen is elementwise.EAGER
    assert why.startswith("torch's operators, because Triton's kernels are not usable: ")
    assert said in why
    assert "\n" not in why


def test_a_gpu_that_is_lost_ends_the_choice(fused, monkeypatch):
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    fused.gate = raising(lost)
    monkeypatch.setattr(torch.cuda, "synchronize", raising(lost))
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        elementwise.select(CUDA, torch.bfloat16, config("300M"))


def test_a_machine_without_triton_has_torchs_operators(monkeypatch):
    monkeypatch.delitem(sys.modules, "shared_engine.local.fused", raising=False)
    monkeypatch.delattr(local, "fused", raising=False)
    monkeypatch.setitem(sys.modules, "triton", None)
    chosen, why = elementwise.select(CUDA, torch.bfloat16, config("300M"))
    assert chosen is elementwise.EAGER
    assert "triton" in why


def test_a_head_without_two_halves_of_a_power_of_two_has_torchs_operators(fused):
    odd = config("300M").model_copy(update={"head_dim": 80})
    chosen, why = elementwise.select(CUDA, torch.bfloat16, odd)
    assert chosen is elementwise.EAGER
    assert "half a head, 40, is not a power of two" in why
