"""Compute dtype of the kernels from the ``compute`` setting."""

from __future__ import annotations

import torch

from sae_kernels.backends import cpu


def compute_dtype(name: str, device: torch.device | str = "cpu") -> torch.dtype:
    """The dtype of a ``compute`` setting on a device.

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
