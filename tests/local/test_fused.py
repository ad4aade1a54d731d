"""The Triton kernels, without a GPU: interpreted here, and compiled for two generations of them."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="needs Triton (the dev extra, Linux x86-64)")

INTERPRETED = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import torch
from shared_engine.local import elementwise, fused
torch.manual_seed(0)
for dtype, most in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
    for tokens, heads, kv_heads, d, inner in ((7, 4, 2, 16, 100), (5, 32, 8, 64, 3840)):
        rotated = heads + kv_heads
        qkv = torch.randn(tokens, rotated + kv_heads, d).to(dtype)
        cos, sin = (torch.randn(tokens, d // 2).to(dtype) for _ in "cs")
        ours, exact = qkv.clone(), qkv.float()
        turned = fused.rotate(ours[:, :rotated], cos, sin)
        assert turned.data_ptr() == ours.data_ptr()
        exact = elementwise.rotate(
            exact[:, :rotated], cos.float(), sin.float(), exact.new_empty
        )
        assert torch.equal(ours[:, rotated:], qkv[:, rotated:])
        torch.testing.assert_close(turned.float(), exact, atol=most, rtol=most)
        gate_up = torch.randn(tokens, 2 * inner).to(dtype)
        exact = elementwise.gate(gate_up.float())
        ours = fused.gate(gate_up)
        assert ours.data_ptr() == gate_up.data_ptr()
        torch.testing.assert_close(ours.float(), exact, atol=most, rtol=most)
"""

IN_THE_ENCODER = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
from dataclasses import replace
import numpy as np
from shared_engine.local import device, elementwise, fused
from shared_engine.local.checkpoint import resolve
from shared_engine.local.llama import Encoder
from shared_engine.options import Options
checkpoint = resolve(Options(model=sys.argv[1]))
(place,) = device.select_devices("cpu", "float32", 256, checkpoint.config)
kernels = elementwise.Elementwise(fused.rotate, fused.gate)
random = np.random.default_rng(0)
ids = [random.integers(5, 300, n).astype(np.int32) for n in (7, 1, 33, 12)]
expected = Encoder(checkpoint, place)(ids).numpy()
ours = Encoder(checkpoint, replace(place, elementwise=kernels))(ids).numpy()
assert np.abs(ours - expected).max() <= 2e-6
"""


def test_interpreted_kernels_equal_torchs_operators(python):
    python(INTERPRETED)


def test_an_encoder_with_interpreted_kernels_has_the_same_vectors(python, checkpoint):
    python(IN_THE_ENCODER.replace("sys.argv[1]", repr(str(checkpoint))))


SIGNATURES = {
    "_rotate_kernel": (
        {"x": "*bf16", "cos": "*bf16", "sin": "*bf16", "row_stride": "i32"},
        {"HEADS": 40, "HALF": 32, "BLOCK": 8},
        1,
    ),
    "_gate_kernel": ({"gate_up": "*bf16", "inner": "i32"}, {"BLOCK": 1024}, 4),
}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("name", list(SIGNATURES))
def test_kernels_compile_for_a_gpu_without_spilling(name, capability, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from shared_engine.local import fused

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    signature, constants, warps = SIGNATURES[name]
    source = ASTSource(
        fn=getattr(fused, name),
        signature=signature | dict.fromkeys(constants, "constexpr"),
        constexprs=constants,
        attrs={(n,): [["tt.divisibility", 16]] for n in range(len(signature))},
    )
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": warps} | fused._OPTIONS
    made = triton.compile(source, target=target, options=options)
    assert re.search(r"(ld|st)\.global\S*\.v4\.b32", made.asm["ptx"])  # 16 bytes at once
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(made.asm["cubin"])
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    said = subprocess.run(
        [tools / "cuobjdump", "-res-usage", binary], check=True, capture_output=True, text=True
    ).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", said)
    registers, stack, local = map(int, usage.groups())
    assert registers <= 64
    assert stack == local == 0
