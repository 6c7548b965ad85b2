"""Tokens over ranks, and both: the same training as one process, and what a rank sends for it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.codes import SparseCodes
from sae_kernels.config import OptimizerConfig, ParallelConfig, TrainConfig
from sae_kernels.distributed.collectives import share
from sae_kernels.distributed.latents import LatentRanks
from sae_kernels.nn import TopKConfig
from sae_kernels.nn.topk import TopKObjective
from sae_kernels.training.layout import fitted
from tests.distributed.problems import trained
from tests.distributed.test_latents import (
    CASES,
    all_trained,
    blocks_trained,
    check_same_bits,
    check_together,
    check_training,
    problem,
)
from tests.distributed.world import on_ranks
from tests.threads import one_thread

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

FEW = ["auxk", "multi", "matryoshka", "batch", "gated"]  # of all cases, of each kind of exchange


@pytest.mark.parametrize(
    ("size", "over", "names"),
    [
        (3, 3, FEW),
        *(
            pytest.param(size, over, list(CASES), marks=pytest.mark.full)
            for size, over in ((1, 1), (2, 2), (4, 4), (4, 2))
        ),
    ],
)
def test_training_is_that_of_one_process(size: int, over: int, names: list[str]) -> None:
    """Also the kept entries, which it compares by the L0 of each step and by what is dead."""
    check_training(size, names, over)


@pytest.mark.full
@pytest.mark.parametrize(("size", "over"), [(2, 2), (3, 3), (4, 4), (4, 2)])
def test_training_stays_that_of_one_process(size: int, over: int) -> None:
    steps = 20
    one = trained(None, problem("auxk"), steps, spread=False)
    found = on_ranks(size, all_trained, ["auxk"], steps, over)
    check_together([each["auxk"] for each in found], one, steps)


@pytest.mark.parametrize(
    ("size", "over"), [(2, 2), *(pytest.param(4, over, marks=pytest.mark.full) for over in (2, 4))]
)
def test_blocks_give_the_same_bits_in_any_layout(size: int, over: int) -> None:
    names, blocks = ["auxk", "by_norm", "multi", "batch", "random_prefixes"], 8
    with one_thread():
        one = blocks_trained(None, names, blocks)
    check_same_bits(on_ranks(size, blocks_trained, names, blocks, over), one)


def moved(group: ProcessGroup, over: int) -> list[str]:
    """Where entries at their decoders, with ties and tokens without any, are not all of them."""
    generator = torch.Generator().manual_seed(3)
    differing = []
    for case in range(20):
        F = int(torch.randint(group.size() ** 2, 90, (), generator=generator))
        B = int(torch.randint(1, 40, (), generator=generator))
        whole = torch.randint(-3, 4, (B, F), generator=generator).float()
        grid = LatentRanks(group, F, tokens_over=over).grid
        ranges = [share(F, rank, group.size()) for rank in range(group.size())]
        own = whole[:, ranges[group.rank()].start : ranges[group.rank()].stop]
        codes = SparseCodes.from_dense(own, own.shape[1]).first((own > 0).sum(1))
        there = grid.to_decoders(codes, B).to_dense()
        shard = ranges[group.rank() // over * over : group.rank() // over * over + over]
        part = grid.width(B) * grid.shards.size
        tokens = slice(part * grid.replicas.rank, part * (grid.replicas.rank + 1))
        expected = whole[tokens, shard[0].start : shard[-1].stop]
        beyond = there[len(expected) :].any()
        if beyond or not torch.equal(there[: len(expected)], expected.relu()):
            differing.append(f"case {case}: {B=} {F=}")
    return differing


@pytest.mark.parametrize(
    ("size", "over"), [(3, 3), *(pytest.param(4, over, marks=pytest.mark.full) for over in (2, 4))]
)
def test_a_decoder_gets_all_entries_of_its_tokens(size: int, over: int) -> None:
    assert on_ranks(size, moved, over) == [[]] * size


def test_sums_of_prefixes_count() -> None:
    """4 B n of partial sums against 4 F of rows, for n prefixes."""
    train = TrainConfig(batch_size=512, optimizer=OptimizerConfig(compute="float32"), device="cpu")
    drawn = dataclasses.replace(train, objective=TopKObjective(random_prefixes=2))
    nested = TopKConfig(16, 1024, 4, groups=(24, 300, 700))
    for sae, config, over in (
        (TopKConfig(16, 1024, 4), train, (2, 1)),
        (nested, train, (1, 2)),
        (TopKConfig(16, 1024, 4), drawn, (1, 2)),
    ):
        chosen = fitted(ParallelConfig(), 2, sae, config)
        assert (chosen.latents_over, chosen.tokens_over) == over


def test_tokens_are_over_a_divisor_of_the_ranks() -> None:
    with pytest.raises(ValueError, match="tokens_over: expected a divisor of the number of proc"):
        LatentRanks(None, 99, tokens_over=2)
