"""Selections behind the GPUs' screens, emulated: bit for bit those without them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

pytest.importorskip("triton", reason="the screen is one of the Triton kernels")

from test_screen import HARD, underrated

from sae_kernels import gpu
from sae_kernels.primitives import schedule
from sae_kernels.primitives.select_batch_topk import triton as select_batch_topk
from sae_kernels.primitives.select_threshold import triton as select_threshold
from sae_kernels.primitives.select_topk import screen, triton
from sae_kernels.primitives.select_topk_routed import triton as routed
from sae_kernels.testing import Case, assert_bitwise, screening

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(gpu.interpreted(), reason="sums have no fixed order in the interpreter"),
    pytest.mark.usefixtures("emulated_gpu"),
]
FEW = Case("few", 9, 32, 5000, 3)  # every kind of hard input, in the time that there is

SMALL = Case("small", 9, 16, 1500, 3)
ALL = SMALL.B * SMALL.F


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    """Of the operands: fp32, screened in bf16, or bf16, screened in int8."""
    wanted: torch.dtype = request.param
    return wanted


def hard(kind: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x, W, b = FEW.inputs()
    assert b is not None
    x, W, b = HARD[kind](x, W, b)
    return x.to(dtype), W.to(dtype), b


def assert_same_best(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None = None,
) -> None:
    plain, screened = (triton.run(x, W, b, k, rank_scale, screened=s) for s in (False, True))
    for name, came, expected in zip(("values", "indices"), screened, plain, strict=True):
        assert_bitwise(name, came, expected)


def assert_same_above(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, bounds: torch.Tensor
) -> int:
    """Compares what is above bounds; returns how many scores were computed behind the screen."""
    plain, screened = (select_threshold.run(x, W, b, bounds, screened=s) for s in (False, True))
    for name, came, expected in zip(("values", "indices", "offsets"), screened, plain, strict=True):
        assert_bitwise(name, came, expected)
    passed = select_threshold.behind_screen(x, W, b, bounds)
    return x.shape[0] * W.shape[0] if passed is None else passed[0].numel()


@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs(kind: str, dtype: torch.dtype) -> None:
    assert_same_best(*hard(kind, dtype), FEW.K)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -30.0])
def test_hard_rank_scales(value: float, dtype: torch.dtype) -> None:
    x, W, b = FEW.cast(dtype).inputs()
    scale = torch.rand(FEW.F)
    scale[[700, 3000, 4990]] = value
    assert_same_best(x, W, b, FEW.K, scale)


def lossy(which: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Operands and the four winners, whose rounded rows' products are below all others.

    What rounding takes from the rows of one side, almost half a step everywhere, points along the
    others: by Cauchy and Schwarz the most that can be lost.
    """
    if dtype == torch.bfloat16:
        x, W, in_eight_bits = underrated(which)
        return x[:9].to(dtype), W.to(dtype), in_eight_bits.tolist()
    n, F = 64, 1000
    winners = torch.arange(F - 40, F, 10)
    x, W = torch.ones(9, n + 2), torch.zeros(F, n + 2)
    W[:, n + 1] = (0.02 + 0.21 * torch.rand(F)).bfloat16().float()
    W[:, n], x[:, n] = (n, 1) if which == "latents" else (1, n)
    W[winners, n:], W[winners, :n] = 0, 1
    if which == "latents":
        W[winners, :n] += 0.49 / 128
    else:
        x[:, :n] += 0.49 / 128
    products = x.bfloat16().float() @ W.bfloat16().float().T
    assert bool((products[:, winners] < products.median()).all())
    return x, W, winners.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs_above_a_threshold(kind: str, dtype: torch.dtype) -> None:
    x, W, b = hard(kind, dtype)
    last = triton.run(x, W, b, 20, None, screened=False)[0][:, -1].nan_to_num(0)
    assert_same_above(x, W, b, last.mean().expand(FEW.F).contiguous())


