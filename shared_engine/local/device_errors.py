"""What an error of torch means for the device: memory that ran out, or a GPU that is lost."""

from __future__ import annotations

import torch

_OUT_OF_MEMORY = (
    *("out of memory", "not enough memory", "allocate memory", "bad_alloc"),
    *("ALLOC_FAILED", "ALLOCATION_FAILED", "CUBLAS_STATUS_NOT_INITIALIZED"),
)
"""Parts of messages. The allocators of a CPU and of pinned memory, oneDNN, cuBLAS and cuDNN raise a
RuntimeError."""


def is_out_of_memory(error: Exception) -> bool:
    """Return whether memory of the device or of the host ran out."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    )


def is_fatal(error: Exception) -> bool:
    """Return whether this process lost its GPU, as after an illegal memory access."""
    if not isinstance(error, torch.AcceleratorError) or is_out_of_memory(error):
        return False
    try:
        torch.cuda.synchronize()
    except torch.AcceleratorError:
        return True
    return False
