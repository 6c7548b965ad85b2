"""Which SAEs an analysis compares: those of equal width, and those of equal FLOPs."""

from __future__ import annotations

import pytest
import torch

from sae_kernels.analyze import Analysis, analyze
from sae_kernels.analyze.frontier import frontiers
from sae_kernels.nn import SAEConfig, SwitchConfig, TopKConfig, build

D = 16


def topk(n: int, k: int) -> SAEConfig:
    return TopKConfig(D, n, k)


def switch(n: int, k: int, n_experts: int, *, shared: bool = False) -> SAEConfig:
    return SwitchConfig(D, n, k=k, n_experts=n_experts, shared_expert=shared)


def analysed(*configs: SAEConfig, with_data: bool = True) -> list[Analysis]:
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(0)) if with_data else None
    return [analyze(build(config), x) for config in configs]


def shown(analyses: list[Analysis]) -> dict[str, dict[str, list[float]]]:
    """The k of every kind of every frontier."""
    return {
        name: {kind: [each.config.k for each in several] for kind, several in kinds.items()}
        for name, kinds in frontiers(analyses)
    }


def test_equal_width_and_equal_flops_are_told_apart() -> None:
    found = analysed(topk(32, 4), topk(32, 2), switch(32, 2, 4), switch(128, 4, 4), topk(128, 2))
    assert shown(found) == {
        "equal width: 32 latents in all": {"topk": [2, 4], "switch, 4 experts": [2]},
        "equal width: 128 latents in all": {"topk": [2], "switch, 4 experts": [4]},
        "equal FLOPs: 32 latents met by a token": {"topk": [2, 4], "switch, 4 experts": [4]},
    }


def test_a_shared_expert_is_met_too_and_is_a_kind_of_its_own() -> None:
    assert switch(64, 2, 8, shared=True).n_encoded == 16
    found = analysed(topk(16, 2), switch(64, 2, 8, shared=True), switch(64, 2, 8))
    assert shown(found) == {
        "equal width: 64 latents in all": {
            "switch, 8 experts": [2],
            "switch, 8 experts, one shared": [2],
        },
        "equal FLOPs: 16 latents met by a token": {
            "topk": [2],
            "switch, 8 experts, one shared": [2],
        },
    }


def test_what_is_the_same_both_ways_is_shown_once() -> None:
    found = analysed(topk(32, 2), switch(32, 2, 1))
    assert list(shown(found)) == ["equal width: 32 latents in all"]


def test_kinds_come_in_order_whatever_the_order_of_the_saes() -> None:
    found = analysed(switch(32, 2, 8), switch(32, 2, 4, shared=True), switch(32, 2, 4), topk(32, 2))
    (kinds, *_) = shown(found).values()
    assert list(kinds) == [
        "topk", "switch, 4 experts", "switch, 4 experts, one shared", "switch, 8 experts",
    ]  # fmt: skip


@pytest.mark.parametrize("configs", [(topk(32, 2), topk(32, 4)), (topk(32, 2), switch(64, 2, 8))])
def test_nothing_to_compare(configs: tuple[SAEConfig, ...]) -> None:
    assert frontiers(analysed(*configs)) == []


def test_without_data_there_is_no_frontier() -> None:
    assert frontiers(analysed(topk(32, 2), switch(32, 2, 4), with_data=False)) == []
