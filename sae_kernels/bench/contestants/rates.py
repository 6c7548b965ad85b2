"""Reference rates of the machine: the encoder's product alone, and a memory copy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .contestant import Contestant, Task, Tensors

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = "torch"
DIFFERS = "a lone torch.mm of operands in the dtype, or a copy: no work that anybody asked for"
COPIED_BYTES = 256 << 20


class Product(Contestant):
    """The encoder's product into an existing buffer: the floor of every exact encoder."""

    def __init__(self, task: Task, tensors: Tensors) -> None:
        super().__init__(task, tensors)
        self.W = tensors["W_enc"].to(getattr(torch, task.dtype))

    def loop(self, batches: Iterator[torch.Tensor]) -> None:
        """Runs the product for each batch; operands are converted beforehand."""
        operand = self.tensors["W_enc"][:0]
        out = operand
        for x in batches:
            if operand.shape != x.shape:
                operand = x.to(self.W.dtype)
                out = operand @ self.W.T
            torch.mm(operand, self.W.T, out=out)

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """All pre-activations [B, F]."""
        return x.to(self.W.dtype) @ self.W.T

    def weights(self) -> Tensors:
        """The given weights with zero biases, as the product has none."""
        weights = super().weights()
        return {**weights, "b_enc": weights["b_enc"].zero_(), "b_dec": weights["b_dec"].zero_()}


class Copy(Contestant):
    """A memory copy that is larger than all caches."""

    def loop(self, batches: Iterator[torch.Tensor]) -> None:
        """Runs the copy for each batch."""
        source = torch.ones(COPIED_BYTES, dtype=torch.int8, device=self.task.device)
        target = torch.empty_like(source)
        for _ in batches:
            target.copy_(source)


def contestant(task: Task, tensors: Tensors) -> Contestant:
    """The contestant of the task's operation, "product" or "copy"."""
    return {"product": Product, "copy": Copy}[task.operation](task, tensors)
