"""AuxK: the closed form, autograd and the formula; and what it must leave alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from sae_kernels import backends
from sae_kernels.config import ObjectiveConfig
from sae_kernels.functional import encode_topk
from sae_kernels.primitives.auxk import auxk as closed_form
from sae_kernels.primitives.auxk import cpu
from sae_kernels.step import autograd_loss
from sae_kernels.step.autograd_loss import DeadRows, auxk_loss
from sae_kernels.testing import assert_bitwise, assert_within
from tests.step.bounded import Bounded, Kept, auxk_step
from tests.step.harness import ROUTES, B, D, F, Variant, build, state, tokens

PRIMITIVES = ("auxk",)
ALPHA, LR = 1 / 32, 1e-3


def _inputs(n_dead: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, DeadRows]:
    g = torch.Generator().manual_seed(n_dead)
    x = torch.randn(B, D, generator=g).to(dtype)
    residual = 0.3 * torch.randn(B, D, generator=g)
    W_enc, W_dec = (torch.randn(n_dead, D, generator=g).div(D**0.5).to(dtype) for _ in range(2))
    return x, residual, DeadRows(W_enc, 0.1 * torch.randn(n_dead, generator=g), W_dec)


def _dense_fp64(
    x: Tensor, residual: Tensor, dead: DeadRows, k_aux: int
) -> tuple[Tensor, list[Tensor]]:
    """The formula of the module's docstring and its gradients, by autograd in fp64."""
    leaves = [t.double().requires_grad_() for t in dead]
    W_enc, b_enc, W_dec = leaves
    n_dead, r = W_enc.shape[0], residual.double()
    top = (x.double() @ W_enc.T + b_enc).topk(min(k_aux, n_dead), dim=1)
    z = torch.zeros(B, n_dead, dtype=torch.float64).scatter(1, top.indices, top.values.relu())
    loss = (z @ W_dec - r).pow(2).sum() / (r - r.mean(0)).pow(2).sum()
    loss = ALPHA * min(n_dead / k_aux, 1) * loss
    return loss.detach(), list(torch.autograd.grad(loss, leaves))


