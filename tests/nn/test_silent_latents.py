"""JumpReLU latents of threshold +inf: they never fire, and nothing else notices them.

The right value is that of an SAE whose silent latents have a finite threshold above every
pre-activation: the same bits, everywhere.
"""

from __future__ import annotations

import copy
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sae_kernels as sk
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from pathlib import Path

D, F, B = 16, 64, 96
LOG = pytest.mark.parametrize("log_threshold", [True, False])
HIGH = {True: 80.0, False: 1e34}  # e^80 is 5.5e34


def pair(log_threshold: bool, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Two SAEs that differ in the threshold of every third latent: +inf, and a finite one."""
    sae = sk.JumpReLUSAE(D, F, log_threshold=log_threshold, threshold_init=0.1, **options).to(dtype)
    other = copy.deepcopy(sae)
    name = sae.config.threshold_name
    with torch.no_grad():
        sae.get_parameter(name)[::3] = math.inf
        other.get_parameter(name)[::3] = HIGH[log_threshold]
    return sae, other


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator("cpu").manual_seed(seed)).to(
        torch.get_default_device()
    )


def assert_same_weights(sae: Any, other: Any) -> None:
    name = sae.config.threshold_name
    for key, tensor in other.state_dict().items():
        came = sae.state_dict()[key]
        if key == name:
            assert (came[::3] == torch.inf).all()
            came, tensor = came.clone(), tensor.clone()
            came[::3] = tensor[::3] = 0
        assert_bitwise(key, came, tensor)


@LOG
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_codes_reconstructions_and_gradients(
    backend: str, log_threshold: bool, dtype: torch.dtype, training: bool
) -> None:
    results = []
    for sae in pair(log_threshold, dtype):
        sae.backend = backend
        x = rows().to(dtype).requires_grad_()
        x_hat, codes = sae.train(training)(x)
        x_hat.square().sum().backward()
        name = sae.config.threshold_name
        grads = {n: p.grad for n, p in sae.named_parameters()}
        assert (grads[name][::3] == 0).all()
        results.append([x_hat, codes.to_dense(), x.grad, *grads.values()])
    for i, (came, expected) in enumerate(zip(*results, strict=True)):
        assert_bitwise(str(i), came, expected)
    assert results[0][1].count_nonzero() > B
    assert not results[0][1][:, ::3].any()


@LOG
@pytest.mark.parametrize("route", ["fused", "autograd"])
@pytest.mark.parametrize("sparsity", ["none", "l1", "l0", "target_l0"])
def test_training(log_threshold: bool, route: str, sparsity: str) -> None:
    saes = pair(log_threshold)
    settings = {"steps": 6, "batch_size": 32, "dead_after_tokens": 64, "auxk_alpha": 1 / 32}
    for sae in saes:
        sk.train(sae, rows(), route=route, sparsity=sparsity, **settings)
    assert_same_weights(*saes)


@LOG
def test_the_loss_that_revives_leaves_them_silent(log_threshold: bool) -> None:
    """Its relu(threshold - h) would be infinite."""
    sae, _ = pair(log_threshold)
    run = sk.train(
        sae, rows(), steps=6, batch_size=32, dead_after_tokens=32, preact_coefficient=3e-6
    )
    assert run.skipped == 0
    assert all(t.isfinite().all() for n, t in sae.state_dict().items() if "threshold" not in n)
    threshold = sae.get_parameter(sae.config.threshold_name)
    assert torch.equal(threshold.isinf(), torch.arange(F) % 3 == 0)
    assert not threshold.isnan().any()


@LOG
def test_scales_files_and_evaluation(log_threshold: bool, tmp_path: Path) -> None:
    sae, other = pair(log_threshold, activation_scale=4.0)
    assert_same_weights(sae.folded(), other.folded())
    assert_same_weights(sae.rescaled(0.5), other.rescaled(0.5))
    sae.save_pretrained(tmp_path)
    loaded = sk.load(tmp_path)
    assert_same_weights(loaded, other.folded())
    came, expected = (sk.evaluate(each.folded(), rows()) for each in (sae, other))
    assert came.scalars() == expected.scalars()
    assert came.dead_fraction >= 1 / 3


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
def test_other_thresholds_that_are_not_finite_are_refused(tmp_path: Path, bad: float) -> None:
    sae = sk.JumpReLUSAE(D, F, log_threshold=False)
    with torch.no_grad():
        sae.threshold[3] = bad
    sae.save_pretrained(tmp_path)
    with pytest.raises(sk.errors.DataError, match="threshold holds NaN or infinity"):
        sk.load(tmp_path)


def test_an_infinite_weight_is_refused(tmp_path: Path) -> None:
    sae = sk.JumpReLUSAE(D, F)
    with torch.no_grad():
        sae.b_enc[3] = math.inf
    sae.save_pretrained(tmp_path)
    with pytest.raises(sk.errors.DataError, match="b_enc holds NaN or infinity"):
        sk.load(tmp_path)
