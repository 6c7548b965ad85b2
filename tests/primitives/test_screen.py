"""Screened selections on the host kernels: bit for bit those of the fp32 product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import hypothesis
import pytest
import torch
from drawn import problems
from encoding import cases, scales
from hypothesis import strategies as st

from sae_kernels.backends import cpu
from sae_kernels.backends.cpu import Screening
from sae_kernels.primitives.select_threshold import cpu as select_threshold
from sae_kernels.primitives.select_topk import cpu as select_topk
from sae_kernels.primitives.select_topk_routed.cpu import run as select_topk_routed
from sae_kernels.testing import Case, assert_bitwise, screening

if TYPE_CHECKING:
    from collections.abc import Callable

    from drawn import Drawn

    Change = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], "Changed"]

# Enough latents for a few kept that the screen is taken after the first few hundred.
LARGE = Case("large", 150, 200, 5000, 3)
Changed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # x, W, b


def assert_every_screen_alike(
    x: torch.Tensor,
    W: torch.Tensor,
    b: torch.Tensor | None,
    k: int,
    rank_scale: torch.Tensor | None = None,
) -> None:
    """Selects by rank and by threshold, without a screen and with every one that runs here."""
    best = select_topk.run(x, W, b, k, rank_scale, screening=Screening.NONE)
    ranked = best[0][:, -1].nan_to_num(0)
    bounds = (ranked.mean() if x.shape[0] else torch.tensor(0.0)).expand(W.shape[0]).contiguous()
    above = select_threshold.run(x, W, b, bounds, screening=Screening.NONE)
    for how in cpu.screenings(cpu.isa()):
        found = select_topk.run(x, W, b, k, rank_scale, screening=how)
        for name, came, expected in zip(("values", "indices"), found, best, strict=True):
            assert_bitwise(f"{name} of the k best, {how.name}", came, expected)
        floor = best[0].gather(1, torch.arange(len(x))[:, None] % k)[:, 0]
        found = select_topk.run(x, W, b, k, rank_scale, floor=floor, screening=how)
        assert_same_from(floor, best, found, rank_scale)
        kept = select_threshold.run(x, W, b, bounds, screening=how)
        for name, came, expected in zip(("values", "indices", "offsets"), kept, above, strict=True):
            assert_bitwise(f"{name} above a bound, {how.name}", came, expected)


def assert_same_from(
    floor: torch.Tensor,
    best: tuple[torch.Tensor, torch.Tensor],
    found: tuple[torch.Tensor, torch.Tensor],
    rank_scale: torch.Tensor | None,
) -> None:
    """Entries are the best, but those below a token's floor."""
    keys, came = (v if rank_scale is None else v * rank_scale[i.long()] for v, i in (best, found))
    below = keys < floor[:, None]
    assert torch.equal(came < floor[:, None], below)
    for name, before, after in zip(("values", "indices"), best, found, strict=True):
        assert_bitwise(f"{name} from a floor on", after[~below], before[~below])


@cases
def test_every_case(case: Case, isa: str) -> None:
    x, W, b = case.inputs()
    assert_every_screen_alike(x, W, b, case.K)
    assert_every_screen_alike(x, W, b, case.K, scales(case.F))


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_large_inputs(threads: int, isa: str) -> None:
    torch.set_num_threads(threads)
    x, W, b = LARGE.inputs()
    assert_every_screen_alike(x, W, b, LARGE.K)
    assert_every_screen_alike(x, W, b, LARGE.K, torch.rand(LARGE.F))


