"""Checks and constants shared by the primitives that work on rows of a matrix."""

from __future__ import annotations

import torch

from sae_kernels.primitives import checks

NORMS = ("none", "unit", "at_most_one")
HYPER = ("lr", "clip_scale", "bias_correction1", "bias_correction2", "skip", "step")


def arithmetic_dtype(param: torch.Tensor) -> torch.dtype:
    """The dtype in which a row is updated: its own, fp32 for the halves of one."""
    return torch.float32 if param.dtype == torch.int16 else param.dtype


def check_norm(norm: str, slices: int, width: int) -> None:
    """Raises ValueError for an unknown norm policy or slices that do not divide the width."""
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    if slices < 1 or width % slices:
        raise ValueError(f"slices: expected a divisor of the width {width}, got {slices}")


def check_high(high: torch.Tensor | None, name: str) -> None:
    """Raises ValueError or TypeError unless there are high halves to go with low ones."""
    if high is None:
        raise ValueError(
            f"{name}: expected the bfloat16 high halves that go with an int16 param, got None; "
            "halves.split() makes both"
        )
    checks.dtype(f"{name} beside an int16 param", high, (torch.bfloat16,))
