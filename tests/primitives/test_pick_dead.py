"""pick_dead on every backend against plain sorting in Python."""

from __future__ import annotations

import pytest
import torch

from sae_kernels.primitives.pick_dead import pick_dead

PRIMITIVES = ("pick_dead",)


def check(ages: torch.Tensor, after: int, at_most: int, backend: str) -> None:
    """The latents, their number, and the padding."""
    latents, count = pick_dead(ages, after, at_most, backend=backend)
    dead = [f for f, age in enumerate(ages.tolist()) if age >= after]
    longest_first = sorted(dead, key=lambda f: (-int(ages[f]), f))
    expected = sorted(longest_first[:at_most])
    assert int(count) == len(expected)
    assert latents[: len(expected)].tolist() == expected
    padding = min(at_most, ages.numel()) - len(expected)
    assert latents[len(expected) :].tolist() == [-1] * padding


@pytest.mark.parametrize("at_most", [0, 1, 2, 3, 5, 6, 8, 100])
def test_ties_go_to_the_lower_latent(at_most: int, backend: str) -> None:
    ages = torch.tensor([9, 3, 12, 9, 9, 30, 0, 12])
    check(ages, 9, at_most, backend)


@pytest.mark.parametrize("n_latents", [1, 8191, 8192, 20_000])
@pytest.mark.parametrize("n_ages", [2, 1000])
def test_many_latents(n_latents: int, n_ages: int, backend: str) -> None:
    ages = torch.randint(0, n_ages, (n_latents,)) * 100
    check(ages, 100, 4096, backend)
    check(ages, 100 * n_ages, 4096, backend)  # nothing is dead
    check(ages, 100 * (n_ages - 1), 700, backend)


def test_ages_beyond_int32(backend: str) -> None:
    ages = torch.tensor([2**31, 2**40 + 1, 7, 2**40, 2**33])
    check(ages, 2**31 + 1, 2, backend)
    check(ages, 2**31, 4, backend)
