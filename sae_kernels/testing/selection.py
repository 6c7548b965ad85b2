"""Assertions about selections: the kept set, the values and their order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels.testing import oracles
from sae_kernels.testing.budgets import (
    assert_bitwise,
    assert_same_selection,
    assert_within,
    rounding,
)

if TYPE_CHECKING:
    from sae_kernels.testing.cases import Case


def assert_selects(
    case: Case,
    values: torch.Tensor,
    indices: torch.Tensor,
    rank_scale: torch.Tensor | None = None,
    *,
    by_magnitude: bool = False,
    flushed: float = 0.0,
) -> None:
    """Raises AssertionError unless these are the case's winners, in selection order.

    Exact kinds of input must come out exactly, ties and signs of zeros included; of the others the
    set may differ within the rounding band, and the order must be that of the computed keys.

    Args:
        case: what was selected from.
        values, indices: [B, K], as they were selected.
        rank_scale, by_magnitude: as they were given to the selection.
        flushed: see :func:`~sae_kernels.testing.rounding`.
    """
    exact = oracles.scores(*case.inputs(), rank_scale, by_magnitude)
    _assert_selected(case, exact, values, indices, rank_scale, flushed, by_magnitude)


def assert_selects_routed(
    case: Case,
    values: torch.Tensor,
    indices: torch.Tensor,
    experts: torch.Tensor,
    n_experts: int,
    *,
    flushed: float = 0.0,
) -> None:
    """Raises AssertionError unless these are the winners among the latents of tokens' experts.

    Args:
        case: what was selected from.
        values, indices: [B, K], as they were selected.
        experts: [B], where the tokens went.
        n_experts: how many there are.
        flushed: see :func:`~sae_kernels.testing.rounding`.
    """
    exact = oracles.of_experts(oracles.scores(*case.inputs()), experts, n_experts)
    own = indices.long() - experts.long()[:, None] * (case.F // n_experts)
    _assert_selected(case, exact, values, own, None, flushed)


def _assert_selected(
    case: Case,
    exact: oracles.Scores,
    values: torch.Tensor,
    indices: torch.Tensor,
    rank_scale: torch.Tensor | None,
    flushed: float,
    by_magnitude: bool = False,
) -> None:
    budget = rounding(case.D + 1, exact.magnitude, case.dtype, flushed=flushed)
    kept = indices.long()
    if case.exact:
        assert_bitwise("indices", kept, oracles.selection(exact.key, case.K))
        assert_within("values", values, exact.h.gather(1, kept), 0.0)
        if bool((values.signbit() & (values == 0)).any()):
            raise AssertionError("a value is -0")
        return
    band = budget
    if rank_scale is not None:  # one more rounding: of the product with the scale
        band = rounding(1, exact.key.abs(), case.dtype) + budget * rank_scale.double().abs()
    assert_same_selection("indices", indices, exact.key, case.K, band)
    assert_within("values", values, exact.h.gather(1, kept), budget.gather(1, kept))
    key = values if rank_scale is None else values * rank_scale[kept]
    key = key.abs() if by_magnitude else key
    order = oracles.selection(key.double(), case.K)
    assert_bitwise("order of the keys", key.gather(1, order), key)


def assert_selects_above(
    case: Case, came: oracles.Ragged, bounds: torch.Tensor, *, flushed: float = 0.0
) -> None:
    """Raises AssertionError unless these are the case's scores above their latents' bounds.

    Exact kinds of input must come out exactly. Of the others every entry must be there that is
    above its bound by more than rounding, and none that is below it by more.

    Args:
        case: what was selected from.
        came: what select_threshold returned.
        bounds: [F], as it was given to select_threshold.
        flushed: see :func:`~sae_kernels.testing.rounding`.
    """
    exact = oracles.scores(*case.inputs())
    budget = rounding(case.D + 1, exact.magnitude, case.dtype, flushed=flushed)
    if case.exact:
        return _assert_equal(came, oracles.ragged(exact.h, oracles.above(exact.h, bounds)))
    kept = _kept(came, case)
    if not bool(oracles.above(came.values, bounds[came.indices.long()]).all()):
        raise AssertionError("a value is not above its bound")
    bounds = bounds.double()
    _assert_between(kept, oracles.above(exact.h - budget, bounds), exact.h + budget > bounds)
    assert_within("values", came.values, exact.h[kept], budget[kept])


def assert_selects_batch(
    case: Case,
    came: oracles.Ragged,
    count: int,
    rank_scale: torch.Tensor | None = None,
    *,
    flushed: float = 0.0,
) -> None:
    """Raises AssertionError unless these are the batch's ``count`` largest positive scores.

    Exact kinds of input must come out exactly. Of the others there must be as many entries as
    there are positive ones, up to rounding and to ``count``, and the largest up to rounding.

    Args:
        case: what was selected from.
        came: what select_batch_topk returned.
        count, rank_scale: as they were given to select_batch_topk.
        flushed: see :func:`~sae_kernels.testing.rounding`.
    """
    exact = oracles.scores(*case.inputs(), rank_scale)
    budget = rounding(case.D + 1, exact.magnitude, case.dtype, flushed=flushed)
    if case.exact:
        wanted = oracles.ragged(exact.h, oracles.batch_topk(exact.h, exact.key, count))
        return _assert_equal(came, wanted)
    kept = _kept(came, case)
    scale = torch.ones(case.F) if rank_scale is None else rank_scale
    scale = scale.double().expand_as(exact.h)
    ranked = scale > 0
    certain, possible = ranked & (exact.h > budget), ranked & (exact.h > -budget)
    n = came.indices.numel()
    if not min(count, int(certain.sum())) <= n <= min(count, int(possible.sum())):
        raise AssertionError(
            f"expected {count} entries, or all positive ones ({int(certain.sum())} to "
            f"{int(possible.sum())} of them), got {n}"
        )
    nothing = torch.zeros_like(kept)
    _assert_between(kept, certain if n < count else nothing, possible)
    assert_within("values", came.values, exact.h[kept], budget[kept])
    if n:
        key = exact.key.masked_fill(~possible, -torch.inf)
        band = budget * scale
        if rank_scale is not None:  # one more rounding: of the product with the scale
            band = band + rounding(1, exact.key.abs(), case.dtype)
        entries = kept.flatten().nonzero().T
        assert_same_selection("entries", entries, key.reshape(1, -1), n, band.reshape(1, -1))


def _kept(came: oracles.Ragged, case: Case) -> torch.Tensor:
    """bool [B, F]; raises unless entries ascend by token, then latent, and offsets count them."""
    lengths, offsets = came.offsets.diff(), came.offsets.tolist()
    if len(offsets) != case.B + 1 or offsets[0] != 0 or bool((lengths < 0).any()):
        raise AssertionError(f"offsets do not ascend from 0 over {case.B} tokens: {offsets}")
    if offsets[-1] != came.values.numel() or came.values.shape != came.indices.shape:
        sizes = came.values.numel(), came.indices.numel()
        raise AssertionError(f"the last offset is {offsets[-1]}, but there are {sizes} entries")
    latents = came.indices.long()
    if bool(((latents < 0) | (latents >= case.F)).any()):
        raise AssertionError(f"latents outside [0, {case.F}): {latents.unique().tolist()}")
    kept = torch.zeros(case.B, case.F, dtype=torch.bool)
    kept[oracles.tokens(latents, came.offsets), latents] = True
    # Distinct and ascending latents of a token are those that a search of the mask finds.
    assert_bitwise("latents in order", latents, kept.nonzero()[:, 1])
    return kept


def _assert_between(kept: torch.Tensor, least: torch.Tensor, most: torch.Tensor) -> None:
    for fault, wrong in (("misses", least & ~kept), ("keeps", kept & ~most)):
        if bool(wrong.any()):
            places = wrong.nonzero().tolist()
            raise AssertionError(f"{fault} {len(places)} entries, the first at {places[0]}")


def _assert_equal(came: oracles.Ragged, wanted: oracles.Ragged) -> None:
    assert_bitwise("offsets", came.offsets, wanted.offsets)
    assert_bitwise("latents", came.indices, wanted.indices)
    assert_within("values", came.values, wanted.values, 0.0)
    if bool((came.values.signbit() & (came.values == 0)).any()):
        raise AssertionError("a value is -0")
