"""FusedStep in other hands: foreign memory, foreign gradients, and what a step gives out."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sae_kernels.nn import BatchTopKConfig, BatchTopKSAE, SparseAutoencoder, TopKSAE
from sae_kernels.step import FusedStep, OutsideGradient
from sae_kernels.testing import assert_bitwise, assert_within, unit_roundoff
from tests.settings import settings
from tests.step.harness import NAMES, VARIANTS, B, D, F, K, Variant, build, everything, tokens

LR = 1e-3


@pytest.mark.parametrize("name", ["default", "many-dead", "bf16-everything"])
def test_differentiate_and_update_are_a_step(name: str) -> None:
    whole, halves = build(VARIANTS[name]), build(VARIANTS[name])
    for i in range(3):
        x = tokens(B, seed=i)
        one = whole(x, lr=LR)
        before = {n: p.clone() for n, p in halves.sae.state_dict().items()}
        done = halves.differentiate(x)
        for n, p in halves.sae.state_dict().items():
            assert_bitwise(f"{n} before the update", p, before[n])
        two = halves.update(done, lr=LR)
        for field, a, b in zip(one._fields, one, two, strict=True):
            assert_bitwise(field, b.reshape(-1), a.reshape(-1))
    mine, own = everything(halves), everything(whole)
    for n, t in own.items():
        assert_bitwise(n, mine[n], t)


class Owner:
    """Somebody else's module and Adam: W_enc as [D, F], latents first in memory."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        start = {n: p.detach().clone() for n, p in sae.named_parameters()}
        self.parameters = {n: torch.nn.Parameter(t) for n, t in start.items()}
        self.parameters["W_enc"] = torch.nn.Parameter(start["W_enc"].T)
        self.adam = torch.optim.Adam(self.parameters.values(), lr=LR)
        for parameter in self.parameters.values():
            parameter.grad = torch.zeros_like(parameter)
        self.adam.step()  # makes the moments; without gradient nothing moves

    def rows(self, tensor: Tensor) -> Tensor:
        return tensor.T if tensor.shape == (D, F) else tensor

    def step(self) -> FusedStep:
        with torch.device("meta"):
            sae = TopKSAE(D, F, k=K)
        weights = {n: self.rows(p.data) for n, p in self.parameters.items()}
        sae.load_state_dict(weights, assign=True)
        moments = {
            n: (
                self.rows(self.adam.state[p]["exp_avg"]),
                self.rows(self.adam.state[p]["exp_avg_sq"]),
            )
            for n, p in self.parameters.items()
        }
        train = settings(sae.config, compute="float32")
        return FusedStep(sae, train.objective, train.optimizer, moments=moments)


def test_foreign_parameters_and_moments_are_trained_where_they_lie() -> None:
    own = build(VARIANTS["default"])
    owner = Owner(own.sae)
    step = owner.step()
    for i in range(3):
        own(tokens(B, seed=i), lr=LR)
        step(tokens(B, seed=i), lr=LR)
    assert own.n_updates == step.n_updates == 3
    for name, parameter in owner.parameters.items():
        state, row = owner.adam.state[parameter], own.matrices[name]
        assert_bitwise(name, owner.rows(parameter.data), own.sae.get_parameter(name).data)
        for key, moment in (("exp_avg", row.m), ("exp_avg_sq", row.v)):
            mine = owner.rows(state[key])
            assert_bitwise(f"{key} of {name}", mine, moment.view(mine.shape))


def test_moments_that_cannot_be_updated_where_they_lie_are_refused() -> None:
    sae = TopKSAE(D, F, k=K)
    zeros = torch.zeros(F, D)
    for wrong, message in (
        (
            torch.zeros(D, F),
            r"moments\['W_enc'\]: expected contiguous tensors of shape \[256, 32\]",
        ),
        (torch.zeros(D, F).T, r"latents first.*strides \[1, 256\]"),
    ):
        with pytest.raises(ValueError, match=message):
            FusedStep(sae, moments={"W_enc": (zeros, wrong)})
    with pytest.raises(TypeError, match=r"expected torch.float32, got torch.float64"):
        FusedStep(sae, moments={"W_enc": (zeros, zeros.double())})


def _random(shape: torch.Size | tuple[int, ...], seed: int) -> Tensor:
    return 1e-3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FREE = {"unit_norm_decoder": False}  # else a gradient along a row is taken out again
PLAIN = {
    "alone": Variant(FREE),
    "beside AuxK's rows": dataclasses.replace(VARIANTS["many-dead"], sae=FREE),
}


