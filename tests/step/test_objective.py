"""Which losses an architecture has, and how random prefixes are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_kernels.config import TrainConfig
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    build,
)
from sae_kernels.step.objective import random_prefixes
from tests.step.harness import ROUTES

TOPK, BATCHTOPK = TopKConfig(4, 16, 2), BatchTopKConfig(4, 16, 2)
JUMPRELU, RELU, GATED = JumpReLUConfig(4, 16), ReLUConfig(4, 16), GatedConfig(4, 16)
GROUPED = TopKConfig(4, 16, 2, groups=(4, 12))
_JUMP = "it counts through JumpReLU's thresholds; choose architecture 'jumprelu'"


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("config", "train", "message"),
    [
        *(
            (
                config,
                {"sparsity": "l0"},
                f"sparsity: expected l1, lp or tanh with architecture '{config.architecture}', "
                f"got 'l0'; {_JUMP}",
            )
            for config in (TOPK, BATCHTOPK, RELU, GATED)
        ),
        (
            RELU,
            {"sparsity": "target_l0", "target_l0": 3},
            f"sparsity: expected l1, lp or tanh with architecture 'relu', got 'target_l0'; {_JUMP}",
        ),
        (
            GATED,
            {"preact_coefficient": 0.5},
            f"preact_coefficient: expected 0 with architecture 'gated', got 0.5; {_JUMP}",
        ),
        (
            JUMPRELU,
            {"sparsity": "target_l0"},
            "target_l0: expected a number with sparsity 'target_l0', got None",
        ),
        (
            TopKConfig(4, 16, 2, relu="none"),
            {"sparsity": "l1"},
            "sparsity: expected none with relu 'none' (codes may be negative), got 'l1'",
        ),
        *(
            (
                config,
                {"multi_topk": True},
                f"multi_topk: expected false with architecture '{config.architecture}', got true",
            )
            for config in (BATCHTOPK, JUMPRELU, RELU, GATED)
        ),
        *(
            (
                config,
                {"random_prefixes": 4},
                f"random_prefixes: expected 0 with architecture '{config.architecture}' (prefixes "
                "are for topk and batchtopk), got 4",
            )
            for config in (JUMPRELU, RELU, GATED)
        ),
        (
            TOPK,
            {"multi_topk": True, "random_prefixes": 2},
            "multi_topk: expected false with prefixes of latents, got true",
        ),
        (
            GROUPED,
            {"multi_topk": True},
            "multi_topk: expected false with prefixes of latents, got true",
        ),
        *(
            (
                config,
                {"k_start": 4},
                f"k_start: expected none with architecture '{config.architecture}', which has no k",
            )
            for config in (JUMPRELU, RELU, GATED)
        ),
    ],
)
def test_what_an_architecture_does_not_have_is_named(
    config: SAEConfig, train: dict[str, Any], message: str, route: str
) -> None:
    with pytest.raises(ValueError) as error:
        ROUTES[route](build(config), TrainConfig(**train))
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("config", "train"),
    [
        (TOPK, {"sparsity": "l1"}),
        (BATCHTOPK, {"sparsity": "tanh", "k_start": 4}),
        (GROUPED, {"random_prefixes": 2}),  # drawn in the place of its own
        (JUMPRELU, {"sparsity": "lp", "preact_coefficient": 0.1}),
        (RELU, {"sparsity": "tanh", "sparsity_norm_weighted": True}),
        (GATED, {"sparsity": "l1"}),
    ],
)
@pytest.mark.parametrize("route", ROUTES)
def test_what_it_has_is_taken(config: SAEConfig, train: dict[str, Any], route: str) -> None:
    step = ROUTES[route](build(config), TrainConfig(sparsity_coefficient=0.1, **train))
    assert step(torch.randn(9, 4), lr=1e-3).loss.isfinite()


def _ends(n_latents: int, n: int, step: int, seed: int = 0) -> list[int]:
    config = TrainConfig(random_prefixes=n, seed=seed)
    drawn = random_prefixes(build(TopKConfig(2, n_latents, 1)), config, step)
    assert drawn is not None
    assert drawn.ends.dtype == torch.int32
    return drawn.ends.tolist()


def test_prefixes_ascend_to_the_whole_and_are_drawn_anew_each_step() -> None:
    seen = [_ends(1000, 6, step) for step in range(200)]
    for ends in seen:
        assert len(ends) == 7
        assert ends == sorted(ends)
        assert ends[-1] == 1000
        assert ends[0] >= 1
    assert len({tuple(ends) for ends in seen}) > 190
    assert seen == [_ends(1000, 6, step) for step in range(200)], "a step names its prefixes"
    assert seen[3] != _ends(1000, 6, 3, seed=1)


def test_sizes_follow_the_pareto_law() -> None:
    """P(size <= s) = (1 - s^(-1/2)) / (1 - F^(-1/2)) on [1, F], then rounded down to whole ones."""
    F, n = 4096, 4000
    sizes = torch.tensor(_ends(F, n, 0)[:-1]).double()
    for s in (1, 3, 15, 63, 255, 1023):
        expected = (1 - (s + 1) ** -0.5) / (1 - F**-0.5)
        found = float((sizes <= s).double().mean())
        # Four standard errors of a share among 4000.
        assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / n) ** 0.5)


@pytest.mark.parametrize("matryoshka", ["mean", "sum"])
def test_weights_add_up_to_one_or_count_in_full(matryoshka: Any) -> None:
    config = TrainConfig(random_prefixes=3, matryoshka=matryoshka)
    drawn = random_prefixes(build(TOPK), config, 0)
    assert drawn is not None
    assert drawn.weights.tolist() == [0.25 if matryoshka == "mean" else 1.0] * 4
