"""Whether a selection is right: the kept set, the values, and the order of both."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.testing import oracles
from sae_kernels.testing.budgets import (
    assert_bitwise,
    assert_same_selection,
    assert_within,
    rounding,
)

if TYPE_CHECKING:
    import torch

    from sae_kernels.testing.cases import Case


def assert_selects(
    case: Case,
    values: torch.Tensor,
    indices: torch.Tensor,
    rank_scale: torch.Tensor | None = None,
    *,
    flushed: float = 0.0,
) -> None:
    """Raises AssertionError unless these are the case's winners, in selection order.

    Exact kinds of input must come out exactly, ties and signs of zeros included; of the others the
    set may differ within the rounding band, and the order must be that of the computed keys.

    Args:
        case: what was selected from.
        values, indices: [B, K], as select_topk returned them.
        rank_scale: [F], as it was given to select_topk.
        flushed: see :func:`~sae_kernels.testing.rounding`.
    """
    exact = oracles.scores(*case.inputs(), rank_scale)
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
    order = oracles.selection(key.double(), case.K)
    assert_bitwise("order of the keys", key.gather(1, order), key)
