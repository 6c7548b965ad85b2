"""How the GPU kernels of select_topk select, without a GPU: schedule, thresholds and overflow.

`simulate` repeats the rules of column_passes.py on a matrix of keys in plain torch; the properties
that make the result exact are asserted on it, and that the kernels in Triton's interpreter agree.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from refusals import needs

from sae_kernels import gpu
from sae_kernels.primitives import schedule
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.testing import Case, assert_bitwise, oracles, screening

if TYPE_CHECKING:
    from collections.abc import Callable

PRIMITIVES = ("select_topk",)


@dataclasses.dataclass
class Simulated:
    """What the lists went through.

    Attributes:
        kept: bool [B, F], what they hold in the end.
        incomplete: bool [B], whether an entry found no place, whose row is scored again.
        overflowed: bool [B], whether that was so even then: it is rescued column by column.
        thresholds: [B] after each pass.
        most: the most entries a pass offered any list, those it held included.
    """

    kept: torch.Tensor
    incomplete: torch.Tensor
    overflowed: torch.Tensor
    thresholds: list[torch.Tensor]
    most: int


def simulate(
    key: torch.Tensor,
    k: int,
    columns: int,
    capacity: int,
    *,
    stride: int | None = None,
    sampled: torch.Tensor | None = None,
    bound: torch.Tensor | None = None,
) -> Simulated:
    """Pass after pass: let through what is not below the threshold, cut back to the k best.

    Of a screen, ``bound`` is what keys are at most by its product.
    """
    B, F = key.shape
    n_tiles = -(-F // columns)
    stride = schedule.stride(n_tiles) if stride is None else stride
    rank = oracles.selection(key, F).argsort(1)
    n_sampled = min(F, capacity)
    if sampled is None:
        sampled = torch.arange(n_sampled) * F // n_sampled
    kept = torch.zeros(B, F, dtype=torch.bool)
    kept[:, sampled] = True
    none = torch.zeros(B, dtype=torch.bool)
    result = Simulated(kept, none, none.clone(), [], 0)
    _cut_back(result, key, rank, k)
    if n_sampled == F:
        return result
    kept[:] = False
    passing, room = (key, capacity) if bound is None else (bound, capacity // 2)
    for start, stop in schedule.column_passes(n_tiles, columns, k, room):
        tiles = torch.arange(start, stop) * stride % n_tiles
        latents = (tiles[:, None] * columns + torch.arange(columns)).flatten()
        latents = latents[latents < F]
        new = ~(passing[:, latents] < result.thresholds[-1][:, None])
        offered = kept.sum(1) + new.sum(1)
        result.incomplete |= offered > capacity
        result.most = max(result.most, int(offered.max()))
        # Who comes first finds a place: here at random.
        turn = torch.rand(new.shape).masked_fill(~new, 2).argsort(1).argsort(1)
        kept[:, latents] = new & (turn < (capacity - kept.sum(1))[:, None])
        _cut_back(result, key, rank, k)
    again = ~(key < result.thresholds[-1][:, None])
    kept[result.incomplete] = again[result.incomplete]
    result.overflowed = result.incomplete & (again.sum(1) > capacity)
    _cut_back(result, key, rank, k)
    return result


def _cut_back(result: Simulated, key: torch.Tensor, rank: torch.Tensor, k: int) -> None:
    F = key.shape[1]
    last = rank.masked_fill(~result.kept, F).sort(1).values[:, k - 1 : k]
    result.kept &= rank <= last
    at_cut = key.gather(1, rank.argsort(1).gather(1, last.clamp(max=F - 1))).flatten()
    before = result.thresholds[-1] if result.thresholds else at_cut
    at_cut = at_cut.nan_to_num(torch.inf, torch.inf, -torch.inf)
    result.thresholds.append(torch.where(last.flatten() < F, at_cut, before))


@pytest.mark.parametrize("columns", [16, 64, 256])
@pytest.mark.parametrize("k", [1, 8, 32, 100, 512, 1024])
@pytest.mark.parametrize("F", [1, 15, 16, 255, 257, 1000, 16384, 65537, 1_000_003])
def test_passes_visit_every_column_once(F: int, k: int, columns: int) -> None:
    n_tiles = -(-F // columns)
    capacity = schedule.capacity(k)
    passes = schedule.column_passes(n_tiles, columns, k, capacity)
    ends = [0, *(stop for _, stop in passes)]
    assert [start for start, _ in passes] == ends[:-1]
    assert ends[-1] == n_tiles
    assert ends == sorted(set(ends))
    for before, end in passes:
        seen = max(before * columns, capacity)  # by passes or in the sample
        held, let_through = k if before else 0, k * (end - before) * columns / seen
        assert held + let_through <= (capacity + k) / 2 or end == before + 1
    # A list holds one tile whatever is in it; a single pass comes after a sample of a good part.
    assert ends[1] == 1 or (len(passes) == 1 and 4 * capacity >= n_tiles * columns)


@pytest.mark.parametrize("n_tiles", [1, 2, 3, 7, 64, 97, 256, 260, 300, 1000, 2304, 5040, 9000])
def test_every_prefix_of_the_visit_is_spread(n_tiles: int) -> None:
    stride = schedule.stride(n_tiles)
    visit = torch.arange(n_tiles) * stride % n_tiles
    assert visit.sort().values.equal(torch.arange(n_tiles))
    for seen in (1, 2, 5, 13, *(n_tiles * i // 16 for i in range(1, 16))):
        if not 0 < seen <= n_tiles:
            continue
        places = visit[:seen].sort().values
        gaps = torch.cat([places, places[:1] + n_tiles]).diff()
        # With quotients a of its continued fraction, gaps of a rotation are below a + 2 even ones.
        assert gaps.max() * seen < 5 * n_tiles


@pytest.mark.parametrize("k", [1, 2, 31, 32, 33, 64, 128, 511, 512, 513, 1000, 1024])
def test_lists_hold_what_a_pass_lets_through(k: int) -> None:
    capacity = schedule.capacity(k)
    assert capacity & (capacity - 1) == 0
    assert capacity >= 4 * k
    assert schedule.rows_at_once(capacity) * capacity * 8 <= 32 << 20
    assert schedule.rows_at_once(capacity) % 128 == 0  # chunks are whole tiles of rows


@pytest.mark.parametrize(("k", "F"), [(1, 4096), (32, 16384), (64, 16384), (600, 16384)])
def test_random_scores_do_not_overflow(k: int, F: int) -> None:
    simulated = simulate(torch.randn(40, F), k, 256, schedule.capacity(k))
    assert not simulated.incomplete.any()


@pytest.mark.parametrize(("D", "k"), [(768, 32), (2304, 32), (4096, 64)])
def test_lists_have_room_for_what_passes_a_screen_and_does_not_win(D: int, k: int) -> None:
    x, W = torch.randn(20, D), torch.randn(8192, D)
    bounds = screening.score_bounds(x, W, screening.in_bf16)
    simulated = simulate(x @ W.T, k, 256, schedule.capacity(k), bound=bounds.score + bounds.error)
    assert 0 < simulated.most < 0.75 * schedule.capacity(k)


def test_sorted_latents_overflow_only_when_visited_in_order() -> None:
    key = torch.randn(8, 65536) * torch.linspace(0.1, 3, 65536)
    assert simulate(key, 32, 256, 256, stride=1, sampled=torch.arange(256)).incomplete.all()
    assert not simulate(key, 32, 256, 256).incomplete.any()


# What is added to the scores of latents that are sorted by how often they win.
POPULARITIES: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
    "zipf": lambda f, F: -torch.log1p(f),
    "gentle-zipf": lambda f, F: -torch.log1p(f) / 4,
    "zipf-ascending": lambda f, F: -torch.log1p(F - 1 - f),
    "matryoshka": lambda f, F: 0.7 * sum((f < F // part).float() for part in (16, 8, 4, 2)),
    "a-prefix": lambda f, F: 2.0 * (f < F // 32),
    "a-tile": lambda f, F: 4.0 * ((f >= 1000) & (f < 1256)),
    "half-a-tile": lambda f, F: 4.0 * (f < 128),
}


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize("k", [8, 32, 64])
@pytest.mark.parametrize("F", [1024, 4096, 16384, 65536])
def test_sorted_latents_need_no_rescue(F: int, k: int, popularity: str) -> None:
    key = torch.randn(100, F) + POPULARITIES[popularity](torch.arange(F).float(), F)
    simulated = simulate(key, k, 256, schedule.capacity(k))
    assert int(simulated.overflowed.sum()) <= 1, "more than 1 % of rows"
    if popularity not in ("a-tile", "zipf-ascending"):  # the first tile has not the best
        assert int(simulated.incomplete.sum()) <= 1


KEYS = st.sampled_from([0.0, 1.0, 2.0, 3.0, -1.0, torch.inf, -torch.inf, torch.nan])


@st.composite
def selections(draw: st.DrawFn) -> tuple[torch.Tensor, int, int, int]:
    """Keys [B, F] full of ties and special values, with k, columns and a capacity from k up."""
    F = draw(st.integers(1, 150))
    k = draw(st.integers(1, min(F, 12)))
    columns = draw(st.sampled_from([1, 4, 16]))
    capacity = draw(st.integers(max(k, columns), 5 * k + columns))
    rows = [draw(st.lists(KEYS, min_size=F, max_size=F)) for _ in range(2)]
    few, many = rows[0], torch.arange(F) * float(draw(st.sampled_from([-1, 0, 1])))
    return (
        torch.stack([torch.tensor(few), many, torch.tensor(rows[1])]).double(),
        k,
        columns,
        capacity,
    )


@hypothesis.given(selections())
def test_a_list_without_overflow_is_the_selection(
    drawn: tuple[torch.Tensor, int, int, int],
) -> None:
    key, k, columns, capacity = drawn
    simulated = simulate(key, k, columns, capacity)
    wanted = oracles.selection(key, k)
    cut = key.gather(1, wanted[:, -1:]).flatten().nan_to_num(torch.inf, torch.inf, -torch.inf)
    previous = torch.full_like(cut, -torch.inf)
    for threshold in simulated.thresholds:
        assert (threshold <= cut).all(), "a threshold above the k-th key loses winners"
        assert (threshold >= previous).all()
        previous = threshold
    complete = ~simulated.overflowed
    assert (simulated.overflowed <= simulated.incomplete).all()
    expected = torch.zeros_like(simulated.kept).scatter_(1, wanted, True)
    assert simulated.kept[complete].equal(expected[complete])
    assert int(simulated.incomplete.sum()) == 0 or simulated.most > capacity


def for_backend(case: Case, backend: str) -> Case:
    """The case in a dtype that the backend takes; skips it in its words if that is not all."""
    if backend == "gluon":
        case = case.cast(torch.bfloat16)
    needs("select_topk", case.dtype, backend, (*case.inputs(), case.K))
    return case


RESCUED = ("equal", "nan", "inf", "signed-zeros")  # too many equal keys for lists of 32


def small_lists(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of 32 entries and tiles of 32 latents: small inputs take passes, and some overflow."""
    monkeypatch.setattr(schedule, "LEAST_CAPACITY", 32)
    monkeypatch.setattr(schedule, "MOST_CAPACITY", 32)
    if backend == "triton" and gpu.interpreted():
        from sae_kernels.primitives import products

        monkeypatch.setitem(products._TILES, 0, products._TILES[0]._replace(columns=32))