def special(value: float) -> Change:
    """Puts a value into a token, a latent, a bias each, far apart."""

    def change(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> Changed:
        x[7, 3], W[4000, 5], b[3000] = value, value, value
        return x, W, b

    return change


def scaled(token: float, latent: float) -> Change:
    """Multiplies some tokens and some latents."""

    def change(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> Changed:
        x[::3] *= token
        W[::5] *= latent
        return x, W, b

    return change


def nearly_equal(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> Changed:
    """Few latents are far above the rest, and told apart by the last bits of exact scores alone."""
    winners = torch.arange(2000, 4800, 14)
    best = 8 * W[:1]
    W[winners] = best + 3e-6 * W[winners]
    return x + best, W, b.zero_()


def full_sums(magnitudes: list[float]) -> Change:
    """Sums in 16 bits are as large as can be, for the few latents that win.

    Tokens hold these magnitudes over and over, each from another column on, and the winners'
    elements have their signs.
    """

    def change(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor) -> Changed:
        winners = torch.arange(3000, 4800, 100)
        signs = x.sign()[:1]
        row = torch.tensor(magnitudes).repeat(x.shape[1])[: x.shape[1]]
        x = signs * torch.stack([row.roll(2 * t) for t in range(len(x))]) + 0.01 * x
        W[winners] = 2 * signs + 0.01 * W[winners]
        return x, W, b.zero_()

    return change


HARD: dict[str, Change] = {
    "full-pairs": full_sums([1.0, 1.0]),
    "one-full-pair": full_sums([1.0, 1.0, *[0.01] * 198]),
    "four-full-pairs": full_sums([1.0, *[0.5] * 39]),
    "nan": special(torch.nan),
    "inf": special(torch.inf),
    "minus-inf": special(-torch.inf),
    "largest": special(torch.finfo(torch.float32).max),
    "zeros": scaled(0.0, 0.0),
    "minus-zeros": scaled(-0.0, -0.0),
    "tiny": scaled(2.0**-140, 2.0**-20),
    "at-the-least": scaled(2.0**-31, 2.0**-31),
    "at-the-most": scaled(2.0**39, 2.0**38),
    "overflow": scaled(2.0**100, 2.0**60),
    "one-large-column": lambda x, W, b: (x.index_fill_(1, torch.tensor([9]), 300.0), W, b),
    "integers": lambda x, W, b: ((3 * x).round(), (20 * W).round(), b.round()),
    "equal-latents": lambda x, W, b: (x, W[:1].expand_as(W).contiguous(), b.zero_()),
    "nearly-equal-winners": nearly_equal,
    "ascending": lambda x, W, b: (x.abs(), W.abs().cumsum(0) / 1000, b),
}


@pytest.mark.parametrize("kind", HARD)
def test_hard_inputs(kind: str, isa: str) -> None:
    x, W, b = LARGE.inputs()
    assert b is not None
    assert_every_screen_alike(*HARD[kind](x, W, b), LARGE.K)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 0.0, -0.0, -30.0])
def test_hard_rank_scales(value: float, isa: str) -> None:
    x, W, b = LARGE.inputs()
    scale = torch.rand(LARGE.F)
    scale[[700, 3000, 4990]] = value
    assert_every_screen_alike(x, W, b, LARGE.K, scale)


lossy_rows = pytest.mark.parametrize("lossy", ["latents", "tokens"])


def underrated(lossy: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, latents, and the four winners, whose narrow scores are as low as can be.

    What rounding to integers takes from one row points along the other: by Cauchy and Schwarz the
    most that can be lost, and 99 % of the margin. The narrow scores rank the winners last.
    """
    D, F = 256, 3000
    torch.manual_seed(0)
    signs = torch.randint(2, (D - 2,)) * 2.0 - 1
    flat, rounded = 60 * signs, 0.49 * signs
    rounded[:107] -= signs[:107]
    x, W = torch.zeros(70, D), torch.zeros(F, D)
    x[:, 0], W[:, 0] = 127.0, 127.0  # the largest: one step is 1
    x[:, 1], W[:, 1] = 10.0, torch.randint(-100, 101, (F,)).float()
    winners = torch.arange(F - 40, F, 10)
    W[winners, 1] = 0.0
    x[:, 2:], W[winners, 2:] = (flat, rounded) if lossy == "latents" else (rounded, flat)
    narrow = screening.score_bounds(x, W).score
    assert bool((narrow[0, winners] < narrow[0].median()).all())
    return x, W, winners


@lossy_rows
def test_winners_whose_narrow_scores_are_as_low_as_can_be(lossy: str, isa: str) -> None:
    x, W, winners = underrated(lossy)
    _, indices = select_topk.run(x, W, None, 4, None)
    assert indices.unique().tolist() == winners.tolist()
    assert_every_screen_alike(x, W, None, 4)


def test_routed_tokens(isa: str) -> None:
    x, W, b = LARGE.inputs()
    experts = torch.randint(4, (x.shape[0],))
    tokens = experts.argsort(stable=True).int()
    starts = torch.nn.functional.pad(experts.bincount(minlength=4).cumsum(0), (1, 0)).int()
    routes = select_topk.Routes(tokens, starts)
    plain, *screened = (
        select_topk.run(x, W, b, 2, None, routes=routes, screening=how)
        for how in (Screening.NONE, *cpu.screenings(isa))
    )
    for values, indices in screened:
        assert_bitwise("values", values, plain[0])
        assert_bitwise("indices", indices, plain[1])
    assert_bitwise("by the rule", select_topk_routed(x, W, b, 2, tokens, starts)[1], plain[1])


@hypothesis.given(
    drawn=problems(),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    repeated=st.integers(1, 9),
    scaled=st.booleans(),
)
def test_drawn_inputs(drawn: Drawn, spread: float, repeated: int, scaled: bool, enter: Any) -> None:
    # Columns of unlike sizes, latents that come again and again, and more of them than are kept.
    enter(drawn)
    columns = torch.exp(spread * torch.randn(drawn.D))
    x, W = torch.randn(drawn.B, drawn.D) * columns, torch.randn(drawn.F, drawn.D)
    W = W.repeat(repeated, 1)
    scale = torch.rand(W.shape[0]) if scaled else None
    assert_every_screen_alike(
        drawn.place("x", x), drawn.place("W", W), None, min(drawn.k, 20), scale
    )


@pytest.mark.slow
@hypothesis.settings(max_examples=1500)
@hypothesis.given(
    drawn=problems(),
    spread=st.sampled_from([0.0, 0.5, 2.0]),
    repeated=st.integers(1, 9),
    scaled=st.booleans(),
)
def test_drawn_inputs_at_length(
    drawn: Drawn, spread: float, repeated: int, scaled: bool, enter: Any
) -> None:
    test_drawn_inputs.hypothesis.inner_test(drawn, spread, repeated, scaled, enter)