def _closed(
    x: Tensor,
    residual: Tensor,
    dead: DeadRows,
    k_aux: int,
    backend: str,
    variance: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The primitive on matrices in which the dead latents are scattered; loss and gradients."""
    n_dead = dead.W_enc.shape[0]
    n_latents = 2 * n_dead + 3
    latents = torch.arange(n_dead) * 2 + 1
    matrices = []
    for rows in dead:
        whole = torch.full((n_latents, *rows.shape[1:]), torch.nan, dtype=rows.dtype)
        whole[latents] = rows
        matrices.append(whole)
    padded = torch.cat([latents, torch.full((5,), -1)]).int()
    count = torch.tensor(n_dead, dtype=torch.int32)
    loss, *gradients = closed_form(
        x, -residual, *matrices, padded, count, k_aux, ALPHA, variance, backend=backend
    )
    return loss, *(gradient[:n_dead] for gradient in gradients)


DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("n_dead", [1, 7, 16, 100])
def test_closed_form_and_autograd_are_the_formula(
    n_dead: int, dtype: torch.dtype, backend: str
) -> None:
    """k_aux = 16: fewer dead than that, as many, and more."""
    x, residual, dead = _inputs(n_dead, dtype)
    value, gradients = _dense_fp64(x, residual, dead, 16)
    closed = _closed(x, residual, dead, 16, backend)
    leaves = [t.float().requires_grad_() for t in dead]
    by_autograd = auxk_loss(x, residual, DeadRows(*leaves), 16, ALPHA, dtype)
    by_autograd.backward()

    codes = encode_topk(x, dead.W_enc, dead.b_enc, min(16, n_dead))
    config = ObjectiveConfig(auxk_alpha=ALPHA, k_aux=16)
    rows = tuple(Bounded.exact(t) for t in dead)
    bounds = auxk_step(
        Bounded.exact(x),
        Bounded.exact(residual),
        rows,
        Kept(codes.indices, codes.values > 0),
        config,
        dtype,
    )
    for name, loss in (("closed", closed[0]), ("autograd", by_autograd)):
        assert_within(f"{name} loss", loss, value, bounds.loss.error)
    for i, name in enumerate(("W_enc", "b_enc", "W_dec")):
        budget = bounds.gradients[name].error
        assert_within(f"closed {name}", closed[1 + i], gradients[i], budget)
        assert_within(f"autograd {name}", leaves[i].grad, gradients[i], budget)
        assert (gradients[i] != 0).any()


def test_no_dead_latent_is_no_loss(backend: str) -> None:
    x, residual, dead = _inputs(4, torch.float32)
    latents = torch.full((4,), -1, dtype=torch.int32)
    count = torch.zeros((), dtype=torch.int32)
    for r in (residual, torch.zeros_like(residual)):  # the second has no variance to divide by
        loss, *_ = closed_form(x, r, *dead, latents, count, 2, ALPHA, backend=backend)
        assert float(loss) == 0


def test_ties_go_to_the_lower_latent(backend: str) -> None:
    """All dead latents score the same: each token keeps the first k_aux."""
    x, residual, dead = _inputs(12, torch.float32)
    dead = DeadRows(
        dead.W_enc[:1].expand(12, D).contiguous(), torch.ones(12), dead.W_dec.contiguous()
    )
    _, _, db_enc, dW_dec = _closed(x, residual, dead, 5, backend)
    assert bool(db_enc[:5].all())
    assert not bool(db_enc[5:].any())
    assert not bool(dW_dec[5:].any())


def test_nan_reaches_the_loss(backend: str) -> None:
    x, residual, dead = _inputs(12, torch.float32)
    x[3, 2] = torch.nan
    assert bool(_closed(x, residual, dead, 5, backend)[0].isnan())


def test_half_precision_keeps_gradients_divided_by_a_large_variance(backend: str) -> None:
    """fp16 ends at 6e-8 and a batch's gradients are smaller: they once came out as zeros."""
    x, residual, dead = _inputs(40, torch.float16)
    large = 1e4 * residual
    _, gradients = _dense_fp64(x, large, dead, 16)
    assert gradients[2].abs().max() < 6e-6
    leaves = [t.float().requires_grad_() for t in dead]
    auxk_loss(x, large, DeadRows(*leaves), 16, ALPHA, torch.float16).backward()
    closed = _closed(x, large, dead, 16, backend)
    for i, want in enumerate(gradients):
        # Codes are rounded to fp16, 2^-11 each and all of one sign: the rest is far smaller.
        budget = 2.0**-10 * want.abs().amax()
        assert_within("closed", closed[1 + i], want, budget)
        assert_within("autograd", leaves[i].grad, want, budget)


def test_tiles_of_tokens_do_not_show(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The same sums in another order: the bound of the whole batch holds for its tiles."""
    x, residual, dead = (t for t in _inputs(100, torch.float32))
    x, residual = x.repeat(5, 1), residual.repeat(5, 1)
    whole = _closed(x, residual, dead, 16, backend)
    module = backends.implementation("auxk", x.device, x.dtype, backend)
    if not hasattr(module, "_TILE_BYTES"):
        return  # the reference takes all tokens at once
    monkeypatch.setattr(module, "_TILE_BYTES", 1)  # the least, 64 tokens
    tiled = _closed(x, residual, dead, 16, backend)
    for a, b in zip(tiled, whole, strict=True):
        # Five partial sums: four more roundings, of the largest partial result at most.
        assert_within("tiled", a, b, 2 * 2.0**-24 * (5 * B + 4) * b.abs().amax())


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_parts_of_a_batch_with_its_variance_add_up(dtype: torch.dtype, backend: str) -> None:
    """One token has no variance of its own, and yet its part."""
    x, residual, dead = _inputs(40, dtype)
    variance = (residual - residual.mean(0)).square().sum()
    whole = _closed(x, residual, dead, 16, backend)
    sizes = (1, 20, B - 21)
    pairs = zip(x.split(sizes), residual.split(sizes), strict=True)
    parts = [_closed(*pair, dead, 16, backend, variance) for pair in pairs]
    u = torch.finfo(dtype).eps / 2
    for name, want, *each in zip(("loss", "W_enc", "b_enc", "W_dec"), whole, *parts, strict=True):
        size = torch.stack([t.abs() for t in each]).sum(0).amax()
        # Up to four operands on the way of a term are rounded to the dtype (codes, weights,
        # gradients, products), and sums over D and B; here and there.
        budget = 2 * (4 * u + (B + 2 * D) * 2.0**-24) * size
        assert_within(name, sum(each[1:], each[0]), want.double(), budget.expand_as(want).double())


@pytest.mark.parametrize("route", ROUTES)
def test_only_dead_latents_get_a_gradient(route: str) -> None:
    """AuxK's part is the difference between a step with it and one without."""
    with_aux, without = (
        build(Variant(train={"auxk_alpha": alpha}, n_dead=50), ROUTES[route])
        for alpha in (ALPHA, 0.0)
    )
    dead = with_aux.dead.mask()
    results = [step(tokens(B), lr=LR) for step in (with_aux, without)]
    assert float(results[0].aux_loss) > 0
    assert float(results[1].aux_loss) == 0
    assert_bitwise("fvu", results[0].fvu[None], results[1].fvu[None])
    on, off = (state(step).moments for step in (with_aux, without))
    assert_bitwise("b_dec", on["b_dec"][0], off["b_dec"][0])
    for name in ("W_enc", "b_enc", "W_dec"):
        assert_bitwise(f"{name} of the living", on[name][0][~dead], off[name][0][~dead])
        changed = (on[name][0] != off[name][0]).reshape(F, -1).any(1)
        assert changed[dead].float().mean() > 0.5, f"{name} of the dead has no gradient"


@pytest.mark.parametrize("route", ROUTES)
def test_no_bias_in_the_auxiliary_reconstruction(route: str) -> None:
    """Moving b_dec and the activations together moves nothing in AuxK (peers add b_dec to it)."""
    losses = []
    for shift in (0.0, 4.0):  # powers of two keep x - b_dec the same up to a few roundings
        step = build(Variant(n_dead=50), ROUTES[route])
        with torch.no_grad():
            step.sae.b_dec += shift
        losses.append(float(step(tokens(B) + shift, lr=LR).aux_loss))
    # x + 4 is rounded to 2^-22 of about 1: the loss, quadratic in it, moves by some 2^-20.
    assert losses[0] > 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_zero_dead_changes_nothing(route: str) -> None:
    """With no dead latent AuxK on and off are the same run, bit for bit."""
    on, off = (build(Variant(train={"auxk_alpha": alpha}), ROUTES[route]) for alpha in (ALPHA, 0.0))
    for i in range(3):
        for step in (on, off):
            result = step(tokens(B, seed=i), lr=LR)
            assert float(result.aux_loss) == 0.0
    for name, p in on.sae.named_parameters():
        assert_bitwise(name, p.data, dict(off.sae.named_parameters())[name].data)


def test_zero_dead_costs_no_kernel_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("AuxK ran without a dead latent")

    monkeypatch.setattr(cpu, "run", refuse)
    monkeypatch.setattr(autograd_loss, "auxk_loss", refuse)
    for route in ROUTES.values():
        build(Variant(), route)(tokens(B), lr=LR)


@pytest.mark.parametrize("route", ROUTES)
def test_the_cap_takes_the_longest_dead(route: str) -> None:
    """Of 50 dead latents 20 take part, and with ties the same ones in every run."""
    variant = Variant(train={"auxk_latents": 20, "auxk_alpha": 1.0}, n_dead=50)
    moved = []
    for _ in range(2):
        step = build(variant, ROUTES[route])
        dead = step.dead.mask().nonzero().flatten()
        step.dead.since_fired[dead] = 10**6 + torch.arange(50) // 15  # 15 each, 5 of the last
        chosen = step.dead.longest(20)
        assert set(chosen.tolist()) == set(dead[45:].tolist() + dead[30:45].tolist())
        off = build(dataclasses.replace(variant, train={"auxk_alpha": 0.0}), ROUTES[route])
        for each in (step, off):
            each(tokens(B), lr=LR)
        difference = state(step).moments["W_dec"][0] != state(off).moments["W_dec"][0]
        moved.append(difference.any(1).nonzero().flatten().tolist())
    assert moved[0] == moved[1]
    assert moved[0]
    assert set(moved[0]) <= set(chosen.tolist())