@pytest.mark.parametrize("rank_scale", [False, True], ids=["h", "scaled"])
@pytest.mark.parametrize(
    "case",
    [
        Case("integer", 6, 8, 500, 3, "integer", torch.bfloat16),
        Case("equal", 5, 7, 300, 5, "equal"),
        Case("ties", 5, 16, 300, 7, "ties"),
        Case("nan", 11, 8, 200, 4, "nan"),
        Case("inf", 9, 8, 217, 8, "inf"),
        Case("signed-zeros", 5, 8, 150, 6, "signed_zeros", bias=False),
    ],
    ids=lambda case: case.name,
)
def test_kernels_with_small_lists(
    case: Case, rank_scale: bool, backend: str, monkeypatch: pytest.MonkeyPatch, poisoned: None
) -> None:
    small_lists(backend, monkeypatch)
    case = for_backend(case, backend)
    x, W, b = case.inputs()
    scale = torch.tensor([1.0, 2.0, 0.5, -1.0]).repeat(case.F)[: case.F] if rank_scale else None
    exact = oracles.scores(x, W, b, scale)
    simulated = simulate(exact.key, case.K, 32, 32)
    assert len(simulated.thresholds) > 2
    assert bool(simulated.incomplete.any()) == (case.name not in ("integer", "ties"))
    assert bool(simulated.overflowed.any()) == (case.name in RESCUED)
    values, indices = select_topk(x, W, b, case.K, scale, backend=backend)
    assert_bitwise("indices", indices.long(), oracles.selection(exact.key, case.K))
    wanted = exact.h.gather(1, indices.long()).float()
    assert values.equal(wanted) or values.isnan().equal(wanted.isnan())


def test_kernels_take_rows_in_chunks(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = for_backend(Case("chunks", 150, 8, 90, 4, "integer"), backend)
    x, W, b = case.inputs()
    monkeypatch.setattr(schedule, "_LIST_BYTES", 64 * 8 * schedule.capacity(case.K))
    values, indices = select_topk(x, W, b, case.K, None, backend=backend)
    exact = oracles.scores(x, W, b)
    assert_bitwise("indices", indices.long(), oracles.selection(exact.key, case.K))
    assert_bitwise("values", values, exact.h.gather(1, indices.long()).float())


def test_both_ways_to_append_select_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if backend != "triton" or gpu.interpreted():
        pytest.skip("the other way is inline PTX of the Triton kernels, for GPUs")
    from sae_kernels.primitives.select_topk import triton

    case = Case("appended", 300, 64, 5000, 32, dtype=torch.bfloat16)
    x, W, b = case.inputs()
    first = select_topk(x, W, b, case.K, None, backend=backend)
    monkeypatch.setattr(triton, "_APPENDED_BY", "portable")
    second = select_topk(x, W, b, case.K, None, backend=backend)
    assert_bitwise("values", second[0], first[0])
    assert_bitwise("indices", second[1], first[1])
