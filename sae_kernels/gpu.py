"""Checks of the GPU and of Triton: whether the kernels can use them, or the reason why not."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

_OLDEST_CAPABILITY = (8, 0)
_OLDEST_TRITON = (3, 6)


@functools.cache
def cuda_reason(device: torch.device) -> str | None:
    """The reason why a device of type "cuda" cannot run the kernels, or None."""
    if torch.version.cuda is None or not torch.cuda.is_available():
        return f"{device} is not an NVIDIA GPU that this build of torch can use"
    capability = torch.cuda.get_device_capability(device)
    if capability >= _OLDEST_CAPABILITY:
        return None
    name, came = torch.cuda.get_device_name(device), ".".join(map(str, capability))
    return (
        f"{name} has compute capability {came}; the kernels need 8.0 (A100) or newer, use the "
        "reference backend or the CPU"
    )


def training_device(name: str) -> torch.device:
    """Resolves a ``device`` setting; "auto" is the first usable GPU, else the CPU.

    Raises:
        ValueError: it names no device, or a GPU that is not there or that the kernels cannot use.
    """
    if name == "auto":
        first = torch.device("cuda:0")
        return torch.device("cpu") if cuda_reason(first) else first
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected auto, cpu or cuda:0, got {name!r}") from error
    if device.type == "cuda":
        index = device.index or 0
        if index >= torch.cuda.device_count():
            raise ValueError(
                f"device: expected a GPU that is there, got {name!r}, and torch "
                f"{torch.__version__} finds {torch.cuda.device_count()} of them; use device 'cpu', "
                "or install a CUDA build of torch and a driver for it"
            )
        reason = cuda_reason(torch.device("cuda", index))
        if reason is not None:
            raise ValueError(f"device: {reason}")
    return device


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of streaming multiprocessors, the grid of a persistent kernel; 2 on the CPU."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@functools.cache
def triton_version() -> tuple[int, int] | None:
    """Triton's major and minor version; None where it is not installed."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def triton_reason(device: torch.device) -> str | None:
    """The reason why Triton kernels cannot run on tensors of a device, or None."""
    if device.type == "cpu" and not interpreted():
        return (
            "tensors are on cpu, its kernels run on NVIDIA GPUs (on the CPU only for checking, in "
            "Triton's interpreter: TRITON_INTERPRET=1)"
        )
    if device.type not in ("cpu", "cuda"):
        return f"tensors are on {device}, its kernels run on NVIDIA GPUs"
    version = triton_version()
    if version is None:
        return "Triton is not installed: `pip install triton` (a CUDA build of torch brings it)"
    if version < _OLDEST_TRITON:
        came, needed = (".".join(map(str, v)) for v in (version, _OLDEST_TRITON))
        return f"Triton {came} is older than {needed}: install a newer torch or Triton"
    return cuda_reason(device) if device.type == "cuda" else None


def architecture() -> int:
    """The compute capability that Triton compiles for as a number (90 is 9.0); 0 if interpreted."""
    if interpreted():
        return 0
    from triton.runtime.driver import driver

    return int(driver.active.get_current_target().arch)


@functools.cache
def next_power_of_two(n: int) -> int:
    """The smallest power of two that is at least n, and at least 1."""
    return 1 << max(0, n - 1).bit_length()
