"""Weights that a library stores as [D, F], laid in memory latent by latent, as the kernels read."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.weak import WeakIdKeyDictionary


class LatentRows:
    """Turns weights [D, F] once so that their transpose is contiguous, and turns them back.

    The parameter stays the same object with the same shape and values; its strides become (1, D).
    Optimizer states of such a parameter are turned along before a step, because torch's fused
    optimizers walk through memory and expect one order of all.
    """

    def __init__(self) -> None:
        self._turned = WeakIdKeyDictionary()
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._hook: Any = None

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows [F, D] of a weight [D, F], contiguous: a view, after at most one turn."""
        if not weight.T.is_contiguous():
            with torch.inference_mode(False):  # or it could never be trained again
                weight.data = weight.data.T.contiguous().T
        if weight not in self._turned and not weight.is_contiguous():
            self._turned[weight] = True
            if self._hook is None:
                self._hook = register_optimizer_step_pre_hook(self._follow)
        return weight.T

    def why_not(self, weight: torch.Tensor) -> str | None:
        """Why a weight cannot be laid anew, or None."""
        if weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
            return "a weight that is part of a larger buffer"
        return None

    def undo(self) -> None:
        """Lays all weights and their optimizer states as torch does by default."""
        for weight in list(self._turned):
            with torch.inference_mode(False):
                weight.data = weight.data.contiguous()
        for optimizer in list(self._optimizers):
            self._lay(optimizer)
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        self._turned = WeakIdKeyDictionary()

    def _follow(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if any(p in self._turned for group in optimizer.param_groups for p in group["params"]):
            self._optimizers.add(optimizer)
            self._lay(optimizer)

    def _lay(self, optimizer: torch.optim.Optimizer) -> None:
        """Gives gradients and states of turned weights the strides of their weight."""
        for group in optimizer.param_groups:
            for p in group["params"]:
                if p not in self._turned:
                    continue
                if p.grad is not None:
                    p.grad.data = laid_like(p.grad, p)
                state = optimizer.state.get(p, {})
                for name, value in state.items():
                    if isinstance(value, torch.Tensor) and value.shape == p.shape:
                        state[name] = laid_like(value, p)


def laid_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor with the strides of another of its shape: itself, or a copy."""
    if tensor.layout != torch.strided or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
