"""A GPU without a GPU: torch's fake tensors on `cuda:0`, and a log of what would run there.

Shapes, dtypes, devices and strides are real, values are not. What is logged: kernels that would be
launched, copies between host and device, and findings, which are what a GPU would suffer from: a
wait for the device, a copy that blocks or comes from memory that is not pinned, an operator over
two devices. Heads that a flash kernel refuses (torch's flash_api.cpp) are refused here.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from shared_engine import local
from shared_engine.local import attention, elementwise, graphs, llama, siglip

CUDA = torch.device("cuda", 0)
H100 = types.SimpleNamespace(multi_processor_count=132, major=9, minor=0)
LAUNCH_NOTHING = ("empty", "new_empty", "empty_strided", "empty_like", "resize_", "device")
COPIES = ("_to_copy", "to", "copy_")
WAITS = {
    *("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero"),
    *("repeat_interleave",),  # by a tensor; by a number it is a copy
}
"""Operators that wait for the device."""

dry = torch.library.Library("dry", "DEF")
"""What a CPU build of torch has no CUDA kernel or no fake of, as one operator each."""
dry.define("rms_norm(Tensor x, Tensor weight) -> Tensor")
dry.impl("rms_norm", lambda x, weight: torch.empty_like(x), "Meta")
dry.define("attend(Tensor q, Tensor k, Tensor v) -> Tensor")
dry.impl("attend", lambda q, k, v: torch.empty(q.shape, dtype=q.dtype, device=q.device), "Meta")
dry.define("rotate_(Tensor(a!) x, Tensor cos, Tensor sin) -> ()")
dry.impl("rotate_", lambda x, cos, sin: None, "Meta")
dry.define("gate_(Tensor(a!) gate_up) -> ()")
dry.impl("gate_", lambda gate_up: None, "Meta")


class Log(TorchDispatchMode):
    """What runs on the fake GPU while this is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.to_device: list[int] = []
        """Bytes of each copy."""
        self.to_host: list[int] = []
        self.findings: list[str] = []

    @property
    def launches(self) -> int:
        """Kernels in all, at least: an operator may launch more than one."""
        return sum(self.kernels.values())

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and take it down if a GPU would notice."""
        kwargs = kwargs or {}
        name = func._schema.name.partition("::")[2]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(x.is_cuda for x in given):
            if name in WAITS and "int" not in func._overloadname:
                self.findings.append(f"{name} waits for the device")
            if name == "index" and any(x.dtype in (torch.bool, torch.uint8) for x in given[1:]):
                self.findings.append("a boolean index waits for the device")
            if name not in COPIES and any(x.device.type == "cpu" and x.dim() for x in given):
                self.findings.append(f"{name} mixes devices")
        out = func(*args, **kwargs)
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        kinds = {x.device.type for x in given + made}
        if "cuda" not in kinds or name in LAUNCH_NOTHING or _is_view(func, given, made):
            return out
        if name in COPIES and kinds == {"cuda", "cpu"}:
            at = 2 if name == "copy_" else 3  # of to(x, device, dtype, non_blocking)
            waits_not = kwargs.get("non_blocking", args[at] if len(args) > at else False)
            self._copied(name, made[0], given, waits_not)
            return out
        self.kernels[name] += 1
        return out

    def _copied(
        self, name: str, out: torch.Tensor, given: list[torch.Tensor], waits_not: bool
    ) -> None:
        host = next(x for x in [out, *given] if x.device.type == "cpu")
        (self.to_device if out.is_cuda else self.to_host).append(host.numel() * host.element_size())
        if not getattr(host, "pinned_here", False):
            self.findings.append(f"a copy of {tuple(host.shape)} whose host memory is not pinned")
        if not waits_not:
            self.findings.append(f"{name} of {tuple(host.shape)} blocks")


def _is_view(func: Any, given: list[torch.Tensor], made: list[torch.Tensor]) -> bool:
    writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
    memory = {x.untyped_storage()._cdata for x in given}
    return not writes and bool(made) and all(x.untyped_storage()._cdata in memory for x in made)


class Event:
    """Stands for torch.cuda.Event."""

    recorded = False

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        self.recorded = True

    def synchronize(self) -> None:
        assert self.recorded


class Weights:
    """Stands for local.weights.Weights: any tensor that is asked for."""

    def __init__(self, _: Any, placement: Any) -> None:
        self._placement = placement

    def __call__(self, name: str, *shape: int) -> torch.Tensor:
        place = self._placement
        return torch.empty(*shape, dtype=place.dtype, device=place.device)

    def check_nothing_left(self) -> None:
        pass


real_empty, real_tensor = torch.empty, torch.tensor
real_get, real_set, real_copy = FakeTensor.__getitem__, FakeTensor.__setitem__, FakeTensor.copy_


def pin_memory(self: torch.Tensor, *_: Any) -> torch.Tensor:
    out = real_empty(self.shape, dtype=self.dtype)  # no clone: it would keep the values
    out.pinned_here = True  # type: ignore[attr-defined]
    return out


def empty(*args: Any, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
    out: torch.Tensor = real_empty(*args, **kwargs)
    if pin_memory:
        out.pinned_here = True  # type: ignore[attr-defined]
    return out


# A CPU build's indexing in C++ asks for a CUDA device guard: it is taken apart here.
def get_item(self: FakeTensor, index: Any) -> Any:
    if self.device.type != "cuda":
        return real_get(self, index)
    out: Any = self
    dim = 0
    for one in index if isinstance(index, tuple) else (index,):
        if one is None:
            out = torch.ops.aten.unsqueeze(out, dim)
        elif isinstance(one, int):
            out = torch.ops.aten.select(out, dim, one)
            continue
        elif isinstance(one, slice):
            if one != slice(None):
                out = torch.ops.aten.slice(out, dim, one.start, one.stop, one.step or 1)
        else:
            out = torch.ops.aten.index(out, [None] * dim + [one])
        dim += 1
    return out


def set_item(self: FakeTensor, index: Any, value: Any) -> None:
    if self.device.type != "cuda":
        real_set(self, index, value)
        return
    assert (value.device, value.dtype) == (self.device, self.dtype)
    torch.ops.aten.index_put_(self, [index], value)


def copy_(self: FakeTensor, source: torch.Tensor, non_blocking: bool = False) -> Any:
    if self.device.type != "cuda":
        return real_copy(self, source, non_blocking)
    return torch.ops.aten.copy_(self, source, non_blocking)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, _: Any) -> torch.Tensor:
    torch.ops.dry.rotate_(x, cos, sin)
    return x


def gate(gate_up: torch.Tensor) -> torch.Tensor:
    torch.ops.dry.gate_(gate_up)
    return gate_up[:, : gate_up.shape[1] // 2]


def check_varlen(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *given: Any
) -> tuple[torch.Tensor]:
    """Stands for _flash_attention_forward, with what its C++ would refuse."""
    cu_q, cu_k, longest_q, longest_k, dropout, is_causal, returns_mask = given
    assert (dropout, is_causal, returns_mask) == (0.0, False, False)
    assert type(longest_q) is type(longest_k) is int
    assert q.shape[1] % k.shape[1] == 0
    assert q.shape[2] <= 256
    assert q.shape[2] % 8 == 0
    for x in (q, k, v):
        assert x.is_cuda
        assert x.dtype in (torch.bfloat16, torch.float16)
        assert x.stride(-1) == 1
        numbers = [x.storage_offset(), *x.stride()[:-1]]
        assert all(number * x.element_size() % 16 == 0 for number in numbers)
    for cu in (cu_q, cu_k):
        assert cu.is_cuda
        assert cu.dtype == torch.int32
        assert cu.is_contiguous()
    return (torch.ops.dry.attend(q, k, v),)


def attend_efficiently(q: Any, k: Any, v: Any, *_: Any) -> tuple[torch.Tensor]:
    assert q.shape == k.shape == v.shape
    return (torch.ops.dry.attend(q, k, v),)


@contextlib.contextmanager
def fake_gpu(*, fused: bool = True, capability: Any = (9, 0), count: int = 1) -> Iterator:
    """Let torch have fake GPUs, with Triton if `fused`."""
    current = [0]

    @contextlib.contextmanager
    def make_current(gpu: torch.device) -> Iterator:
        before, current[0] = current[0], gpu.index
        try:
            yield
        finally:
            current[0] = before

    stream = types.SimpleNamespace(device=CUDA)
    kernels = types.SimpleNamespace(rotate=rotate, gate=gate)
    cuda = {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,  # of a torch with CUDA, which finds no driver
        "device_count": lambda: count,
        "device": make_current,
        "current_device": lambda: current[0],
        "get_device_capability": lambda *_: capability,
        "get_device_properties": lambda _: H100,
        "mem_get_info": lambda *_: (79_000 * 2**20, 80 * 2**30),
        "set_device": lambda *_: None,
        "current_stream": lambda *_: stream,
        "Event": Event,
        "empty_cache": lambda: None,
    }
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # first: CUDA must not be started
    with contextlib.ExitStack() as stack:

        def patch(target: Any, **values: Any) -> None:
            stack.enter_context(mock.patch.multiple(target, **values))

        patch(torch.cuda, **cuda)
        patch(torch, empty=empty)
        patch(torch.Tensor, pin_memory=pin_memory)
        for name, value in (("__getitem__", get_item), ("__setitem__", set_item), ("copy_", copy_)):
            stack.enter_context(mock.patch.object(FakeTensor, name, value, create=True))
        patch(fake_tensor, init_gpu_context=lambda _: None)
        patch(
            torch.ops.aten,
            _flash_attention_forward=check_varlen,
            _efficient_attention_forward=attend_efficiently,
        )
        patch(attention, _check_kernel=lambda *_: None)
        patch(elementwise, _check_kernels=lambda *_: None)
        modules = {"shared_engine.local.fused": kernels if fused else None}
        stack.enter_context(mock.patch.dict(sys.modules, modules))
        if fused or hasattr(local, "fused"):
            stack.enter_context(mock.patch.object(local, "fused", kernels, create=True))
        if not fused and hasattr(local, "fused"):
            del local.fused
        patch(graphs, _make_recorder=lambda _: lambda step: step)
        patch(llama, Weights=Weights, check_graphs=lambda *_: None)
        patch(elementwise.F, rms_norm=lambda x, _, weight, eps: torch.ops.dry.rms_norm(x, weight))
        attend = torch.ops.dry.attend
        patch(siglip.F, scaled_dot_product_attention=lambda q, k, v, **_: attend(q, k, v))
        stack.enter_context(mode)
        yield
