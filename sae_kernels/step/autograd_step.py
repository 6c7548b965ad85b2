"""AutogradStep: a training step through autograd and torch's Adam.

A user's own loop does the same with any loss and any optimizer. It has the interface of FusedStep;
a test holds their results together. Gradients are dense tensors here, so it is slower.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.step.autograd_loss import AuxKOfMicroBatches, autograd_loss
from sae_kernels.step.base import MicroBatches, StepBase, StepResult
from sae_kernels.step.state import State, matched

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sae_kernels.nn import SparseAutoencoder


class AutogradStep(StepBase):
    """Trains a :class:`~sae_kernels.nn.SparseAutoencoder` in place through autograd.

    Arguments: those of :class:`~sae_kernels.step.StepBase`. The decoder may be of any kind.

    Attributes:
        torch_adam: the ``torch.optim.Adam`` of all parameters.
        n_updates: int64 scalar, updates made (skipped steps do not count).

    Raises:
        TypeError: an objective of another architecture.
        ValueError: settings that do not go together, or that torch's Adam lacks.

    Example:
        >>> from sae_kernels.nn import JumpReLUSAE
        >>> from sae_kernels.step import AutogradStep
        >>> step = AutogradStep(JumpReLUSAE(8, 32), steps=100)
        >>> bool(step(torch.randn(64, 8), lr=1e-3).skipped)
        False
    """

    def __init__(self, sae: SparseAutoencoder, *arguments: Any, **options: Any) -> None:
        super().__init__(sae, *arguments, **options)
        betas = (self.optimizer.beta1, self.optimizer.beta2)
        self.torch_adam = torch.optim.Adam(
            sae.parameters(), lr=1.0, betas=betas, eps=self.optimizer.eps, fused=True
        )
        self.n_updates = torch.zeros((), dtype=torch.int64, device=sae.W_enc.device)

    def _check_settings(self) -> None:
        self.optimizer.expect_torch_adam()

    def __call__(
        self,
        x: torch.Tensor | Sequence[torch.Tensor],
        *,
        lr: float,
        k: float | None = None,
        target: torch.Tensor | Sequence[torch.Tensor] | None = None,
    ) -> StepResult:
        """One update from raw activations; see :meth:`FusedStep.__call__`."""
        sae = self.sae.train()
        batch = MicroBatches(x, target, self.checked)
        scale, variance = batch.loss_scale(self.objective.loss)
        survey = self.survey(batch.inputs(sae.centred), k)
        auxk = None if len(batch) == 1 else AuxKOfMicroBatches(self)
        self.torch_adam.zero_grad(set_to_none=True)

        def differentiated(rows: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
            context = self.context(
                sae.centred(rows), y, scale, k, total_tokens=batch.n_tokens, survey=survey
            )
            result = autograd_loss(self, context, rows, auxk=auxk)
            assert result.error is not None
            own = result.error + result.penalty
            (own + result.aux_loss).backward()
            return own.detach(), result.aux_loss.detach(), result.squared_error, result.fired

        sums: list[torch.Tensor] = []
        for rows, y in batch:
            parts = differentiated(rows, y)
            sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else list(parts)
        own, aux_loss, squared_error, fired = sums
        if auxk is not None:
            aux_loss = auxk.finish(aux_loss)
        loss = own + aux_loss
        finite = self.apply(loss, lr, self.optimizer.clip_norm)
        l0 = self.advance(fired, batch.n_tokens, finite)
        return StepResult(loss, squared_error / variance, l0, aux_loss, ~finite, fired)

    def update(self, loss: torch.Tensor, lr: float, clip_norm: float | None) -> torch.Tensor:
        """Backward pass and Adam step, skipped unless all is finite; returns whether it is.

        The gradient norm is checked only with a ``clip_norm``; infinity checks without clipping.
        """
        self.torch_adam.zero_grad(set_to_none=True)
        loss.backward()
        return self.apply(loss.detach(), lr, clip_norm)

    def apply(self, loss: torch.Tensor, lr: float, clip_norm: float | None) -> torch.Tensor:
        """The Adam step of :meth:`update`, with the gradients that the parameters have."""
        sae, adam = self.sae, self.torch_adam
        if sae.config.unit_norm_decoder:
            sae.remove_parallel_gradient_()
        finite = loss.isfinite()
        if clip_norm is not None:
            norm = torch.nn.utils.clip_grad_norm_(sae.parameters(), clip_norm)
            finite = finite & norm.isfinite()
        if finite:
            adam.param_groups[0]["lr"] = lr
            adam.step()
            if sae.config.unit_norm_decoder:
                sae.normalize_decoder_()
        self.n_updates += finite
        return finite

    def _live_tensors(self) -> dict[str, torch.Tensor]:
        return super()._live_tensors() | {"n_updates": self.n_updates}

    def state(self) -> State:
        """All that the next step depends on, without the weights."""
        saved = self.torch_adam.state_dict()["state"]
        moments = {f"adam.{i}.{key}": t for i, each in saved.items() for key, t in each.items()}
        return super().state() | State(moments, {})

    def load_state(self, state: State) -> None:
        """Restores what :meth:`state` returned.

        Raises:
            DataError: moments of other shapes than the parameters.
        """
        super().load_state(state)
        saved: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in state.tensors.items():
            if name.startswith("adam."):
                _, number, key = name.split(".", 2)
                saved.setdefault(int(number), {})[key] = tensor.clone()
        parameters = [p for group in self.torch_adam.param_groups for p in group["params"]]
        for i in saved:
            for key in ("exp_avg", "exp_avg_sq"):
                matched(f"adam.{i}.{key}", parameters[i], state)
        groups = self.torch_adam.state_dict()["param_groups"]
        self.torch_adam.load_state_dict({"state": saved, "param_groups": groups})
