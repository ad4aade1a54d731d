"""Classify errors of torch: out of memory, or a GPU that this process can no longer use."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = (
    *("out of memory", "not enough memory", "allocate memory", "bad_alloc"),
    *("ALLOC_FAILED", "ALLOCATION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
)
"""Parts of messages. The CPU allocator, the pinned allocator, oneDNN, cuBLAS and cuDNN raise a
RuntimeError."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether the device or the host ran out of memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def is_fatal(error: Exception) -> bool:
    """Return whether this process can no longer use its GPU, as after an illegal memory access."""
    if not isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
        return False
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError:
        return True
    return False
