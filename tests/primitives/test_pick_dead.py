"""pick_dead on every backend against plain sorting in Python."""

from __future__ import annotations

import pytest
import torch

from benchmarks import calls
from sae_kernels import gpu
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


def _not_interpreted(n_latents: int) -> None:
    if gpu.interpreted() and n_latents > 16384:
        pytest.skip("Triton's interpreter sorts a thousand times as slowly: test_chunks instead")


@pytest.mark.parametrize("at_most", [0, 1, 2, 3, 5, 6, 8, 100])
def test_ties_go_to_the_lower_latent(at_most: int, backend: str) -> None:
    ages = torch.tensor([9, 3, 12, 9, 9, 30, 0, 12])
    check(ages, 9, at_most, backend)


@pytest.mark.parametrize("n_latents", [1, 8191, 8192, 16384, 16385, 20_000])
@pytest.mark.parametrize("n_ages", [2, 1000])
def test_many_latents(n_latents: int, n_ages: int, backend: str) -> None:
    _not_interpreted(n_latents)
    ages = torch.randint(0, n_ages, (n_latents,)) * 100
    check(ages, 100, 4096, backend)
    check(ages, 100 * n_ages, 4096, backend)  # nothing is dead
    check(ages, 100 * (n_ages - 1), 700, backend)


@pytest.mark.parametrize("at_most", [1, 1500, 17_001])
def test_few_dead_among_many_latents(at_most: int, backend: str) -> None:
    _not_interpreted(17_001)
    ages = torch.zeros(17_001, dtype=torch.int64)
    ages[[0, 1023, 1024, 5000, 17_000]] = torch.tensor([7, 2**40, 8, 2**40, 2**62])
    ages[8192:9216] = 8  # as old as one before them
    check(ages, 8, at_most, backend)


@pytest.mark.parametrize("most_chunks", [4, 100])
@pytest.mark.parametrize("n_ages", [2, 50])
def test_chunks(
    most_chunks: int, n_ages: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "triton":
        pytest.skip("in Triton alone latents are sorted by chunks")
    module = calls.implementation("pick_dead", backend)
    sizes = {"_ONE_BLOCK": 0, "_CHUNK": 32, "_MOST_CHUNKS": most_chunks}
    for name, size in sizes.items():
        monkeypatch.setattr(module, name, size)
    ages = torch.randint(0, n_ages, (333,)) << 40
    for at_most in (1, 100, 333):
        check(ages, 1 << 40, at_most, backend)
    check(ages, n_ages << 40, 100, backend)


def test_ages_beyond_int32(backend: str) -> None:
    ages = torch.tensor([2**31, 2**40 + 1, 7, 2**40, 2**33])
    check(ages, 2**31 + 1, 2, backend)
    check(ages, 2**31, 4, backend)
