"""Weights that a library stores as [D, F], laid in memory latent by latent, as the kernels read."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.weak import WeakIdKeyDictionary


class LatentRows:
    """Turns weights [D, F] once so that their transpose is contiguous, and turns them back.

    The parameter stays the same object with the same shape and values; its strides become (1, D).
    Optimizer states of such a parameter are turned along before a step. torch's fused optimizers
    want more: they walk through memory, in one order for all, and on a CPU copy what is not
    contiguous. So for their step the parameter, its gradient and its states are [F, D].
    ``state_dict`` gives the states as torch lays them by default.

    ``DistributedDataParallel`` fills its buckets by the strides that a weight had when it was
    wrapped and reads them by those that it has: a weight that it wraps keeps its strides, and a
    forward pass gets its rows as a copy.
    """

    def __init__(self) -> None:
        self._turned = WeakIdKeyDictionary()  # and whether it was wrapped after that
        self._optimizers: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
        self._hooks: list[Any] = []
        self._state_hooks: list[Any] = []
        self._across: list[tuple[torch.Tensor, dict[str, Any]]] = []  # [F, D] for the moment

    def of(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows [F, D] of a weight [D, F], contiguous: a view, after at most one turn."""
        self._back()
        if not weight.T.is_contiguous():
            if _in_wrapped():
                return weight.T.contiguous()
            with torch.inference_mode(False):  # or it could never be trained again
                weight.data = weight.data.T.contiguous().T
        if not weight.is_contiguous():
            self._note(weight)
        return weight.T

    def straight(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight [F, D] itself, contiguous: made as a transpose, it is laid anew once."""
        self._back()
        if not weight.is_contiguous():
            if _in_wrapped():
                return weight.contiguous()
            with torch.inference_mode(False):
                weight.data = weight.data.contiguous()
            self._note(weight)
        return weight

    def _note(self, weight: torch.Tensor) -> None:
        if weight not in self._turned:
            self._turned[weight] = False
            if not self._hooks:
                before = register_optimizer_step_pre_hook(self._before)
                self._hooks = [before, register_optimizer_step_post_hook(self._back)]
        if _in_wrapped():
            self._turned[weight] = True

    def why_not(self, weight: torch.Tensor) -> str | None:
        """Why a weight cannot be laid anew, or None."""
        if weight.untyped_storage().nbytes() != weight.numel() * weight.element_size():
            return "a weight that is part of a larger buffer"
        return None

    def undo(self) -> None:
        """Lays all weights and their optimizer states as torch does by default."""
        self._back()
        if any(self._turned.values()):
            warnings.warn(
                "a weight that DistributedDataParallel wraps was laid as torch does by default; "
                "wrap it again before it is trained further, or its gradients are wrong",
                stacklevel=2,
            )
        for weight in list(self._turned):
            with torch.inference_mode(False):
                weight.data = weight.data.contiguous()
        for optimizer in list(self._optimizers):
            self._lay(optimizer)
        for hook in (*self._hooks, *self._state_hooks):
            hook.remove()
        self._hooks, self._state_hooks = [], []
        self._turned = WeakIdKeyDictionary()
        self._optimizers.clear()

    def follow(self, optimizer: torch.optim.Optimizer) -> bool:
        """Turns the states of an optimizer's turned weights, if it has any, now and at undo."""
        if not any(p in self._turned for group in optimizer.param_groups for p in group["params"]):
            return False
        if optimizer not in self._optimizers:
            self._optimizers.add(optimizer)
            self._state_hooks.append(optimizer.register_state_dict_post_hook(_contiguous))
        self._lay(optimizer)
        return True

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        self._back()
        if not self.follow(optimizer):
            return
        for group in optimizer.param_groups:
            if group.get("fused"):
                turned = (p for p in group["params"] if p in self._turned)
                mine = [p for p in turned if not p.is_contiguous()]
                self._across += [(p, optimizer.state[p]) for p in mine]
        for weight, state in self._across:
            _transpose(weight, state)

    def _back(self, *_: Any) -> None:
        """Ends a fused step; after one that raised, what comes next does it."""
        while self._across:
            _transpose(*self._across.pop())

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


def _in_wrapped() -> bool:
    """Whether this is a forward pass of a module in ``DistributedDataParallel``."""
    return DistributedDataParallel._active_ddp_module is not None


def _transpose(weight: torch.Tensor, state: dict[str, Any]) -> None:
    """Gives a weight, its gradient and its states their transposed shape, in the same memory."""
    grad, weight.grad = weight.grad, None
    weight.data = weight.data.T
    weight.grad = None if grad is None else grad.T
    for name, value in state.items():
        if isinstance(value, torch.Tensor) and value.dim() == 2:
            state[name] = value.T


def _contiguous(_: torch.optim.Optimizer, found: dict[str, Any]) -> None:
    """Lays the tensors of a state dict as torch does by default; the optimizer keeps its own."""
    for place, state in found["state"].items():
        found["state"][place] = {
            name: value.contiguous() if isinstance(value, torch.Tensor) else value
            for name, value in state.items()
        }


def laid_like(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The tensor with the strides of another of its shape: itself, or a copy."""
    if tensor.layout != torch.strided or tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)
