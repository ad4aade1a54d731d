"""Attention keeps each sequence to itself, and its kernel is one that was seen to compute it."""

from __future__ import annotations

import itertools
from unittest import mock

import numpy as np
import pytest
import torch

from shared_engine.local import attention
from shared_engine.local.attention import Layout
from tests.support.configs import config

CUDA = torch.device("cuda", 0)
HEADS, CONFIG = (32, 8, 64), config("300M")


def layout(lengths: list[int]) -> Layout:
    return Layout(lengths, torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32))


def draw(tokens: int, heads: int, kv_heads: int, d: int) -> tuple[torch.Tensor, ...]:
    """Queries, keys and values as they lie in a step: parts of one matrix."""
    torch.manual_seed(0)
    return torch.randn(tokens, heads + 2 * kv_heads, d).split([heads, kv_heads, kv_heads], dim=1)


def test_per_sequence_attention_equals_a_block_mask():
    """The seam against its definition: one dense mask that keeps each sequence to itself."""
    lengths = [5, 5, 1, 7, 2, 2, 2]
    q, k, v = draw(sum(lengths), 6, 2, 8)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = owner[:, None] == owner[None, :]
    by_head = [x.transpose(0, 1)[None] for x in (q, k, v)]
    dense = torch.nn.functional.scaled_dot_product_attention(
        *by_head, attn_mask=mask, enable_gqa=True
    )
    assert [count for _, count, _ in layout(lengths).runs()] == [2, 1, 1, 3]
    ours = attention.per_sequence(q, k, v, layout(lengths))
    torch.testing.assert_close(ours, dense[0].transpose(0, 1), atol=1e-6, rtol=1e-5)


def by_definition(q, k, v, cu):
    """What a variable-length kernel computes, from nothing but the boundaries."""
    ends = cu.tolist()
    return attention.per_sequence(q, k, v, layout([b - a for a, b in itertools.pairwise(ends)]))


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for a GPU's kernels. `refuse` says what they raise, by name; `asked` what for."""
    refuse: dict[str, Exception | float] = {}
    asked: list[tuple[int, ...]] = []

    def check(name: str, q: torch.Tensor, k: torch.Tensor) -> float:
        asked.append((q.shape[1], k.shape[1], q.shape[2]))
        fault = refuse.get(name, 0.0)
        if isinstance(fault, Exception):
            raise fault
        return fault

    def flash(q, k, v, *given):
        cu, cu_k, longest, longest_k, dropout, is_causal, returns_mask = given
        assert (dropout, is_causal, returns_mask) == (0.0, False, False)
        assert cu is cu_k
        assert type(longest) is type(longest_k) is int
        return by_definition(q, k, v, cu) + check("varlen", q, k), None

    def efficient(q, k, v, *given):
        bias, cu, cu_k, longest, longest_k, dropout, mask = given
        assert (bias, dropout, mask) == (None, 0.0, 0)
        assert cu is cu_k
        assert type(longest) is type(longest_k) is int
        assert q.shape == k.shape == v.shape
        return by_definition(q[0], k[0], v[0], cu)[None] + check("efficient", q[0], k[0]), None

    monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash)
    monkeypatch.setattr(torch.ops.aten, "_efficient_attention_forward", efficient)
    monkeypatch.setattr(torch.Tensor, "to", lambda x, *where: x.type(where[-1]) if where[1:] else x)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    return refuse, asked


REFUSED = RuntimeError("Number of heads in key/value must match\n  a hundred lines of dispatcher")
MISSING = dict.fromkeys(("varlen", "efficient"), REFUSED)


