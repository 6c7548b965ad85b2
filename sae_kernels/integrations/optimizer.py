"""The option ``optimizer="fused"``: torch's fused Adam in place of its loop over operations."""

from __future__ import annotations

import weakref
from typing import Any

import torch

_OPTIONS = ("fused", "foreach")


class FusedAdam:
    """Sets torch's own ``fused`` option on optimizers, and takes it back.

    State, schedules and checkpoints are the optimizer's own; results differ by rounding.
    """

    def __init__(self) -> None:
        self._before: weakref.WeakKeyDictionary[torch.optim.Optimizer, list[dict[str, Any]]] = (
            weakref.WeakKeyDictionary()
        )

    def apply(self, optimizer: object) -> str | None:
        """Fuses an optimizer; returns why not, or None."""
        if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
            return f"an optimizer of type {type(optimizer).__name__}"
        assert isinstance(optimizer, torch.optim.Optimizer)
        groups = optimizer.param_groups
        for group in groups:
            if group.get("capturable") or group.get("differentiable") or group.get("fused"):
                return "an optimizer that is fused, capturable or differentiable already"
            if not all(p.is_floating_point() for p in group["params"]):
                return "complex parameters"
        self._before[optimizer] = [{name: group[name] for name in _OPTIONS} for group in groups]
        for group in groups:
            group.update(fused=True, foreach=False)
        return None

    def undo(self) -> None:
        """Restores the options of all optimizers that are still there."""
        for optimizer, groups in list(self._before.items()):
            for group, before in zip(optimizer.param_groups, groups, strict=False):
                group.update(before)
        self._before.clear()
