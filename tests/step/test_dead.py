"""Dead-latent counters."""

from __future__ import annotations

import torch
from torch import Tensor

from sae_kernels.step.state import DeadLatents

NO = torch.tensor(False)


def _aged(ages: list[int], after: int) -> DeadLatents:
    dead = DeadLatents(len(ages), after)
    dead.since_fired = torch.tensor(ages)
    return dead


def _ints(t: Tensor) -> list[int]:
    return [int(v) for v in t]


def test_counters_count_tokens_since_the_last_firing() -> None:
    dead = DeadLatents(4, after=30)
    for counts, n_tokens, since in (
        ([1, 0, 5, 0], 10, [0, 10, 0, 10]),
        ([0, 0, 1, 0], 7, [7, 17, 0, 17]),
        ([0, 2, 0, 0], 13, [20, 0, 13, 30]),
    ):
        dead.update(torch.tensor(counts), n_tokens, NO)
        assert _ints(dead.since_fired) == since
    assert _ints(dead.mask()) == [0, 0, 0, 1]  # dead from exactly `after` tokens on


def test_a_skipped_step_neither_ages_nor_revives() -> None:
    dead = _aged([5, 0, 100], 50)
    dead.update(torch.tensor([0, 0, 9]), 10, torch.tensor(True))
    assert _ints(dead.since_fired) == [5, 0, 100]


def test_counters_outlast_int32() -> None:
    dead = _aged([2**31 - 1], 2**31)
    dead.update(torch.tensor([0], dtype=torch.int32), 2**31, NO)
    assert _ints(dead.since_fired) == [2**32 - 1]


def test_the_longest_dead_come_first_and_ties_go_to_the_lower_latent() -> None:
    dead = _aged([9, 3, 12, 9, 9, 30, 0, 12], after=9)
    assert _ints(dead.longest(100)) == [0, 2, 3, 4, 5, 7]  # all of them, ascending
    assert _ints(dead.longest(6)) == [0, 2, 3, 4, 5, 7]
    assert _ints(dead.longest(3)) == [2, 5, 7]
    assert _ints(dead.longest(2)) == [2, 5]  # 12 twice: the lower latent
    assert _ints(dead.longest(5)) == [0, 2, 3, 5, 7]  # 9 three times: the lower two
    assert _ints(dead.longest(0)) == []


def test_nothing_dead_gives_an_empty_set() -> None:
    assert DeadLatents(50, after=1).longest(10).shape == (0,)


def test_the_choice_repeats_among_many_ties() -> None:
    ages = torch.randint(0, 4, (20_000,), generator=torch.Generator().manual_seed(0)) * 100
    dead = _aged(ages.tolist(), after=100)
    first = dead.longest(6000)
    oldest_first = sorted(range(20_000), key=lambda f: (-int(ages[f]), f))
    assert _ints(first) == sorted(oldest_first[:6000])
    for _ in range(5):
        assert torch.equal(dead.longest(6000), first)
