"""FusedStep: against plain dense torch, and the promises it makes about state."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor

from sae_kernels.config import OptimizerConfig
from sae_kernels.nn import TopKConfig, TopKObjective, TopKSAE
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.testing import adam_budgets, assert_bitwise, assert_within, gamma, norm_budget
from tests.step.bounded import Kept, expected_step
from tests.step.harness import (
    NAMES,
    ROUTES,
    VARIANTS,
    B,
    D,
    F,
    K,
    Variant,
    build,
    state,
    tokens,
    watched,
)

if TYPE_CHECKING:
    from tests.step.harness import State

LR = 2e-3


class DenseTopK:
    """What anybody would write in plain torch, in fp64: autograd, torch.optim.Adam, dense codes."""

    def __init__(self, start: State) -> None:
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            torch.nn.Parameter(start.weights[name].double()) for name in NAMES
        )
        parameters = self.W_enc, self.b_enc, self.W_dec, self.b_dec
        self.named = dict(zip(NAMES, parameters, strict=True))
        self.adam = torch.optim.Adam(self.named.values(), lr=LR)
        for name, p in self.named.items():
            m, v = (t.double() for t in start.moments[name])
            self.adam.state[p] = {
                "step": start.n_updates.float(),
                "exp_avg": m,
                "exp_avg_sq": v,
            }

    def step(self, x: Tensor) -> Tensor:
        h = (x - self.b_dec) @ self.W_enc.T + self.b_enc
        top = h.topk(K, dim=1)
        codes = torch.zeros_like(h).scatter(1, top.indices, top.values.relu())
        x_hat = codes @ self.W_dec + self.b_dec
        loss = (x_hat - x).pow(2).sum() / (x - x.mean(0)).pow(2).sum()
        loss.backward()
        grad, rows = self.W_dec.grad, self.W_dec.data
        grad -= (grad * rows).sum(1, keepdim=True) * rows
        self.adam.step()
        rows /= rows.norm(dim=1, keepdim=True)
        return loss.detach()


def test_is_plain_dense_torch_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    fused = build(Variant())
    sae, train = Variant().settings()
    for i in range(20):
        before, x = state(fused), tokens(B, seed=i)
        dense = DenseTopK(before)
        loss = dense.step(x.double())
        seen = watched(monkeypatch, fused, x, lr=LR)
        kept = Kept(seen.main[1], seen.main[0] > 0)
        bounds = expected_step(before.weights, x, sae, train, K, kept, torch.tensor([]), None)
        # The one rounding they do not share: x - b_dec is fp32 in the step, fp64 here. It is of
        # relative size 2^-24 of a term like those that the bounds sum, so they grow by a half.
        assert_within("loss", seen.result.loss, loss, 1.5 * bounds.loss.error)
        t = i + 1
        hyper = torch.tensor([LR, 1, 1 - 0.9**t, 1 - 0.999**t, 0, t], dtype=torch.float64)
        for name, p in dense.named.items():
            bound = bounds.gradients[name]
            assert_within(f"oracle of {name}", bound.value, p.grad, 0.5 * bound.error)
            old = (before.weights[name], *before.moments[name])
            budget, dm, _ = adam_budgets(old, p.grad, 1.5 * bound.error, hyper, torch.float32)
            if name == "W_dec":
                budget = norm_budget(p.detach(), budget, torch.float32, 1)
            moment = dense.adam.state[p]["exp_avg"]
            after = state(fused)
            assert_within(f"step {i} m of {name}", after.moments[name][0], moment, dm)
            assert_within(f"step {i} {name}", after.weights[name], p, budget)


def test_decoder_rows_have_unit_norm_after_each_step() -> None:
    fused = build(Variant(n_dead=40))
    for i in range(10):
        fused(tokens(B, seed=i), lr=0.05)
        # Norm: D squares, D sums, a root; then a division per component.
        norms = fused.sae.W_dec.detach().double().norm(dim=1)
        assert_within("norms", norms, torch.ones(F), gamma(D + 3, torch.float32))


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_lazy_leaves_latents_that_did_not_fire_alone(compute: str) -> None:
    lazy, dense = (
        build(Variant(train={"adam": adam, "compute": compute}, n_dead=30))
        for adam in ("lazy", "dense")
    )
    untouched = 0
    for i in range(5):
        before, x = state(lazy), tokens(B, seed=i)
        lazy(x, lr=LR)
        after = state(lazy)
        still = (lazy.dead.since_fired > 0) & ~dense.dead.mask()
        untouched += int(still.sum())
        for name in ("W_enc", "b_enc", "W_dec"):
            pairs = zip(
                (before.weights[name], *before.moments[name]),
                (after.weights[name], *after.moments[name]),
                strict=True,
            )
            for old, new in pairs:
                assert_bitwise(name, new[still], old[still])
        if i == 0:  # from moments of zero both modes are the same on rows with a gradient
            dense(x, lr=LR)
            for name, weight in state(dense).weights.items():
                rows = ~still if name != "b_dec" else slice(None)
                assert_bitwise(name, after.weights[name][rows], weight[rows])
    assert untouched > 0


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")], ids=str)
@pytest.mark.parametrize("variant", ["default", "bf16-everything"])
@pytest.mark.parametrize("route", ROUTES)
def test_a_batch_that_is_not_finite_changes_nothing(
    route: str, variant: str, poison: float
) -> None:
    """And what follows is bit for bit the run in which that batch never came."""
    steps = [build(VARIANTS[variant], ROUTES[route]) for _ in range(2)]
    bad = tokens(B, seed=7)
    bad[17, 3] = poison
    for i in range(4):
        results = [step(tokens(B, seed=i), lr=LR) for step in steps]
        assert not any(result.skipped for result in results)
        result = steps[0](bad, lr=LR)
        assert result.skipped
        assert not result.loss.isfinite()
        _assert_same_state(*steps)


def _assert_same_state(*steps: FusedStep | AutogradStep) -> None:
    a, b = (state(step) for step in steps)
    for name in a.weights:
        assert_bitwise(name, a.weights[name], b.weights[name])
        for kind, left, right in zip("mv", a.moments[name], b.moments[name], strict=True):
            assert_bitwise(f"{kind} of {name}", left, right)
    assert_bitwise("since fired", a.since_fired, b.since_fired)
    assert int(a.n_updates) == int(b.n_updates)
    if isinstance(steps[0], FusedStep):
        for name, row in steps[0].matrices.items():
            if row.copy is not None:
                assert_bitwise(f"copy of {name}", row.copy, steps[1].matrices[name].copy)


@pytest.mark.parametrize("route", ROUTES)
def test_an_overflowing_gradient_norm_is_skipped_and_reported(route: str) -> None:
    """The loss is still finite, its square in the norm is not."""
    variant = Variant({"relu": "none"}, {"loss": "mse", "clip_norm": 1.0})
    step, untouched = (build(variant, ROUTES[route]) for _ in range(2))
    for each in (step, untouched):
        each(tokens(B), lr=LR)
    result = step(1e13 * tokens(B), lr=LR)
    assert result.loss.isfinite()
    assert result.skipped
    _assert_same_state(step, untouched)


@pytest.mark.parametrize("adam", ["dense", "lazy"])
@pytest.mark.parametrize("compute", ["bfloat16", "float16"])
def test_the_compute_copy_is_the_rounded_master(compute: str, adam: str) -> None:
    variant = Variant(train={"compute": compute, "adam": adam}, n_dead=40)
    fused = build(variant)
    for i in range(5):
        for name in ("W_enc", "W_dec"):
            row = fused.matrices[name]
            rounded = row.param.to(getattr(torch, compute))
            assert_bitwise(f"{name} before step {i}", row.copy, rounded)
            assert row.param.data_ptr() == getattr(fused.sae, name).data_ptr()
        fused(tokens(B, seed=i), lr=LR)


@pytest.mark.parametrize("variant", ["default", "many-dead", "bf16-everything"])
def test_a_run_repeats_bit_for_bit(variant: str) -> None:
    runs = [build(VARIANTS[variant]) for _ in range(2)]
    for i in range(6):
        results = [step(tokens(B, seed=i), lr=LR) for step in runs]
        assert_bitwise("loss", results[0].loss[None], results[1].loss[None])
    _assert_same_state(*runs)


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
@pytest.mark.parametrize("clip", [None, 0.01], ids=["no-clip", "clip"])
def test_threads_do_not_show(compute: str, clip: float | None) -> None:
    """In a batch large enough that every part of the step is really split (AuxK is not in this:
    its dense products are torch's, whose order of sums may follow the number of threads)."""
    # Drawn by a product of torch's, which may round otherwise on another number of threads.
    batches = [tokens(2048, seed=i) for i in range(3)]
    runs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        runs.append(build(Variant(train={"compute": compute, "clip_norm": clip})))
        for x in batches:
            runs[-1](x, lr=LR)
    _assert_same_state(*runs)


def _mostly_negative(relu: str) -> FusedStep:
    """Three latents can be positive, K are kept."""
    sae = TopKSAE(TopKConfig(D, F, K, relu=relu))
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)
        sae.b_enc[:3] = 100.0
    return FusedStep(sae, TopKObjective(auxk_alpha=0), OptimizerConfig(compute="float32"))


