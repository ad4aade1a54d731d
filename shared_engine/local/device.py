"""Select the device, dtype, kernels and step size of a model, with the reason for each."""

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
_FLOP_PER_SM = {(8, 0): 2.9e12, (9, 0): 7.5e12, (10, 0): 15e12, (10, 3): 15e12}
"""Products in 16 bits, per second and multiprocessor, by compute capability. Source: NVIDIA's data
sheets, in which other GPUs have about 2e12."""
_STEP_SECONDS = 0.0126
"""A step at this rate, about 26 ms in practice (estimated): a query waits for two at most. On an
H100, it is also 8 pages of one tile, which the vision tower computes in one pass."""
_MIN_TOKENS, _MAX_TOKENS = 1_024, 16_384
"""Step sizes between which more tokens use a GPU better (estimated)."""


@dataclass(frozen=True)
class Placement:
    """Device, dtype, kernels and step size of a model, with the reason for each."""

    device: torch.device
    dtype: torch.dtype
    kernel: attention.Attention
    elementwise: elementwise.Elementwise
    packs_weights: bool
    max_batch_tokens: int
    reasons: str

    @property
    def description(self) -> str:
        """The placement and its reasons in one line."""
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.device}, {dtype}, {self.max_batch_tokens} tokens per step ({self.reasons})"


def select_devices(
    devices: str, dtype: DType, max_batch_tokens: int | None, config: ModelConfig
) -> list[Placement]:
    """Return a placement for each device. All use the smallest step size among them.

    Args:
        devices: Names of devices, separated by commas.
        max_batch_tokens: Step size in tokens; None selects it.

    Raises:
        ConfigurationError: a device is unknown or not available, devices differ in dtype, or this
            process was forked from one that had used the GPU.
    """
    placements = [_place(device, dtype, max_batch_tokens, config) for device in devices.split(",")]
    if len({placement.dtype for placement in placements}) > 1:
        raise ConfigurationError(
            f"device={devices!r} would compute in different dtypes, so a vector would depend on "
            "its device; set dtype=, or use devices of one kind"
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
        step, why_step = max_batch_tokens, "requested"
    reasons = (
        f"device: {why_device}; dtype: {why_dtype}; attention: {why_kernel}; "
        f"elementwise: {why_operators}; weights: {why_weights}; step: {why_step}"
    )
    return Placement(device, number, kernel, operators, packs_weights, step, reasons)


def make_current(device: torch.device) -> AbstractContextManager[object]:
    """Make a GPU the current one of this thread; do nothing for another device.

    Triton launches kernels on the current GPU, even if their tensors are on another.
    """
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _select_device(name: str) -> tuple[torch.device, str]:
    try:
        device = torch.device("cuda" if name == "auto" else name)
    except RuntimeError as exc:
        raise ConfigurationError(f"device={name!r} is unknown to torch: {exc}") from exc
    if device.type != "cuda":
        return device, "requested"
    if torch.cuda._is_in_bad_fork():
        raise ConfigurationError(
            f"device={name!r}, but this process was forked from one that had used the GPU, which "
            'CUDA does not support; start it with multiprocessing.get_context("spawn")'
        )
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0), "a CUDA GPU is available"
        return torch.device("cpu"), "no CUDA GPU is available"
    if not torch.cuda.is_available():
        raise ConfigurationError(
            f"device={name!r}, but torch {torch.__version__} finds no CUDA GPU; check nvidia-smi "
            "and that torch is a CUDA build, or use device='cpu'"
        )
    if device.index is not None and device.index >= torch.cuda.device_count():
        raise ConfigurationError(
            f"device={name!r}, but the number of CUDA GPUs is {torch.cuda.device_count()}"
        )
    return torch.device("cuda", device.index or 0), "requested"


def _select_dtype(device: torch.device, name: DType) -> tuple[torch.dtype, str]:
    if name != "auto":
        return _DTYPES[name], "requested"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) >= (8, 0):
            return torch.bfloat16, "this GPU supports bfloat16"
        return torch.float16, "this GPU does not support bfloat16"
    if device.type != "cpu":
        return torch.float32, "this device may not support bfloat16"
    if instructions := find_bfloat16_instructions():
        return torch.bfloat16, f"this CPU has bfloat16 instructions ({instructions})"
    return torch.float32, "this CPU has no bfloat16 instructions"


def find_bfloat16_instructions() -> str:
    """Return the instructions of this CPU that multiply bfloat16, or "" if it has none.

    They are "AMX", "AVX512_BF16" or "BF16". The dtype depends on the processor and not on a
    benchmark, whose result would depend on the machine's load: two processes could then compute
    different vectors. Measured on an idle machine, relative to float32: 1.7 to 2.3 times as fast
    with AMX, 1.2 times with AVX512_BF16 alone.
    """
    if torch.cpu._is_amx_tile_supported():
        return "AMX"
    if torch.cpu._is_avx512_bf16_supported():
        return "AVX512_BF16"
    is_arm = platform.machine().lower() in ("aarch64", "arm64")
    return "BF16" if is_arm and torch.ops.mkldnn._is_mkldnn_bf16_supported() else ""


def _select_step(device: torch.device, config: ModelConfig) -> tuple[int, str]:
    if device.type != "cuda":
        return 2_048, "fits the caches of a CPU"
    # A token needs about 0.1 MB. So 1 token per MB leaves memory for the weights, which need 1 to
    # 3 GB and are not loaded yet.
    free = torch.cuda.mem_get_info(device)[0] // 2**20
    attended = 2 * (config.heads + config.kv_heads) * config.head_dim
    weights = config.layers * config.hidden_size * (attended + 3 * config.intermediate_size)
    gpu = torch.cuda.get_device_properties(device)
    rate = gpu.multi_processor_count * _FLOP_PER_SM.get((gpu.major, gpu.minor), 2e12)
    fast = int(_STEP_SECONDS * rate / (2 * weights)) // 128 * 128
    step = max(_MIN_TOKENS, min(_MAX_TOKENS, fast, free))
    return step, f"for about {rate / 1e12:.0f} TFLOP/s; {free:,} MB are free"