def test_few_scores_are_computed_for_a_threshold(dtype: torch.dtype) -> None:
    x, W, b = SMALL.cast(dtype).inputs()
    bounds = 2 + torch.rand(SMALL.F) / 5  # some 2 % of all scores are above
    kept = select_threshold.run(x, W, b, bounds, screened=False)[0].numel()
    assert 100 < kept <= assert_same_above(x, W, b, bounds) < 1.2 * kept
    assert assert_same_above(x, W, None, bounds.fill_(-0.0)) == ALL  # half of all pass


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_bounds_and_rows_that_are_not_finite(value: float, dtype: torch.dtype) -> None:
    x, W, b = SMALL.cast(dtype).inputs()
    bounds = torch.full((SMALL.F,), 2.5)
    for first, bound in ((0, torch.inf), (100, -torch.inf), (200, torch.nan)):
        bounds[first::300] = bound
    x[3, 4] = 0
    W[::150, 4], W[::400, 5] = value, -value
    assert assert_same_above(x, W, b, bounds) < SMALL.F
    x[3, 4] = value  # so all scores of this token pass
    assert assert_same_above(x, W, b, bounds) == ALL


@pytest.mark.parametrize("start", [None, 2.0])
def test_batch_topk(
    start: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W, b = SMALL.cast(dtype).inputs()
    arguments = (9 * SMALL.K, torch.rand(SMALL.F), None if start is None else torch.tensor(start))
    scored, score_found = [], select_threshold.score_found
    note = lambda *found: (scored.append(found), score_found(*found))  # noqa: E731
    monkeypatch.setattr(select_threshold, "score_found", note)
    plain = select_batch_topk.run(x, W, b, *arguments, screened=False)
    assert not scored
    screened = select_batch_topk.run(x, W, b, *arguments, screened=True)
    for name, came, expected in zip(("values", "indices", "offsets"), screened, plain, strict=True):
        assert_bitwise(name, came, expected)
    assert scored


def just_below(x: torch.Tensor, W: torch.Tensor, winners: list[int]) -> torch.Tensor:
    """Bounds that all scores of the winners are above, the lowest by little."""
    scores = (x.double() @ W.double().T)[:, winners]
    return (scores.min() * (1 - 1e-6)).float().expand(len(W)).contiguous()


@pytest.mark.parametrize("which", ["latents", "tokens"])
def test_winners_whose_products_are_as_low_as_can_be(which: str, dtype: torch.dtype) -> None:
    x, W, winners = lossy(which, dtype)
    _, indices = triton.run(x, W, None, 4, None, screened=True)
    assert indices.tolist() == [winners] * 9
    assert_same_best(x, W, None, 4)
    assert_same_above(x, W, None, just_below(x, W, winners))


def test_with_less_of_a_margin_winners_are_lost(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, W, winners = lossy("latents", dtype)
    rounded = screen.rounded

    def too_narrow(matrix: torch.Tensor, error: float = 0.0) -> screen.RoundedRows:
        rows = rounded(matrix, error)
        return rows._replace(lost=0.85 * rows.lost)

    monkeypatch.setattr(screen, "rounded", too_narrow)
    _, indices = triton.run(x, W, None, 4, None, screened=True)
    assert not set(indices.flatten().tolist()) & set(winners)
    kept = select_threshold.run(x, W, None, just_below(x, W, winners), screened=True)[1]
    assert not set(kept.tolist()) & set(winners)


def test_rows_in_chunks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("chunks", 150, 8, 600, 4, dtype=dtype)
    monkeypatch.setattr(schedule, "_LIST_BYTES", 64 * 8 * schedule.capacity(case.K))
    assert_same_best(*case.inputs(), case.K)


def test_routed_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = Case("routed", 150, 24, 1200, 3).inputs()
    experts = torch.randint(2, (150,))
    tokens = experts.argsort(stable=True).int()
    starts = torch.nn.functional.pad(experts.bincount(minlength=2).cumsum(0), (1, 0)).int()
    monkeypatch.setattr(triton, "pays", lambda *_: True)
    made, rounded = [], screen.rounded
    monkeypatch.setattr(screen, "rounded", lambda *a: (made.append(a), rounded(*a))[1])
    screened = routed.run(x, W, b, 3, tokens, starts)
    assert len(made) == 2
    monkeypatch.setattr(triton, "pays", lambda *_: False)
    for came, expected in zip(screened, routed.run(x, W, b, 3, tokens, starts), strict=True):
        assert_bitwise("routed", came, expected)
    assert len(made) == 2


@pytest.mark.parametrize("spread", [0.0, 1.0, 4.0])
def test_lengths_are_upper_bounds_and_close(spread: float, dtype: torch.dtype) -> None:
    D = 1500
    rows = (torch.randn(20, D) * torch.exp(spread * torch.randn(D))).to(dtype)
    rows[3:6] = 0
    rows[4, 7] = -0.0
    error = screen.error_of_sums(D)
    came, rows = screen.rounded(rows, error), rows.double()
    assert not came.rows[:, D:].any()
    kept = came.rows[:, :D].double()
    if came.scale is not None:
        kept *= came.scale.double()[:, None]
        assert came.rows.abs().amax(1).tolist() == [127 * bool(row.any()) for row in rows]
    lost, length = (rows - kept).norm(dim=1), rows.norm(dim=1)
    assert bool((lost <= (1 + 1e-6) * narrow(dtype)(rows).error.flatten()).all())
    longest = length + lost
    for bound, least, most in (
        (came.length, length, longest),
        (came.length, kept.norm(dim=1), longest),
        (came.lost, lost + error * length, lost + error * longest),
    ):
        assert bool((bound.double() >= least).all())
        assert bool((bound.double() <= (1 + 2.0**-9) * most).all())


@pytest.mark.parametrize(
    "value", [torch.nan, torch.inf, -torch.inf, 3e38, 1e19, 1e-10, 1e-30, -1e-40], ids=str
)
def test_nothing_is_known_of_rows_beyond_what_squares_can_hold(
    value: float, dtype: torch.dtype
) -> None:
    rows = torch.zeros(2, 40, dtype=dtype)
    rows[0, 5] = value
    came = screen.rounded(rows)
    for known in (came.length, came.lost):
        assert known.isnan().tolist() == [True, False]
        assert known[1] == 0


def narrow(dtype: torch.dtype) -> Callable[[torch.Tensor], screening.Narrow]:
    """The certificate's rounding of operands of a dtype."""
    return screening.narrow if dtype == torch.bfloat16 else screening.in_bf16


def all_scores(x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """What the kernels without a screen compute, each score in its latent's place."""
    values, indices = triton.run(x, W, None, W.shape[0], None, screened=False)
    return torch.empty_like(values).scatter_(1, indices.long(), values)


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_no_score_is_beyond_its_bound(spread: float, dtype: torch.dtype) -> None:
    # What the matrix units may add to the product in fp64 is the share of the error of sums.
    x = (torch.randn(70, 500) * torch.exp(spread * torch.randn(500))).to(dtype)
    W = (torch.randn(128, 500) * torch.exp(torch.randn(128, 1))).to(dtype)
    scores = all_scores(x, W).double()
    exact = screening.score_bounds(x, W, narrow(dtype))
    assert bool(((scores - exact.score).abs() <= exact.error).all())
    tokens, latents = screen.rounded(x), screen.rounded(W, screen.error_of_sums(500))
    margin = tokens.length.double()[:, None] * latents.lost + tokens.lost[:, None] * latents.length
    lengths = x.double().norm(dim=1)[:, None] * W.double().norm(dim=1)
    assert bool((margin >= exact.error + 500 * 2.0**-22 * lengths).all())
    assert bool((margin <= 1.2 * exact.error).all())


@pytest.mark.slow
@hypothesis.settings(max_examples=8)
@hypothesis.given(
    # Sizes that compile to the same kernels.
    B=st.integers(2, 9),
    D=st.sampled_from([7, 33, 90]),
    spread=st.sampled_from([0.0, 1.0, 4.0]),
    seed=st.integers(0, 2**20),
)
def test_a_score_just_above_its_threshold_is_never_left_out(
    dtype: torch.dtype, B: int, D: int, spread: float, seed: int
) -> None:
    F = 60
    torch.manual_seed(seed)
    columns = torch.exp(spread * torch.randn(D))  # some columns hold most of a row
    x = (torch.randn(B, D) * columns).to(dtype)
    W = (torch.randn(F, D) * torch.exp(torch.randn(F, 1))).to(dtype)
    best = all_scores(x, W).amax(0)  # of every latent
    few = torch.arange(F) < 3  # so that lists are long enough for what passes
    below = torch.where(few, best.nextafter(torch.tensor(-torch.inf)), torch.inf)
    assert_same_above(x, W, None, below)
    kept = select_threshold.run(x, W, None, below, screened=True)[1]
    assert kept.unique().tolist() == [0, 1, 2]
