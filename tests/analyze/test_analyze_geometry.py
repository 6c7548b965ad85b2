"""Neighbours and duplicates against all cosines at once in fp64, and the edges of both."""

from __future__ import annotations

import math

import pytest
import torch

from sae_kernels.analyze import geometry
from sae_kernels.analyze.cosines import cosine_tiles, n_tiles, tile_edge
from sae_kernels.analyze.geometry import CURVE, duplicate_curve, summary
from sae_kernels.testing.budgets import rounding

THRESHOLD = 0.9


def budget(rows):
    """Of a cosine: two factors rounded to fp32 and a sum of D products that are 1 at most."""
    return float(rounding(rows.shape[1] + 2, torch.ones(()), torch.float32))


def dense_cosines(rows):
    """[F, F] in fp64, -inf on the diagonal and for rows of zeros."""
    high = rows.double()
    unit = high / high.norm(dim=1, keepdim=True)
    cosines = (unit @ unit.T).fill_diagonal_(-math.inf)
    return cosines.masked_fill(cosines.isnan(), -math.inf)


def components(linked):
    """The lowest row of each row's component, by walking from row to row."""
    labels = [-1] * len(linked)
    neighbours = [row.nonzero()[:, 0].tolist() for row in linked]
    for start in range(len(linked)):
        stack = [start] if labels[start] < 0 else []
        while stack:
            row = stack.pop()
            if labels[row] < 0:
                labels[row] = start
                stack += neighbours[row]
    return torch.tensor(labels)


def assert_same(rows, experts, threshold=THRESHOLD):
    """What geometry says is what all cosines say."""
    found = geometry(rows, experts, threshold=threshold)
    cosines = dense_cosines(rows)
    parts = torch.zeros(len(rows)) if experts is None else experts
    same = parts[:, None] == parts
    for got, hidden in ((found.within, ~same), (found.across, same)):
        want = cosines.masked_fill(hidden, -math.inf).amax(1)
        assert torch.equal(got.isfinite(), want.isfinite())
        known = want.isfinite()
        assert ((got.double() - want)[known].abs() <= budget(rows)).all()
    # Nothing lies so close to the threshold that rounding could decide.
    assert ((cosines - threshold).abs() > budget(rows)).all()
    labels = components(cosines >= threshold)
    assert torch.equal(found.groups, labels)
    zero = (rows == 0).all(1)
    assert torch.equal(found.zero, zero)
    assert found.n_distinct == len(labels.unique()) - int(zero.sum())
    spans = [len(parts[labels == label].unique()) > 1 for label in labels.unique()]
    assert found.n_spanning == sum(spans)
    return found


