"""Samples from everywhere in a source, and the norms of their rows."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.data import JointRows, ShardDataset, ShardWriter, TensorRows
from sae_kernels.data.sample import NormSummary, concentration, sample_rows
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.data import RowSource


def _by_source(folder: Path, kinds: int = 40, each: int = 5000) -> ShardDataset:
    """Rows sorted by source, in shards of one and a half sources."""
    with ShardWriter(folder, 2, rows_per_shard=each * 3 // 2) as writer:
        for kind in range(kinds):
            row = torch.tensor([float(kind), 1.0])
            writer.write(row.expand(each, 2))
    return ShardDataset(folder)


def test_rows_sorted_by_source_are_sampled_from_all(tmp_path: Path) -> None:
    """A shuffled window has 16 blocks of 4096 rows, so that it sees fewer of these."""
    data = _by_source(tmp_path)
    sample = sample_rows(data, 2048)
    assert list(sample.shape) == [2048, 2]
    counts = sample[:, 0].long().bincount()
    assert len(counts) == 40
    assert int(counts.min()) > 2048 / 40 / 2
    assert_bitwise("same seed", sample_rows(data, 2048), sample)
    numbers = TensorRows(torch.arange(200_000.0)[:, None])
    one, other = (set(sample_rows(numbers, 2048, seed).flatten().tolist()) for seed in (0, 1))
    assert len(one) == len(other) == 2048
    assert len(one & other) < 200


@pytest.mark.parametrize("total", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 1000, 4099])
@pytest.mark.parametrize("n", [1, 15, 16, 17, 32, 100])
def test_as_many_rows_as_asked_each_once_in_order(total: int, n: int) -> None:
    rows = sample_rows(TensorRows(torch.arange(float(total))[:, None]), n).flatten()
    assert len(rows) == min(n, total)
    assert bool((rows.diff() > 0).all())


def test_every_row_can_be_drawn() -> None:
    source = TensorRows(torch.arange(100.0)[:, None])
    drawn: set[float] = set()
    for seed in range(300):
        drawn |= set(sample_rows(source, 20, seed).flatten().tolist())
    assert len(drawn) == 100


def test_layers_are_sampled_together() -> None:
    x = torch.randn(500, 3)
    sample = sample_rows(JointRows([x, 2 * x]), 64)
    assert_bitwise("pairs", sample[:, 3:], 2 * sample[:, :3])


def test_nothing_to_sample() -> None:
    empty: RowSource = TensorRows(torch.zeros(0, 2))
    with pytest.raises(ValueError, match="expected at least one row to sample, got 5 of 0"):
        sample_rows(empty, 5)
    with pytest.raises(ValueError, match="got 0 of 3"):
        sample_rows(TensorRows(torch.zeros(3, 2)), 0)


def test_concentration_by_its_definition() -> None:
    """Rows 3 a, -3 a and four of unit length: 18 of 22 in the two, 9 in one."""
    rows = torch.tensor([[3.0, 0], [-3, 0], [1, 0], [-1, 0], [0, 1], [0, -1]])
    found = concentration(rows)
    assert found.thousandth == pytest.approx(9 / 22)
    assert found.rows_of_half == 2
    far = concentration(rows + 1000)
    assert far.thousandth == pytest.approx(9 / 22)
    assert far.rows_of_half == 2
    still = concentration(torch.ones(4, 2))
    assert math.isnan(still.thousandth)
    assert still.rows_of_half == 0


def test_ordinary_rows_are_not_concentrated() -> None:
    rows = torch.randn(4096, 64, generator=torch.Generator().manual_seed(0))
    found = concentration(rows)
    assert 0.001 < found.thousandth < 0.003
    assert 0.4 < found.rows_of_half / 4096 < 0.5


@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_the_histogram_counts_every_norm_once(offset: float) -> None:
    x = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0)).double()
    x = x.abs() + offset
    x[:3] = 0
    summary = NormSummary.of(x)
    assert summary.n_rows == 1000
    assert summary.zeros == 3
    norms = x.flatten()
    for low, high, count in summary.bins[:-1]:
        assert count == int(((norms >= low) & (norms < high)).sum())
    low, high, count = summary.bins[-1]
    assert count == int((norms >= low).sum())
    assert summary.bins[0][0] == float(norms[norms > 0].min())
    assert high == float(norms.max()) == summary.quantiles["max"]
    factors = [high / low for low, high, _ in summary.bins]
    assert factors == pytest.approx([factors[0]] * len(factors))
    assert summary.quantiles["median"] == float(norms.quantile(0.5))
    assert summary.quantiles["min"] == 0


def test_norms_that_are_all_the_same_or_zero() -> None:
    assert NormSummary.of(torch.tensor([[3.0, 4.0], [5.0, 0.0]])).bins == ((5.0, 5.0, 2),)
    assert NormSummary.of(torch.zeros(3, 2)).bins == ()
