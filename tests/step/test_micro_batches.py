"""A batch in micro-batches makes the step of the whole batch, on both routes."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config import OptimizerConfig
from sae_kernels.nn import BatchTopKConfig, BatchTopKSAE, TopKSAE
from sae_kernels.nn import build as build_sae
from sae_kernels.step import AutogradStep, FusedStep, adam
from sae_kernels.step.base import Variance
from sae_kernels.testing import assert_bitwise, assert_within
from tests.settings import settings
from tests.step.architectures import (
    ARCHITECTURES,
    DEAD_AFTER,
    REPRESENTATIVE,
    B,
    batch,
    build,
    route_of,
    set_dense,
)
from tests.step.clear_batches import clear_batch
from tests.step.dense_steps import assert_result, expected
from tests.step.harness import ROUTES, counted, everything, state, stepping

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

LR = 1e-3
Step = FusedStep | AutogradStep
CASES = [
    (name, way)
    for name, case in ARCHITECTURES.items()
    for way in ("sparse", "dense", "autograd")
    if way != "dense" or case.can_be_dense()
]
each_route = pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)


def _split(
    x: Tensor, target: Tensor | None, size: int
) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
    return x.split(size), None if target is None else target.split(size)


@pytest.mark.parametrize("size", [1, 5, 12])
@pytest.mark.parametrize(("name", "way"), CASES, ids=lambda part: part)
def test_losses_and_gradients_are_the_oracles_of_the_whole_batch(
    name: str, way: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With beta1 = 0 Adam's first moment is the gradient; its bound holds in any order of sums."""
    case = ARCHITECTURES[name]
    case = dataclasses.replace(case, train={**case.train, "beta1": 0.0})
    monkeypatch.setattr(adam, "_TILE_BYTES", 4 * 11 * 5)  # five rows at a time
    step = route_of(case, way, "reference", monkeypatch)
    x, target = clear_batch(step, *batch(case, 2 * B), B)
    want = expected(step, x, target)
    before = step.dead.since_fired.clone()
    xs, targets = _split(x, target, size)
    result, fired = counted(step, x=xs, lr=LR, target=targets)
    assert_result(result, want)
    assert_bitwise("fired", fired.long(), want.fired)
    aged = torch.where(want.fired > 0, 0, before + B)  # tokens, not micro-batches
    assert_bitwise("since fired", step.dead.since_fired, aged)
    assert int(step.n_updates) == 1
    moments = state(step).moments
    for parameter, bound in want.gradients.items():
        assert_within(parameter, moments[parameter][0], bound.value, bound.error)


@each_route
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_bf16_operands_keep_the_same_entries(name: str, route: type[Step]) -> None:
    """Each token's row is computed alone; where a gradient is rounded to bf16 it is off by that."""
    case = ARCHITECTURES[name]
    case = dataclasses.replace(case, train={**case.train, "beta1": 0.0, "compute": "bfloat16"})
    whole, split = (build(case, route) for _ in range(2))
    x, target = batch(case)
    xs, targets = _split(x, target, 5)
    want, got = whole(x, lr=LR, target=target), split(xs, lr=LR, target=targets)
    assert_bitwise("fired", got.fired, want.fired)
    assert float(got.loss) == pytest.approx(float(want.loss), rel=2.0**-8)
    gradients = [{n: m for n, (m, _) in state(each).moments.items()} for each in (split, whole)]
    for key, m in gradients[1].items():
        assert_within(key, gradients[0][key], m.double(), 2.0**-7 * m.abs().max().expand_as(m))


@each_route
@pytest.mark.parametrize("name", REPRESENTATIVE)
@pytest.mark.parametrize("size", [B, 100])
def test_one_micro_batch_is_the_whole_batch_bit_for_bit(
    name: str, route: type[Step], size: int
) -> None:
    case = ARCHITECTURES[name]
    whole, single = (build(case, route) for _ in range(2))
    for i in range(2):
        x, target = batch(case, seed=i)
        xs, targets = _split(x, target, size)
        assert_bitwise(
            "loss",
            whole(x, lr=LR, target=target).loss[None],
            single(xs, lr=LR, target=targets).loss[None],
        )
    for key, tensor in everything(whole).items():
        assert_bitwise(key, everything(single)[key], tensor)