@pytest.mark.parametrize("which", ["all", "some"])
@pytest.mark.parametrize("variant", PLAIN)
def test_an_outside_gradient_adds_to_the_step_s_own(variant: str, which: str) -> None:
    latents = torch.tensor([5, 0, 250], dtype=torch.int32) if which == "some" else None
    plain, added = build(PLAIN[variant]), build(PLAIN[variant])
    given = {}
    for seed, name in enumerate(NAMES):
        shape = list(plain.sae.get_parameter(name).shape)
        if latents is not None and name != "b_dec":
            shape[0] = len(latents)
        given[name] = _random(tuple(shape), seed)
    x = tokens(B)
    without = plain(x, lr=LR)
    outside = OutsideGradient(torch.tensor(0.25), given, latents)
    result = added.update(added.differentiate(x), lr=LR, outside=outside)
    assert float(result.loss) == pytest.approx(float(without.loss) + 0.25, rel=1e-6)
    assert float(result.aux_loss) == pytest.approx(float(without.aux_loss) + 0.25, rel=1e-6)
    u = unit_roundoff(torch.float32)
    for name in NAMES:
        # From m = 0 the first step leaves (1 - beta1) times the gradient in it.
        before, after = plain.matrices[name].m.double(), added.matrices[name].m.double()
        expected = torch.zeros_like(before)
        rows = given[name].double().view(-1, before.shape[1])
        at = slice(None) if latents is None or name == "b_dec" else latents.long()
        expected[at] = 0.1 * rows
        # The sum and its product with 1 - beta1 are rounded, and so is what stands alone.
        budget = 4 * u * (before.abs() + expected.abs())
        assert_within(name, after - before, expected, budget)


def test_clipping_sees_the_outside_gradient() -> None:
    step = build(VARIANTS["clip-k-annealing"])
    huge = OutsideGradient(torch.tensor(0.0), {"W_dec": 1e6 * torch.ones(F, D)})
    step.update(step.differentiate(tokens(B)), lr=LR, outside=huge)
    squares = torch.stack([(row.m.double() / 0.1).square().sum() for row in step.matrices.values()])
    assert float(squares.sum().sqrt()) == pytest.approx(0.05, rel=1e-5)


def test_an_outside_loss_that_is_not_finite_skips_the_step() -> None:
    step = build(VARIANTS["default"])
    before = everything(step)
    outside = OutsideGradient(torch.tensor(torch.nan), {"b_enc": torch.zeros(F)})
    result = step.update(step.differentiate(tokens(B)), lr=LR, outside=outside)
    assert result.skipped
    for name, tensor in everything(step).items():
        assert_bitwise(name, tensor, before[name])


def test_outside_gradients_of_another_shape_or_name_are_refused() -> None:
    step = build(VARIANTS["default"])
    done, zero = step.differentiate(tokens(B)), torch.tensor(0.0)
    with pytest.raises(ValueError, match="expected names of parameters, got 'W_gate'"):
        step.update(done, lr=LR, outside=OutsideGradient(zero, {"W_gate": torch.zeros(F)}))
    with pytest.raises(ValueError, match=r"'W_enc'\]: expected shape \[256, 32\], got \[32, 256\]"):
        step.update(done, lr=LR, outside=OutsideGradient(zero, {"W_enc": torch.zeros(D, F)}))
    two = torch.arange(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=r"'b_enc'\]: expected shape \[2\], got \[256\]"):
        step.update(done, lr=LR, outside=OutsideGradient(zero, {"b_enc": torch.zeros(F)}, two))


def test_a_step_gives_its_entries_and_residual() -> None:
    step = build(VARIANTS["raw-input-scaled"])
    x = tokens(B)
    done = step.differentiate(x)
    assert done.preacts is not None
    assert done.x is not None
    scaled = x * step.sae.config.activation_scale
    assert_bitwise("x", done.x, scaled)
    codes = step.sae.encode_scaled(scaled)
    assert_bitwise("indices", done.preacts.indices, codes.indices)
    assert_bitwise("codes", step.sae.activate(done.preacts).values.detach(), codes.values.detach())
    x_hat = codes.to_dense().double() @ step.sae.W_dec.double() + step.sae.b_dec.double()
    size = codes.to_dense().double() @ step.sae.W_dec.double().abs() + step.sae.b_dec.abs()
    budget = (K + 3) * unit_roundoff(torch.float32) * (size + scaled.abs())
    assert_within("residual", done.residual.double(), (x_hat - scaled).detach(), budget.detach())
    assert float(done.errors) == pytest.approx(float(done.residual.square().sum()), rel=1e-5)
    assert done.n_tokens == B
    assert done.n_kept == B * K


def test_a_step_gives_each_prefix_s_error() -> None:
    config = BatchTopKConfig(D, F, k=K, groups=(16, 48, 192))
    sae = BatchTopKSAE(config)
    train = settings(config, compute="float32", auxk_alpha=0.0)
    x = tokens(B)
    done = FusedStep(sae, train.objective, train.optimizer).differentiate(x)
    with torch.no_grad():
        codes = sae.encode(x).to_dense().double()
        expected = [
            (codes[:, :end] @ sae.W_dec[:end].double() + sae.b_dec - x).square().sum().item()
            for end in (16, 64, 256)
        ]
    assert done.errors.tolist() == pytest.approx(expected, rel=1e-5)


def test_micro_batches_give_no_entries() -> None:
    done = build(VARIANTS["default"]).differentiate(list(tokens(B).split(B // 2)))
    assert done.preacts is None
    assert done.x is None
    assert done.residual.shape == (0, D)
