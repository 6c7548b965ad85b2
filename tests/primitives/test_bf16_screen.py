"""fp32 selections behind the GPUs' screen in bf16, emulated: bit for bit those without it."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the screen is one of the Triton kernels")

from test_screen import HARD

from sae_kernels import gpu
from sae_kernels.primitives import schedule
from sae_kernels.primitives.select_batch_topk import triton as select_batch_topk
from sae_kernels.primitives.select_threshold import triton as select_threshold
from sae_kernels.primitives.select_topk import screen, triton
from sae_kernels.primitives.select_topk_routed import triton as routed
from sae_kernels.testing import Case, assert_bitwise, screening

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(gpu.interpreted(), reason="sums have no fixed order in the interpreter"),
    pytest.mark.usefixtures("emulated_gpu"),
]
FEW = Case("few", 9, 32, 5000, 3)  # every kind of hard input, in the time that there is

SMALL = Case("small", 9, 16, 1500, 3)
ALL = SMALL.B * SMALL.F


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
def test_hard_inputs(kind: str) -> None:
    x, W, b = FEW.inputs()
    assert b is not None
    x, W, b = HARD[kind](x, W, b)
    assert_same_best(x, W, b, FEW.K)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -30.0])
def test_hard_rank_scales(value: float) -> None:
    x, W, b = FEW.inputs()
    scale = torch.rand(FEW.F)
    scale[[700, 3000, 4990]] = value
    assert_same_best(x, W, b, FEW.K, scale)


def lossy(which: str) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Operands and the four winners, whose products in bf16 are below all others.

    What rounding takes from the rows of one side, almost half a step everywhere, points along the
    others: by Cauchy and Schwarz the most that can be lost.
    """
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
    return x, W, winners.tolist()


@pytest.mark.slow
@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs_above_a_threshold(kind: str) -> None:
    x, W, b = FEW.inputs()
    assert b is not None
    x, W, b = HARD[kind](x, W, b)
    last = triton.run(x, W, b, 20, None, screened=False)[0][:, -1].nan_to_num(0)
    assert_same_above(x, W, b, last.mean().expand(FEW.F).contiguous())


def test_few_scores_are_computed_for_a_threshold() -> None:
    x, W, b = SMALL.inputs()
    bounds = 2 + torch.rand(SMALL.F) / 5  # some 2 % of all scores are above
    kept = select_threshold.run(x, W, b, bounds, screened=False)[0].numel()
    assert 100 < kept <= assert_same_above(x, W, b, bounds) < 1.2 * kept
    assert assert_same_above(x, W, None, bounds.fill_(-0.0)) == ALL  # half of all pass


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 3e38])
def test_bounds_and_rows_that_are_not_finite(value: float) -> None:
    x, W, b = SMALL.inputs()
    bounds = torch.full((SMALL.F,), 2.5)
    for first, bound in ((0, torch.inf), (100, -torch.inf), (200, torch.nan)):
        bounds[first::300] = bound
    x[3, 4] = 0
    W[::150, 4], W[::400, 5] = value, -value
    assert assert_same_above(x, W, b, bounds) < SMALL.F
    x[3, 4] = value  # so all scores of this token pass
    assert assert_same_above(x, W, b, bounds) == ALL


@pytest.mark.parametrize("start", [None, 2.0])
def test_batch_topk(start: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = SMALL.inputs()
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
def test_winners_whose_products_are_as_low_as_can_be(which: str) -> None:
    x, W, winners = lossy(which)
    products = x.bfloat16().float() @ W.bfloat16().float().T
    assert bool((products[:, winners] < products.median()).all())
    _, indices = triton.run(x, W, None, 4, None, screened=True)
    assert indices.tolist() == [winners] * 9
    assert_same_best(x, W, None, 4)
    assert_same_above(x, W, None, just_below(x, W, winners))


def test_with_less_of_a_margin_winners_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, winners = lossy("latents")
    rounded = screen.rounded

    def too_narrow(matrix: torch.Tensor, error: float = 0.0) -> screen.RoundedRows:
        rows = rounded(matrix, error)
        return rows._replace(lost=0.85 * rows.lost)

    monkeypatch.setattr(screen, "rounded", too_narrow)
    _, indices = triton.run(x, W, None, 4, None, screened=True)
    assert not set(indices.flatten().tolist()) & set(winners)
    kept = select_threshold.run(x, W, None, just_below(x, W, winners), screened=True)[1]
    assert not set(kept.tolist()) & set(winners)


def test_rows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("chunks", 150, 8, 600, 4)
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
def test_lengths_are_upper_bounds_and_close(spread: float) -> None:
    D = 1500
    rows = torch.randn(20, D) * torch.exp(spread * torch.randn(D))
    rows[3:6] = 0
    rows[4, 7] = -0.0
    error = screen.error_of_sums(D)
    came, exact = screen.rounded(rows, error), screening.in_bf16(rows)
    assert came.rows.double().equal(exact.q)
    length = rows.double().norm(dim=1)
    for bound, least in (
        (came.length, length),
        (came.length, exact.narrow.flatten()),
        (came.lost, exact.error.flatten() + error * length),
    ):
        assert bool((bound.double() >= least).all())
        assert bool((bound.double() <= 1.01 * least).all())


@pytest.mark.parametrize(
    "value", [torch.nan, torch.inf, -torch.inf, 3e38, 1e19, 1e-10, 1e-30, -1e-42], ids=str
)
def test_nothing_is_known_of_rows_beyond_what_squares_can_hold(value: float) -> None:
    rows = torch.zeros(2, 40)
    rows[0, 5] = value
    came = screen.rounded(rows)
    for known in (came.length, came.lost):
        assert known.isnan().tolist() == [True, False]
        assert known[1] == 0


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_no_score_is_beyond_its_bound(spread: float) -> None:
    # What the matrix units may add to the product in fp64 is the share of the error of sums.
    x = torch.randn(70, 500) * torch.exp(spread * torch.randn(500))
    W = torch.randn(128, 500) * torch.exp(torch.randn(128, 1))
    values, indices = triton.run(x, W, None, 128, None, screened=False)
    scores = torch.empty_like(values).scatter_(1, indices.long(), values).double()
    exact = screening.score_bounds(x, W, screening.in_bf16)
    assert bool(((scores - exact.score).abs() <= exact.error).all())
    tokens, latents = screen.rounded(x), screen.rounded(W, screen.error_of_sums(500))
    margin = tokens.length.double()[:, None] * latents.lost + tokens.lost[:, None] * latents.length
    lengths = x.double().norm(dim=1)[:, None] * W.double().norm(dim=1)
    assert bool((margin >= exact.error + 500 * 2.0**-22 * lengths).all())
    assert bool((margin <= 1.2 * exact.error).all())