@each_route
@pytest.mark.parametrize("name", REPRESENTATIVE)
def test_one_micro_batch_that_is_not_finite_skips_the_whole_update(
    name: str, route: type[Step]
) -> None:
    case = ARCHITECTURES[name]
    step = build(case, route)
    x, target = batch(case)
    step(x, lr=LR, target=target)  # torch's Adam has no moments before
    for row in (0, 7, B - 1):
        before = everything(step)
        bad = x.clone()
        bad[row, 1] = torch.nan
        xs, targets = _split(bad, target, 5)
        result = step(xs, lr=LR, target=targets)
        assert result.skipped
        assert not result.loss.isfinite()
        after = everything(step)
        for key, tensor in before.items():
            assert_bitwise(key, after[key], tensor)
    xs, targets = _split(x, target, 5)
    assert not step(xs, lr=LR, target=targets).skipped


@each_route
@pytest.mark.parametrize("ranked", [False, True], ids=["by-value", "by-norm"])
@pytest.mark.parametrize("guess", [None, 1e-3, 0.5, 1e3, torch.inf])
def test_batch_topk_selects_among_all_micro_batches(
    route: type[Step], ranked: bool, guess: float | None
) -> None:
    """Exactly int(k B) entries, ties to the first tokens, wherever the search for them begins."""
    case = ARCHITECTURES["batchtopk-ranked" if ranked else "batchtopk-fraction"]
    case = dataclasses.replace(case, train={**case.train, "beta1": 0.0})
    whole, split = (build(case, route) for _ in range(2))
    assert isinstance(split.sae, BatchTopKSAE)
    if guess is not None:
        split.sae.last_key.fill_(guess)
    x, _ = batch(case, 6)
    x = x.repeat(4, 1)  # every key four times: the cut falls among equal ones
    x[:6] *= 3
    want, got = whole(x, lr=LR), split(x.split(7), lr=LR)
    k = case.sae.k  # type: ignore[attr-defined]
    assert int(got.fired.sum()) == int(want.fired.sum()) == int(k * 24)
    assert_bitwise("fired", got.fired, want.fired)
    for buffer in ("threshold", "last_key"):
        assert_bitwise(buffer, *(s.sae.get_buffer(buffer)[None] for s in (split, whole)))
    # The gradients depend on which tokens the entries are of; sums of 24 rows in another order.
    gradients = [{n: m for n, (m, _) in state(each).moments.items()} for each in (split, whole)]
    for key, m in gradients[1].items():
        assert_within(key, gradients[0][key], m.double(), 1e-5 * m.abs().max().expand_as(m))


@each_route
def test_batch_topk_with_fewer_positives_than_places(route: type[Step]) -> None:
    """All positive entries are kept, and a batch without any trains on."""
    case = ARCHITECTURES["batchtopk"]
    for shift in (-2.0, -1e3):
        whole, split = (build(case, route) for _ in range(2))
        for step in (whole, split):
            with torch.no_grad():
                step.sae.b_enc.add_(shift)
        x, _ = batch(case)
        want, got = whole(x, lr=LR), split(x.split(4), lr=LR)
        assert int(want.fired.sum()) < 3 * B
        assert_bitwise("fired", got.fired, want.fired)
        assert not got.skipped


@each_route
def test_a_share_of_k_too_small_for_one_entry_of_the_batch(route: type[Step]) -> None:
    """int(k B) = 0 keeps nothing; with one token more the batch keeps one entry, wherever it is."""
    config = BatchTopKConfig(5, 12, k=0.2)
    for n, kept in ((4, 0), (5, 1)):
        step = stepping(route, build_sae(config), settings(config, compute="float32"))
        for _ in range(2):
            result = step(torch.randn(n, 5).split(2), lr=LR)
            assert int(result.fired.sum()) == kept
            assert not result.skipped


