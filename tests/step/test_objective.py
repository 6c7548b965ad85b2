"""Which losses an architecture has, and how random prefixes are drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    JumpReLUObjective,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    TopKObjective,
    build,
)
from tests.settings import settings
from tests.step.harness import ROUTES, stepping

TOPK, BATCHTOPK = TopKConfig(4, 16, 2), BatchTopKConfig(4, 16, 2)
JUMPRELU, RELU, GATED = JumpReLUConfig(4, 16), ReLUConfig(4, 16), GatedConfig(4, 16)
GROUPED = TopKConfig(4, 16, 2, groups=(4, 12))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("config", "train", "message"),
    [
        (
            TopKConfig(4, 16, 2, relu="none"),
            {"sparsity": "l1"},
            "sparsity: expected none where codes may be negative, got 'l1'",
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
    ],
)
def test_settings_that_do_not_go_together_are_named(
    config: SAEConfig, train: dict[str, Any], message: str, route: str
) -> None:
    with pytest.raises(ValueError) as error:
        stepping(ROUTES[route], build(config), settings(config, **train))
    assert str(error.value) == message


@pytest.mark.parametrize("route", ROUTES)
def test_an_objective_of_another_architecture_is_refused(route: str) -> None:
    with pytest.raises(TypeError) as error:
        ROUTES[route](build(TOPK), JumpReLUObjective())
    assert str(error.value) == (
        "objective: expected a TopKObjective for a TopKSAE, got a JumpReLUObjective"
    )


@pytest.mark.parametrize(
    ("objective", "train", "message"),
    [
        (
            TopKObjective,
            {"sparsity": "l0"},
            "sparsity: expected one of none, l1, lp, tanh, got 'l0'",
        ),
        (
            JumpReLUObjective,
            {"sparsity": "target_l0", "target_l0": None},
            "target_l0: expected a number with sparsity 'target_l0', got None",
        ),
    ],
)
def test_what_an_objective_cannot_be_is_named(
    objective: Any, train: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError) as error:
        objective(**train)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("config", "name"),
    [(c, "preact_coefficient") for c in (TOPK, BATCHTOPK, RELU, GATED)]
    + [(c, "multi_topk") for c in (BATCHTOPK, JUMPRELU, RELU, GATED)]
    + [(c, "random_prefixes") for c in (RELU, GATED)],
)
def test_no_objective_has_what_its_architecture_has_not(config: SAEConfig, name: str) -> None:
    with pytest.raises(ValueError, match=f"unknown setting '{name}'"):
        settings(config, **{name: 1})


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
    step = stepping(
        ROUTES[route], build(config), settings(config, sparsity_coefficient=0.1, **train)
    )
    assert step(torch.randn(9, 4), lr=1e-3).loss.isfinite()


def _ends(n_latents: int, n: int, step: int, seed: int = 0) -> list[int]:
    sae = build(TopKConfig(2, n_latents, 1))
    drawn = sae.prefixes(TopKObjective(random_prefixes=n), step, seed)
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
    objective = TopKObjective(random_prefixes=3, matryoshka=matryoshka)
    drawn = build(TOPK).prefixes(objective, 0, 0)
    assert drawn is not None
    assert drawn.weights.tolist() == [0.25 if matryoshka == "mean" else 1.0] * 4
