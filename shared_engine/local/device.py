"""Where the model runs, decided once and with the reason kept."""

from __future__ import annotations

import platform
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch

from shared_engine.errors import ConfigurationError
from shared_engine.local import attention, elementwise, packed
from shared_engine.local.config import ModelConfig
from shared_engine.options import DType

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STEP_FLOP = 12.5e12
"""Of a step on a GPU: about 26 ms of an H100 (estimated), so that a query waits no longer; and 8
pages of one tile, which the vision tower computes in one pass."""
_MOST_TOKENS = 16_384
"""Of a step on a GPU: more keep a data-centre GPU no busier (estimated)."""


@dataclass(frozen=True)
class Placement:
    """Device, number type, attention kernel and step size, each with its why in `reasons`."""

    device: torch.device
    dtype: torch.dtype
    kernel: attention.Attention
    elementwise: elementwise.Elementwise
    packs_weights: bool
    max_batch_tokens: int
    reasons: str

    @property
    def description(self) -> str:
        """One line for a log or a person."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device}, {dtype}, {self.max_batch_tokens} tokens per step ({self.reasons})"


def select_devices(
    devices: str, dtype: DType, max_batch_tokens: int | None, config: ModelConfig
) -> list[Placement]:
    """Decide how each device, with commas between, computes such a model.

    All get the step of the one with the least memory.

    Raises:
        ConfigurationError: a device that torch does not know or that is not there, devices that
            would compute in different number types, or a GPU in the fork of a process that used it.
    """
    placements = [_place(device, dtype, max_batch_tokens, config) for device in devices.split(",")]
    if len({placement.dtype for placement in placements}) > 1:
        raise ConfigurationError(
            f"device={devices!r} are of different kinds, so a vector would depend on where it "
            "is computed; give dtype=, or devices of one kind"
        )
    step = min(placement.max_batch_tokens for placement in placements)
    return [replace(placement, max_batch_tokens=step) for placement in placements]


def _place(name: str, dtype: DType, max_batch_tokens: int | None, config: ModelConfig) -> Placement:
    device, why_device = _select_device(name.strip())
    number, why_dtype = _select_dtype(device, dtype)
    with make_current(device):
        kernel, why_kernel = attention.select_kernel(device, number, config)
        operators, why_operators = elementwise.select(device, number, config)
    packs_weights, why_weights = packed.select(device, number)
    step, why_step = _select_step(device, config)
    if max_batch_tokens:
        step, why_step = max_batch_tokens, "asked for"
    reasons = (
        f"device: {why_device}; dtype: {why_dtype}; attention: {why_kernel}; "
        f"elementwise: {why_operators}; weights: {why_weights}; step: {why_step}"
    )
    return Placement(device, number, kernel, operators, packs_weights, step, reasons)


def make_current(device: torch.device) -> AbstractContextManager[object]:
    """Let a GPU be the one that this thread's kernels are launched on.

    Triton launches on the current GPU, wherever its tensors are.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _select_device(name: str) -> tuple[torch.device, str]:
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError as exc:
        raise ConfigurationError(f"device={name!r} is not one torch knows: {exc}") from exc
    if device.type != "cuda":
        return device, "asked for"
    if torch.cuda._is_in_bad_fork():
        raise ConfigurationError(
            f"device={name!r}, but this process was forked from one that had used the GPU, which "
            'CUDA does not allow; start it with "spawn", as in multiprocessing.get_context("spawn")'
        )
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device()), "a CUDA GPU is there"
        return torch.device("cpu"), "no CUDA GPU is there"
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"device={name!r}, but this torch ({torch.__version__}) sees no CUDA GPU"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device={name!r}, but there are {torch.cuda.device_count()} CUDA GPUs"
        )
    return torch.device("cuda", device.index or 0), "asked for"


def _select_dtype(device: torch.device, name: DType) -> tuple[torch.dtype, str]:
    if name != "auto":
        return _DTYPES[name], "asked for"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "this GPU multiplies bfloat16"
        return torch.float16, "this GPU does not multiply bfloat16"
    if device.type != "cpu":
        return torch.float32, "this device is not known to multiply bfloat16"
    if instructions := find_bfloat16_instructions():
        return torch.bfloat16, f"this CPU multiplies bfloat16 ({instructions})"
    return torch.float32, "this CPU does not multiply bfloat16"


def find_bfloat16_instructions() -> str:
    """Return with what this CPU multiplies bfloat16: "AMX", "AVX512_BF16", "BF16", or nothing.

    As the processor says. A race of the two types ends either way beside other work, and then two
    processes of one machine would give different vectors. Measured in quiet: 1.7 to 2.3 times as
    fast as float32 with AMX, 1.2 with AVX512_BF16 alone.
    """
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX512_BF16"
    is_arm = platform.machine().lower() in ("aarch64", "arm64")
    return "BF16" if is_arm and torch.ops.mkldnn._is_mkldnn_bf16_supported() else ""


def _select_step(device: torch.device, config: ModelConfig) -> tuple[int, str]:
    if device.type != "cuda":
        return 2_048, "as much as suits the caches of a CPU"
    # A token takes about 0.1 MB of intermediates, and the weights, 1 to 3 GB, are not loaded yet.
    free = torch.cuda.mem_get_info(device)[0] // 2**20
    attended = 2 * (config.heads + config.kv_heads) * config.head_dim
    weights = config.layers * config.hidden_size * (attended + 3 * config.intermediate_size)
    quick = int(_STEP_FLOP / (2 * weights)) // 128 * 128
    step = max(1_024, min(_MOST_TOKENS, quick, free))
    return step, f"about 26 ms of a data-centre GPU at most; {free:,} MB are free"
