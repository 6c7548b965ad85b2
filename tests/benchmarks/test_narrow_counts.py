"""What `benchmarks.narrow_counts` counts, on a case that can be counted by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks import narrow_counts
from benchmarks.narrow_counts import FORMATS, Scores, counted, empty_tiles, of_passes, scored
from sae_kernels.bench.cases import Shape
from sae_kernels.primitives import schedule


def test_bounds_of_every_format_hold_and_int8_ones_are_the_closest() -> None:
    shape, margin = Shape(8, 64, 700, 4), {}
    for name, form in FORMATS.items():
        x, latents = narrow_counts.random_rows(shape, 8)
        scores = scored(x, latents, form)
        assert scores.exact.shape == (8, 700)
        assert bool((scores.upper >= scores.exact).all())
        margin[name] = float((scores.upper - scores.exact).mean())
    assert 3 * margin["int8"] < margin["e4m3"] < 0.6 * margin["e5m2"]


def test_the_passes_score_what_is_not_below_what_they_know() -> None:
    F, k = 4096, 4
    rising = torch.arange(F).float().expand(2, F)
    # As good a bound as there is, and none at all.
    found = of_passes(Scores(rising, rising), k)
    assert of_passes(Scores(rising, torch.full((2, F), torch.inf)), k).tolist() == [F, F]
    n = schedule.capacity(k)
    last = F // n * (n - k)  # the sample's k-th best
    # Tile 0 has none of these; what another has is above what is known before it.
    assert found[0] == found[1]
    assert k <= found[0] <= F - last


@pytest.mark.parametrize(("size", "share"), [(1, 0.75), (2, 0.25), (4, 0.0)])
def test_tiles_that_nothing_passes(size: int, share: float) -> None:
    passes = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0], [1, 0, 1, 0]]).bool()
    assert empty_tiles(passes, size, size) == share


def test_a_record_says_what_bytes_and_products_take() -> None:
    shape = Shape(8192, 768, 65536, 2)
    exact = torch.arange(256.0).expand(16, 256)
    record = counted("a case", shape, Scores(exact, exact + 3))
    assert record["pass, threshold"] == 5
    times = record["ms"]
    assert isinstance(times, dict)
    assert times["bf16 product"] == pytest.approx(0.834, abs=1e-3)  # 0.82 TFLOP at 989 a second
    assert times["threshold's rows"] == pytest.approx(5 * 8192 * 1536 / 4.3e9, abs=1e-3)