def random_rows(n, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_planted_copies_within_and_across_experts(dtype):
    rows = random_rows(64, 24)
    rows[9] = 2 * rows[3]  # within expert 0
    rows[20] = 0.5 * rows[3]  # and in expert 1
    rows[40], rows[63] = rows[33], -rows[34]  # a copy within expert 2; the opposite is no copy
    rows[17] = 0
    found = assert_same(rows.to(dtype), torch.arange(64) // 16)
    assert found.groups[[3, 9, 20]].tolist() == [3, 3, 3]
    assert found.n_distinct == 64 - 1 - 3
    assert (found.nearest.isfinite() == ~found.zero).all()
    assert found.n_spanning == 1


@pytest.mark.parametrize("n_experts", [1, 5, 2500])
def test_more_rows_than_a_tile_holds(n_experts):
    rows = random_rows(2500, 8)
    assert n_tiles(rows) == 6
    rows[2400], rows[1500], rows[700] = 3 * rows[5], rows[5], 0
    found = assert_same(rows, torch.arange(2500) // (2500 // n_experts))
    assert found.groups[2400] == found.groups[1500] == found.groups[5]
    assert (found.groups.bincount() > 2).sum() > 5, "chains of pairs, which the planted are not"


def test_experts_that_are_no_blocks():
    assert_same(random_rows(50, 4), torch.arange(50) % 3)


def test_without_experts_all_are_neighbours():
    rows = random_rows(30, 6)
    found = assert_same(rows, None)
    assert torch.equal(found.nearest, found.within)
    assert (found.across == -math.inf).all()


def test_ties_are_all_duplicates():
    found = assert_same(torch.eye(3).repeat(4, 1), torch.arange(12) // 3)
    assert found.nearest.tolist() == [1.0] * 12
    assert (found.within == 0).all()
    assert found.groups.tolist() == [0, 1, 2] * 4
    assert (found.n_distinct, found.n_spanning) == (3, 3)


@pytest.mark.parametrize("n", [1, 7, 1100])
def test_only_rows_of_zeros(n):
    found = geometry(torch.zeros(n, 4))
    assert (found.n_distinct, int(found.zero.sum())) == (0, n)
    assert (found.nearest == -math.inf).all()
    values = found.values(experts=True)
    assert values["neighbours"]["nearest"]["n"] == 0
    assert values["duplicates"]["nearest"] == 0


def test_one_latent_and_one_direction():
    assert geometry(torch.ones(1, 3)).n_distinct == 1
    found = geometry(torch.ones(3000, 1), torch.arange(3000))
    assert (found.n_distinct, found.n_spanning) == (1, 1)
    assert (found.across == 1).all()


def test_norms_do_not_matter_however_far_apart():
    rows = random_rows(20, 5)
    scales = torch.tensor([1e-30, 1e-10, 1.0, 1e30]).repeat(5)
    cosines = dense_cosines(rows).amax(1)
    scaled = geometry(rows * scales[:, None]).nearest.double()
    assert ((scaled - cosines).abs() <= budget(rows) + 2 * torch.finfo(torch.float32).eps).all()


def test_a_pair_at_the_threshold_itself_counts():
    (tile,) = cosine_tiles(torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]]))
    for threshold, first, second in ((1.0, [0], [1]), (0.0, [0, 0, 1], [1, 2, 2])):
        assert [t.tolist() for t in tile.pairs(threshold)] == [first, second]


def test_tiles_hold_every_pair_once_whatever_their_edge():
    rows = random_rows(13, 5)
    for edge in (1, 4, 13, 100):
        seen = torch.zeros(13, 13, dtype=torch.int64)
        for tile in cosine_tiles(rows, edge):
            i, j = tile.pairs(-2.0)
            seen[i, j] += 1
        assert torch.equal(seen, torch.ones(13, 13, dtype=torch.int64).triu(1))


@pytest.mark.parametrize("width", [1, 384, 4096, 20_000, 1 << 30])
def test_no_temporary_is_above_32_mib(width):
    edge = tile_edge(width)
    assert edge >= 1
    assert edge == 1 or edge * width * 8 <= 32 << 20  # rows in fp64
    assert edge * edge * 16 <= 32 << 20  # both numbers of all pairs


@pytest.mark.parametrize(
    ("rows", "experts", "threshold", "message"),
    [
        (torch.zeros(3), None, 0.9, r"rows: expected \[F, D\], at least one row, got \[3\]"),
        (torch.zeros(0, 3), None, 0.9, "at least one row"),
        (torch.tensor([[math.nan]]), None, 0.9, "rows: expected finite numbers"),
        (torch.tensor([[0.0], [math.inf]]), None, 0.9, "rows: expected finite numbers"),
        (torch.ones(3, 2), torch.zeros(2), 0.9, r"experts: expected shape \[3\]"),
        (torch.ones(3, 2), None, 1.0, "threshold: expected a cosine"),
        (torch.ones(3, 2), None, math.nan, "threshold: expected a cosine"),
    ],
)
def test_what_is_refused(rows, experts, threshold, message):
    with pytest.raises(ValueError, match=message):
        geometry(rows, experts, threshold=threshold)


def test_the_curve_falls_and_meets_the_count():
    cosines = geometry(random_rows(300, 4)).nearest
    curve = duplicate_curve(cosines)
    assert curve == sorted(curve, reverse=True)
    assert curve[CURVE.index(0.95)] == float((cosines >= 0.95).double().mean())
    assert 0 < curve[CURVE.index(0.95)] < 1


def test_a_summary_counts_every_latent():
    cosines = torch.tensor([-1.0, -0.35, 0.5, 1.0, -math.inf])
    found = summary(cosines)
    assert found["n"] == sum(found["histogram"]["counts"]) == 4
    assert found["histogram"]["edges"][0] == -1
    assert found["quantiles"]["0.5"] == pytest.approx((0.5 - 0.35) / 2, abs=1e-7)


def test_progress_ends_at_its_total():
    told = []
    geometry(random_rows(2500, 2), progress=lambda done, total: told.append((done, total)))
    assert told == [(i, 6) for i in range(1, 7)]
