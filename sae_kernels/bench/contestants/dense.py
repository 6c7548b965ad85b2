"""Contestant dense: plain torch with dense products, topk and Adam, eager or compiled."""

from __future__ import annotations

from typing import Any

import torch

from sae_kernels.testing.dense_steps import (
    DenseBatchTopKStep,
    DenseJumpReLUStep,
    DenseReLUStep,
    DenseStep,
)

from .contestant import Contestant, Task, Tensors, copies

PACKAGE = "torch"
DIFFERS = (
    "the same loss, constraint and Adam (torch's fused one) as ours, written with dense products; "
    "bfloat16 is torch.autocast"
)
_STEPS = {"topk": DenseStep, "batch_topk": DenseBatchTopKStep, "relu": DenseReLUStep}


class Dense(Contestant):
    """A dense SAE; with the option "compile" its passes go through torch.compile."""

    def __init__(self, task: Task, tensors: Tensors) -> None:
        super().__init__(task, tensors)
        compiler = "inductor" if task.options.get("compile") else None
        settings: dict[str, Any] = {
            "optimizer": "fused",
            "autocast": task.dtype != "float32",
            "compiler": compiler,
        }
        rows = tensors["W_enc"], tensors["W_dec"], task.k
        if task.architecture == "jumprelu":
            window = {name: task.options[name] for name in ("threshold", "bandwidth")}
            self.dense_step: DenseStep = DenseJumpReLUStep(*rows, **settings, **window)
        else:
            self.dense_step = _STEPS[task.architecture](*rows, **settings)
        if isinstance(self.dense_step, DenseReLUStep | DenseJumpReLUStep):
            self.dense_step.coefficient = task.options["coefficient"]
        self.dense_step.b_enc.data.copy_(tensors["b_enc"])
        self.dense_step.b_dec.data.copy_(tensors["b_dec"])
        built = torch.compile if compiler else (lambda part: part)
        self._encode, self._decode = built(self._encoded), built(self._decoded)
        self._forward = built(lambda x: self._decoded(self._encoded(x)))

    def _encoded(self, x: torch.Tensor) -> torch.Tensor:
        step = self.dense_step
        return step.codes(torch.nn.functional.linear(x - step.b_dec, step.W_enc, step.b_enc))

    def _decoded(self, codes: torch.Tensor) -> torch.Tensor:
        return codes @ self.dense_step.W_dec + self.dense_step.b_dec

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes [B, F]."""
        codes: torch.Tensor = self._encode(x)
        return codes

    def decode(self) -> torch.Tensor:
        """Reconstruction [B, D] of the given codes as a dense matrix."""
        x_hat: torch.Tensor = self._decode(self.given)
        return x_hat

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction [B, D] of x."""
        x_hat: torch.Tensor = self._forward(x)
        return x_hat

    def parameters(self) -> list[torch.Tensor]:
        """The step's weights and biases, and its thresholds if it has them."""
        return self.dense_step.parameters

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One dense training step."""
        return self.dense_step(x)

    def weights(self) -> Tensors:
        """The step's weights, and its thresholds if it has them."""
        step = self.dense_step
        found = copies(W_enc=step.W_enc, b_enc=step.b_enc, W_dec=step.W_dec, b_dec=step.b_dec)
        if isinstance(step, DenseJumpReLUStep):
            found |= copies(threshold=step.log_threshold.exp())
        return found

    def encoder(self) -> torch.Tensor:
        """The step's encoder [F, D]."""
        return self.dense_step.W_enc


contestant = Dense
