"""The largest tensors a step makes: every one of them, counted as torch makes it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    build,
)
from sae_kernels.step import FusedStep, dense_pass
from tests.made_tensors import Sizes
from tests.settings import settings
from tests.step.harness import stepping

B, D, F, TILE = 256, 24, 4096, 1 << 18
GRADIENT, ROWS = F * D * 4, B * D * 4  # of a matrix, of a batch; h would be 4 MiB


def _sizes(config: SAEConfig, dense: bool, shift: float, **train: Any) -> list[tuple[int, str]]:
    sae = build(config)
    with torch.no_grad():
        sae.W_enc.div_(sae.W_enc.norm(dim=1, keepdim=True))
        sae.b_enc.fill_(shift)
    step = stepping(FusedStep, sae, settings(config, compute="float32", auxk_alpha=0, **train))
    for _ in range(2):  # the second makes no scratch any more
        step.dense_next = dense
        with Sizes() as sizes:
            result = step(torch.randn(B, D), lr=1e-4)
    assert (float(result.l0) > F / 4) == dense
    return sizes.made


L1 = {"loss": "mse", "sparsity": "l1", "sparsity_coefficient": 1.0}
L0 = {"loss": "mse", "sparsity": "l0", "sparsity_coefficient": 1.0}
TARGET = {"sparsity": "target_l0", "target_l0": 9.0, "preact_coefficient": 0.1}
GROUPS = (256, 768, 1024, 2048)


def test_what_counts_sees_a_large_tensor() -> None:
    with Sizes() as sizes:
        torch.zeros(3, 5) @ torch.zeros(5, 7)
    assert (3 * 7 * 4, "aten.mm.default") in sizes.made


@pytest.mark.parametrize(
    ("config", "train"),
    [
        (JumpReLUConfig(D, F, threshold_init=0.05), L0),
        (ReLUConfig(D, F), L1),
        (GatedConfig(D, F), L1),
    ],
    ids=["jumprelu", "relu", "gated"],
)
def test_dense(config: SAEConfig, train: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """One gradient a matrix; all else is a tile."""
    monkeypatch.setattr(dense_pass, "_TILE_BYTES", TILE)
    made = _sizes(config, True, 0.0, **train)
    large = [(size, name) for size, name in made if size > TILE]
    assert large == [(GRADIENT, "aten.new_empty.default")] * 2


@pytest.mark.parametrize(
    ("config", "train", "shift"),
    [
        (TopKConfig(D, F, 8), {}, 0.0),
        (BatchTopKConfig(D, F, 8), {}, 0.0),
        (BatchTopKConfig(D, F, 8, groups=GROUPS), {}, 0.0),
        (TopKConfig(D, F, 8), {"random_prefixes": 3}, 0.0),
        (JumpReLUConfig(D, F, threshold_init=3.0), L0, 0.0),
        (JumpReLUConfig(D, F, threshold_init=3.0), TARGET, 0.0),
        (ReLUConfig(D, F), L1, -3.0),
        (GatedConfig(D, F), L1, -3.0),
    ],
)
def test_sparse(config: SAEConfig, train: dict[str, Any], shift: float) -> None:
    """No gradient of a matrix, and nothing of B F: prefixes of a batch's residuals at most.

    (What a host kernel keeps for itself torch does not see: test_memory_architectures.py does.)
    """
    made = _sizes(config, False, shift, **train)
    # One in 770 of B F entries, with their window two: 8 bytes each.
    entries = 2 * 8 * B * F // 770
    assert max(made)[0] <= max(5 * ROWS, entries, 2 * 8 * F), max(made)
    assert max(made)[0] < GRADIENT