@pytest.mark.parametrize("relu", ["after", "before"])
def test_kept_zeros_neither_fire_nor_learn(relu: str) -> None:
    fused = _mostly_negative(relu)
    result = fused(tokens(B), lr=LR)
    assert float(result.l0) == 3.0
    assert fused.dead.since_fired.tolist() == [0] * 3 + [B] * (F - 3)
    for name in ("W_enc", "b_enc", "W_dec"):
        moved = fused.matrices[name].m.abs().amax(1) > 0
        assert moved.nonzero().flatten().tolist() == [0, 1, 2]


def test_without_relu_everything_kept_fires() -> None:
    fused = _mostly_negative("none")
    assert float(fused(tokens(B), lr=LR).l0) == K
    assert int((fused.dead.since_fired == 0).sum()) >= K


def test_multi_topk_teaches_the_encoder_of_latents_beyond_k(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fused = build(VARIANTS["multi-topk"])
    seen = watched(monkeypatch, fused, tokens(B), lr=LR)
    kept = seen.main[1]
    assert kept.shape == (B, 4 * K)
    beyond = torch.tensor(sorted(set(kept.unique().tolist()) - set(kept[:, :K].unique().tolist())))
    assert beyond.numel() > 0
    for name in ("W_enc", "b_enc", "W_dec"):
        assert (fused.matrices[name].m[beyond].abs().amax(1) > 0).all(), name
    # They are not what the SAE will keep: they count neither as fired nor in the L0.
    assert (fused.dead.since_fired[beyond] == B).all()
    assert float(seen.result.l0) == K


@pytest.mark.parametrize("route", ROUTES)
def test_bad_calls_say_what_was_expected(route: str) -> None:
    step = build(Variant(), ROUTES[route])
    for x in (torch.ones(4, D + 1), torch.ones(0, D), torch.ones(D), torch.ones(2, 2, D)):
        with pytest.raises(ValueError, match=r"x: expected shape \[B, 32\] with B > 0"):
            step(x, lr=LR)
    for k in (0, F + 1):
        with pytest.raises(ValueError, match=f"k: .*{F}.*got {k}"):
            step(tokens(B), lr=LR, k=k)
    sae = TopKSAE(D, F, k=K).double()
    with pytest.raises(TypeError, match="W_enc: expected float32 master weights"):
        FusedStep(sae)
    assert sae.compute_dtype is None, "a step that was refused leaves the SAE as it was"


def test_the_batch_is_only_read() -> None:
    x = tokens(B)
    for route in ROUTES.values():
        build(VARIANTS["bf16-everything"], route)(x, lr=LR)
        assert_bitwise("x", x, tokens(B))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_batches_of_other_dtypes_are_the_same_numbers(dtype: torch.dtype) -> None:
    x = tokens(B).to(torch.bfloat16)
    first, second = build(Variant()), build(Variant())
    first(x.to(dtype), lr=LR)
    second(x.float(), lr=LR)
    _assert_same_state(first, second)
