"""The dtype in which the kernels multiply."""

from __future__ import annotations

import torch

from sae_kernels import gpu
from sae_kernels.backends import cpu


def training_device(name: str) -> torch.device:
    """The device that a ``device`` setting stands for.

    Raises:
        ValueError: it names no device, or a GPU that is not there or that the kernels cannot use.
    """
    if name == "auto":
        first = torch.device("cuda:0")
        return torch.device("cpu") if gpu.too_old(first) else first
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
        reason = gpu.too_old(torch.device("cuda", index))
        if reason is not None:
            raise ValueError(f"device: {reason}")
    return device


def compute_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype that a ``compute`` setting stands for.

    "auto" is bfloat16 where the device multiplies it natively (a GPU, a CPU with AMX) and float32
    elsewhere: without such a unit bf16 operands are widened first and only cost accuracy.
    """
    if name != "auto":
        dtype: torch.dtype = getattr(torch, name)
        return dtype
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    native = cpu.reason(torch.device("cpu"), torch.bfloat16) is None and cpu.isa() == "amx"
    return torch.bfloat16 if native else torch.float32