@pytest.mark.parametrize("n_dead", [0, 30])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_lazy_adam_moves_the_rows_with_an_entry_alone(clip_norm: float | None, n_dead: int) -> None:
    """Of 256 latents most fire in no micro-batch: these stay, bit for bit, but for AuxK's."""
    optimizer = OptimizerConfig(compute="float32", adam="lazy", clip_norm=clip_norm)
    whole, split = (FusedStep(TopKSAE(16, 256, k=2), optimizer=optimizer) for _ in range(2))
    for i in range(3):
        x = torch.randn(20, 16, generator=torch.Generator().manual_seed(i))
        before = state(whole), state(split)
        for step in (whole, split):
            step.dead.since_fired[:n_dead] = 10**8
        results = whole(x, lr=LR), split(x.split(6), lr=LR)
        assert (float(results[1].aux_loss) > 0) == (n_dead > 0)
        after = state(whole), state(split)
        for key in ("W_enc", "b_enc", "W_dec"):
            moved = [
                (new.moments[key][0] != old.moments[key][0]).reshape(256, -1).any(1)
                for old, new in zip(before, after, strict=True)
            ]
            assert_bitwise(key, moved[1], moved[0])
            assert 20 < int(moved[1].sum()) < 200
            assert_bitwise(key, after[1].weights[key][~moved[1]], before[1].weights[key][~moved[1]])
        # 0.003 of what Adam moves a weight in a step: another order of the sums is far less.
        for key, p in after[0].weights.items():
            assert_within(key, after[1].weights[key], p.double(), torch.full_like(p, 3e-3 * LR))


@each_route
def test_the_same_latents_are_dead_for_all_micro_batches(route: type[Step]) -> None:
    """A latent that fires in the first one still takes part in AuxK of the second."""
    case = dataclasses.replace(
        ARCHITECTURES["topk"], train={"auxk_alpha": 0.5, "dead_after_tokens": DEAD_AFTER}
    )
    step = build(case, route)
    step.dead.since_fired.fill_(DEAD_AFTER)
    x, _ = batch(case)
    whole = build(case, route)
    whole.dead.since_fired.fill_(DEAD_AFTER)
    want, got = whole(x, lr=LR), step(x.split(5), lr=LR)
    assert float(want.aux_loss) > 0
    assert float(got.aux_loss) == pytest.approx(float(want.aux_loss), rel=1e-5)


@each_route
def test_what_does_not_fit_is_refused_before_anything_changes(route: type[Step]) -> None:
    case = ARCHITECTURES["transcoder"]
    step = build(case, route)
    x, y = batch(case)
    assert y is not None
    step(x, lr=LR, target=y)
    before = everything(step)
    wrong: list[tuple[Any, Any, str]] = [
        ([], [], "at least one, got 0 of x and 0 of target"),
        (x.split(5), y.split(4), "got 3 of x and 4 of target"),
        (x.split(5), y, "got 3 of x and 1 of target"),
        ((x[:5], x[5:, :3]), y.split((5, B - 5)), r"expected shape \[B, 11\] with B > 0"),
        ((x[:5], x[5:]), y.split((4, B - 4)), r"target: expected shape \[5, 7\]"),
        (x.split(5), None, "expected what the transcoder is to reconstruct"),
    ]
    for xs, targets, message in wrong:
        with pytest.raises(ValueError, match=message):
            step(xs, lr=LR, target=targets)
    for key, tensor in before.items():
        assert_bitwise(key, everything(step)[key], tensor)


def test_the_choice_of_a_pass_counts_all_micro_batches() -> None:
    case = ARCHITECTURES["relu-l1"]
    step = build(case, FusedStep)
    for shift, dense in ((-1e3, False), (2e3, True)):
        set_dense(step, True)
        with torch.no_grad():
            step.sae.b_enc.add_(shift)
        step(batch(case)[0].split(5), lr=LR)
        assert step.dense_next == dense


def test_the_variance_of_parts_is_that_of_all() -> None:
    """Far from 0, where a sum of squares less the square of the sum would have no digit left."""
    rows = torch.randn(1000, 7, generator=torch.Generator().manual_seed(0)) + 1000
    parts = Variance()
    for part in rows.split((1, 300, 699)):
        parts.add(part)
    exact = (rows.double() - rows.double().mean(0)).square().sum()
    assert float(parts.total) == pytest.approx(float(exact), rel=1e-4)
    assert parts.n_rows == 1000
