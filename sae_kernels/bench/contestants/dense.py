"""Contestant dense: plain torch with dense products, topk and Adam, eager or compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.testing import dense_steps
from sae_kernels.testing.dense_steps import DenseJumpReLUStep, DenseReLUStep, DenseStep

from .contestant import LR, WEIGHTS, Contestant, Task, Tensors

if TYPE_CHECKING:
    from collections.abc import Callable

    _Part = Callable[[torch.Tensor], torch.Tensor]

PACKAGE = "torch"
DIFFERS = (
    "the same loss, constraint and Adam (torch's fused one) as ours, written with dense products; "
    "bfloat16 is torch.autocast"
)
_STEPS = {
    "topk": DenseStep, "batch_topk": dense_steps.DenseBatchTopKStep, "relu": DenseReLUStep,
    "jumprelu": DenseJumpReLUStep,
}  # fmt: skip


class Dense(Contestant):
    """A dense SAE; with the option "compile" its passes go through torch.compile."""

    def __init__(self, task: Task, tensors: Tensors) -> None:
        super().__init__(task, tensors)
        compiler = "inductor" if task.options.get("compile") else None
        settings: dict[str, Any] = {"optimizer": "fused", "compiler": compiler}
        settings["autocast"] = task.dtype != "float32"
        if task.architecture == "jumprelu":
            settings |= {name: task.options[name] for name in ("threshold", "bandwidth")}
        kind: Any = _STEPS[task.architecture]
        self.dense_step: DenseStep = kind(tensors["W_enc"], tensors["W_dec"], task.k, **settings)
        if isinstance(self.dense_step, DenseReLUStep | DenseJumpReLUStep):
            self.dense_step.coefficient = task.options["coefficient"]
        self.dense_step.b_enc.data.copy_(tensors["b_enc"])
        self.dense_step.b_dec.data.copy_(tensors["b_dec"])
        for group in self.dense_step.optimizer.param_groups:
            group["lr"] = task.options.get("lr", LR)
        built: Callable[[_Part], _Part] = torch.compile if compiler else lambda part: part
        self._encode, self._decode = built(self._encoded), built(self._decoded)
        self._forward = built(lambda x: self._decoded(self._encoded(x)))

    def _encoded(self, x: torch.Tensor) -> torch.Tensor:
        step = self.dense_step
        return step.codes(torch.nn.functional.linear(x - step.b_dec, step.W_enc, step.b_enc))

    def _decoded(self, codes: torch.Tensor) -> torch.Tensor:
        return codes @ self.dense_step.W_dec + self.dense_step.b_dec

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """Codes [B, F]."""
        return self._encode(x)

    def decode(self) -> torch.Tensor:
        """Reconstruction [B, D] of the given codes as a dense matrix."""
        return self._decode(self.given)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Reconstruction [B, D] of x."""
        return self._forward(x)

    def parameters(self) -> list[torch.Tensor]:
        """The step's weights and biases, and its thresholds if it has them."""
        return self.dense_step.parameters

    def step(self, x: torch.Tensor) -> torch.Tensor:
        """One dense training step."""
        return self.dense_step(x)

    def parts(self) -> Tensors:
        """The step's weights, and thresholds where it has them."""
        found = {name: getattr(self.dense_step, name) for name in WEIGHTS}
        if isinstance(self.dense_step, DenseJumpReLUStep):
            found["threshold"] = self.dense_step.log_threshold.exp()
        return found


contestant = Dense
