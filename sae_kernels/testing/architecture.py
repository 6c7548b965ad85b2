"""Gradient check of an architecture, of this package or your own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.config.optimizer import OptimizerConfig
from sae_kernels.nn import build
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.testing.budgets import unit_roundoff

if TYPE_CHECKING:
    from sae_kernels.config.objective import ObjectiveConfig
    from sae_kernels.nn import SAEConfig, SparseAutoencoder

# Both steps sum the same terms in different orders, so their errors differ by a factor; for sums of
# some hundred terms it is below this.
_ORDERS = 8


def assert_steps_agree(
    config: SAEConfig, objective: ObjectiveConfig | None = None, *, n_tokens: int = 24
) -> None:
    """Asserts that FusedStep's loss and gradients are as close to fp64 as autograd's are.

    The exact values are those of the architecture's own formulas under autograd in fp64. FusedStep
    in fp32 may be off from them by eight times what autograd in fp32 is off, or by eight roundings
    of the largest gradient, whichever is more: it adds up the same terms in another order. So it
    may in micro-batches of a third of the batch.

    Args:
        config: a small SAE in which every parameter gets a gradient.
        objective: the objective; None: the architecture's default.
        n_tokens: tokens in the batch, B.

    Raises:
        AssertionError: a loss or gradient is off; the message names the parameter.

    Example:
        >>> from sae_kernels.nn import TopKConfig
        >>> from sae_kernels.testing import assert_steps_agree
        >>> assert_steps_agree(TopKConfig(d_in=8, n_latents=32, k=4))
    """
    sae = build(config)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sae.parameters():
            scale = 0.1 if parameter.dim() == 1 else 1 / parameter.shape[1] ** 0.5
            parameter.add_(scale * torch.randn(parameter.shape, generator=g))
        if config.unit_norm_decoder:
            sae.normalize_decoder_()
    x = torch.randn(n_tokens, config.input_width, generator=g)
    target = torch.randn(n_tokens, config.output_width, generator=g) if config.transcodes else None
    exact_loss, exact = _by_autograd(copy.deepcopy(sae).double(), objective, x, target)
    loss, rounded = _by_autograd(copy.deepcopy(sae), objective, x, target)
    for size in (n_tokens, max(1, n_tokens // 3)):
        step_loss, step = _by_kernels(copy.deepcopy(sae), objective, x, target, size)
        where = "" if size == n_tokens else f" in micro-batches of {size}"
        _assert_as_close(f"loss{where}", step_loss, loss, exact_loss)
        for name, gradient in exact.items():
            _assert_as_close(f"{name}{where}", step[name], rounded[name], gradient)


def _by_autograd(
    sae: SparseAutoencoder,
    objective: ObjectiveConfig | None,
    x: torch.Tensor,
    target: torch.Tensor | None,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients by AutogradStep, the decoder's projected as in a step."""
    step = AutogradStep(sae, objective, OptimizerConfig(compute="float32"))
    if sae.W_enc.dtype == torch.float64:
        sae.compute_dtype = torch.float64
    result = step(x, lr=0.0, target=target)
    named = sae.named_parameters()
    return result.loss, {name: p.grad for name, p in named if p.grad is not None}


def _by_kernels(
    sae: SparseAutoencoder,
    objective: ObjectiveConfig | None,
    x: torch.Tensor,
    target: torch.Tensor | None,
    size: int,
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Loss and gradients by FusedStep in micro-batches of ``size``.

    With beta1 = 0 Adam's first moment is the gradient.
    """
    step = FusedStep(sae, objective, OptimizerConfig(compute="float32", beta1=0.0))
    step.dense_next = False
    targets = None if target is None else target.split(size)
    result = step(x.split(size), lr=0.0, target=targets)
    parameters = dict(sae.named_parameters())
    return result.loss, {
        name: matrix.m.reshape(parameters[name].shape) for name, matrix in step.matrices.items()
    }


def _assert_as_close(
    name: str, ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor
) -> None:
    error = (ours.double() - exact).abs().max()
    allowed = (theirs.double() - exact).abs().max()
    allowed = torch.maximum(allowed, unit_roundoff(torch.float32) * exact.abs().max())
    assert float(error) <= _ORDERS * float(allowed), (
        f"{name}: expected FusedStep within {_ORDERS} times {float(allowed):.3g} of fp64, as "
        f"autograd is, got {float(error):.3g}"
    )
