"""CUDA graphs on a CPU: operators are recorded with the addresses of their tensors, and replayed.

Memory that is allocated while recording stays alive, as in the private pool of a CUDA graph. All
other memory must be kept by the code under test: a replay reads and writes the same addresses,
whoever owns them by then. `Recording.lost` finds memory that nobody keeps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from shared_engine.local.attention import Layout


class Address:
    """A tensor as a recorded kernel knows it."""

    def __init__(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        self.data_ptr, self._bytes = storage.data_ptr(), storage.nbytes()
        self._view = (tuple(x.shape), x.stride(), x.storage_offset())
        self._dtype, self._owner = x.dtype, StorageWeakRef(storage)

    def __repr__(self) -> str:
        return f"{tuple(self._view[0])} {self._dtype}"

    @property
    def is_freed(self) -> bool:
        return self._owner.expired()

    def read(self) -> Tensor:
        """Return the memory at this address as a tensor, whoever owns it."""
        memory = (ctypes.c_char * self._bytes).from_address(self.data_ptr)
        return torch.frombuffer(memory, dtype=self._dtype).as_strided(*self._view)


class Recording(TorchDispatchMode):
    """The operators that run while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, list[Address]]] = []
        self._pool: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and record it, unless it makes a view."""
        inputs = tree_map_only(Tensor, _to_address, (args, kwargs or {}))
        known = {_storage(x) for x in _tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        allocated = [x for x in _tensors(out) if _storage(x) not in known]
        self._pool |= {x.untyped_storage().data_ptr(): x.untyped_storage() for x in allocated}
        writes = any(a.alias_info and a.alias_info.is_write for a in func._schema.arguments)
        if allocated or writes:
            self._calls.append((func, inputs, [Address(x) for x in allocated]))
        return out

    def replay(self) -> None:
        """Run all operators again, over the present contents of their addresses."""
        for func, inputs, outputs in self._calls:
            args, kwargs = tree_map_only(Address, Address.read, inputs)
            out = _tensors(func(*args, **kwargs))
            for address, x in zip(outputs, out if outputs else [], strict=True):
                address.read().copy_(x)

    def lost(self) -> list[Address]:
        """Return the memory that the operators use, that is in no pool and that nobody keeps."""
        used = {x.data_ptr: x for _, inputs, _ in self._calls for x in tree_leaves(inputs)
                if isinstance(x, Address)}  # fmt: skip
        return [x for x in used.values() if x.data_ptr not in self._pool and x.is_freed]


def record(step: Callable[[], None]) -> Callable[[], None]:
    """Record a step as `graphs._capture` does; the result keeps the recording and not the step."""
    step()
    with Recording() as recording:
        step()
    return recording.replay


def attend_by_mask(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
    """Attend by tensor operators alone, so that a replay reads the boundaries that it finds."""
    owner = torch.bucketize(torch.arange(len(q)), layout.cu_seqlens, right=True)
    by_head = (x.transpose(0, 1)[None] for x in (q, k, v))
    mask = owner[:, None] == owner
    out = F.scaled_dot_product_attention(*by_head, attn_mask=mask, enable_gqa=True)
    return out[0].transpose(0, 1)


def _to_address(x: Tensor) -> Tensor | Address:
    return Address(x) if x.numel() else x


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]
