"""The dense Switch step that ours is measured against minimises what ours minimises."""

from __future__ import annotations

import torch

from sae_kernels.config import TrainConfig
from sae_kernels.functional import load_balance
from sae_kernels.nn import SwitchConfig, SwitchSAE
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.testing import assert_within, gamma
from sae_kernels.testing.dense_steps import DenseSwitchStep

B, D, F, K, E = 64, 16, 96, 5, 4
ALPHA = 3.0  # of its training script


def both(seed: int = 0) -> tuple[SwitchSAE, DenseSwitchStep, torch.Tensor]:
    """An SAE, the dense step on the same weights, and tokens."""
    sae = SwitchSAE(SwitchConfig(D, F, K, n_experts=E), seed=seed)
    x = torch.randn(B, D, generator=torch.Generator().manual_seed(seed))
    weights = sae.W_enc.detach(), sae.W_dec.detach()
    router = {"W_router": sae.W_router.detach(), "balance_coefficient": ALPHA}
    return sae, DenseSwitchStep(*weights, K, "default", autocast=False, **router), x


def test_loss_and_gradients_are_the_modules_in_fp64() -> None:
    sae, dense, x = both()
    x = x.double()
    sae.double().backend = "reference"
    x_hat, codes = sae(x)
    ours = (x_hat - x).square().sum(1).mean() + ALPHA * D * load_balance(codes.routing)
    names = ("W_enc", "W_dec", "b_dec", "W_router", "b_router")
    ours_grads = torch.autograd.grad(ours, [getattr(sae, name) for name in names])
    for name in names:
        setattr(dense, name, getattr(dense, name).detach().double().requires_grad_())
    theirs = dense._dense_loss(x)
    theirs_grads = torch.autograd.grad(theirs, [getattr(dense, name) for name in names])
    # Sums of at most B, D or F terms after one another, of terms not far above their sum.
    relative = 2 * gamma(B + D + F, torch.float64)
    assert_within("loss", theirs, ours, relative * float(ours.detach()))
    for name, got, want in zip(names, theirs_grads, ours_grads, strict=True):
        assert float(want.abs().max()) > 0, name
        size = float(want.abs().sum())
        assert_within(name, got, want, relative * size)


def test_a_step_of_ours_has_the_same_loss() -> None:
    for make in (FusedStep, AutogradStep):
        sae, dense, x = both()
        config = TrainConfig.of(
            sae.objective_class,
            loss="mse",
            clip_norm=1.0,
            balance_coefficient=ALPHA,
            auxk_alpha=0.0,
            compute="float32",
        )
        ours = make(sae, config.objective, config.optimizer)(x, lr=1e-4).loss
        # Pre-activations, probabilities and residuals, and the mean of their squares over tokens.
        relative = 2 * gamma(B + 3 * D + K + E, torch.float32)
        assert_within(make.__name__, dense(x), ours, relative * float(ours.detach()))


def test_a_step_learns_with_unit_rows_under_autocast_too() -> None:
    for optimizer, autocast in (("default", False), ("fused", True)):
        sae, _, x = both()
        options = {"W_router": sae.W_router.detach(), "balance_coefficient": ALPHA}
        rows = sae.W_enc.detach(), sae.W_dec.detach()
        dense = DenseSwitchStep(*rows, K, optimizer, autocast=autocast, **options)
        losses = [float(dense(x)) for _ in range(30)]
        assert losses[-1] < losses[0]
        assert not torch.equal(dense.W_router, options["W_router"])
        norms = dense.W_dec.detach().double().norm(dim=1)
        assert_within("norms", norms, torch.ones(F), gamma(D + 3, torch.float32))