@pytest.mark.parametrize(
    ("dtype", "refuse", "chosen", "said"),
    [
        ("bfloat16", {}, "varlen", "varlen flash kernel"),
        ("float16", {}, "varlen", "varlen flash kernel"),
        ("bfloat16", {"varlen": REFUSED}, "efficient", "key/value must match"),
        ("bfloat16", {"varlen": 1.0}, "efficient", "varlen is not usable: its values differ"),
        ("bfloat16", {"varlen": AssertionError()}, "efficient",
         "varlen is not usable: AssertionError"),
        ("bfloat16", MISSING, "per_sequence", "efficient is not usable: Number of heads"),
        ("bfloat16", {**MISSING, "efficient": AttributeError("no such operator")}, "per_sequence",
         "efficient is not usable: no such operator"),
        ("float32", {}, "efficient", "flash needs bfloat16 or float16"),
        ("float32", {"efficient": REFUSED}, "per_sequence", "one SDPA call"),
    ],
)  # fmt: skip
def test_a_gpu_gets_the_first_kernel_that_computes_the_models_heads(
    kernels, dtype, refuse, chosen, said
):
    kernels[0].update(refuse)
    kernel, why = attention.select_kernel(CUDA, getattr(torch, dtype), CONFIG)
    assert kernel is getattr(attention, chosen)
    assert said in why
    assert "\n" not in why
    assert "dispatcher" not in why
    assert all(heads in (HEADS, (32, 32, 64)) for heads in kernels[1])


@pytest.mark.parametrize("operator", ["_flash_attention_forward", "_efficient_attention_forward"])
def test_torch_has_the_operators_with_these_arguments(operator):
    """The call of each kernel, on tensors without values."""
    q, k, v = torch.empty(9, 48, 64, device="meta", dtype=torch.bfloat16).split([32, 8, 8], dim=1)
    ends = torch.empty(3, device="meta", dtype=torch.int32)
    kernel = attention.varlen if operator.startswith("_flash") else attention.efficient
    assert kernel(q, k, v, Layout([5, 4], ends)).shape == q.shape


def test_a_first_attention_does_not_import_the_compiler(python):
    """As torch's wrapper does, for as long as an import of torch."""
    code = (
        "import sys, torch; from shared_engine.local import attention; "
        "from shared_engine.local.attention import Layout; "
        "q = torch.empty(9, 4, 64, device='meta', dtype=torch.bfloat16); "
        "ends = torch.empty(2, device='meta', dtype=torch.int32); "
        "attention.varlen(q, q, q, Layout([9], ends)); "
        "print('torch._dynamo' in sys.modules)"
    )
    assert python(code).strip() == "False"


def test_a_gpu_that_is_lost_ends_the_choice(kernels, monkeypatch):
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    kernels[0]["varlen"] = lost
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)  # an error of one kernel
    assert attention.select_kernel(CUDA, torch.bfloat16, CONFIG)[0] is attention.efficient
    monkeypatch.setattr(torch.cuda, "synchronize", mock.Mock(side_effect=lost))
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        attention.select_kernel(CUDA, torch.bfloat16, CONFIG)


def test_a_gpu_that_is_too_old_for_flash_has_one_call_per_step(kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    kernel, why = attention.select_kernel(CUDA, torch.float16, CONFIG)
    assert kernel is attention.efficient
    assert "compute capability 8.0" in why


@pytest.mark.parametrize("lengths", [[1], [5, 5, 1, 7], [1200, 3]])
@pytest.mark.parametrize("name", ["varlen", "efficient"])
def test_every_kernel_is_called_for_what_per_sequence_computes(kernels, name, lengths):
    q, k, v = draw(sum(lengths), 6, 2, 8)
    ours = getattr(attention, name)(q, k, v, layout(lengths))
    expected = attention.per_sequence(q, k, v, layout(lengths))
    torch.testing.assert_close(ours, expected, atol=1e-6, rtol=1e-5)


def test_a_cpu_has_one_call_per_length():
    kernel, why = attention.select_kernel(torch.device("cpu"), torch.float32, CONFIG)
    assert kernel is attention.per_sequence
    assert why == "one SDPA call per sequence length"
