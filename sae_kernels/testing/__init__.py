"""Tools for testing kernels and backends: fp64 oracles, error budgets and hard inputs.

Example:
    >>> import torch
    >>> from sae_kernels import encode_topk
    >>> from sae_kernels.testing import CASES, assert_same_selection, oracles, rounding
    >>> case = CASES[0]
    >>> x, W, b = case.inputs()
    >>> codes = encode_topk(x, W, b, case.K, relu=False)
    >>> exact = oracles.scores(x, W, b)
    >>> budget = rounding(case.D + 1, exact.magnitude, case.dtype)
    >>> assert_same_selection("encode_topk", codes.indices, exact.key, case.K, budget)
"""

from sae_kernels.testing import oracles
from sae_kernels.testing.architecture import assert_steps_agree
from sae_kernels.testing.budgets import (
    adam_budgets,
    assert_bitwise,
    assert_same_selection,
    assert_within,
    gamma,
    norm_budget,
    rounding,
    softmax_budget,
    unit_roundoff,
)
from sae_kernels.testing.cases import CASES, EXACT_KINDS, Case, Inputs
from sae_kernels.testing.dense import DenseResult, DenseSpec, dense_loss
from sae_kernels.testing.selection import (
    assert_selects,
    assert_selects_above,
    assert_selects_batch,
    assert_selects_routed,
)

__all__ = [
    "CASES",
    "EXACT_KINDS",
    "Case",
    "DenseResult",
    "DenseSpec",
    "Inputs",
    "adam_budgets",
    "assert_bitwise",
    "assert_same_selection",
    "assert_selects",
    "assert_selects_above",
    "assert_selects_batch",
    "assert_selects_routed",
    "assert_steps_agree",
    "assert_within",
    "dense_loss",
    "gamma",
    "norm_budget",
    "oracles",
    "rounding",
    "softmax_budget",
    "unit_roundoff",
]
