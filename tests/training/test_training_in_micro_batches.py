"""Training in micro-batches is training on the whole batches."""

from __future__ import annotations

from typing import Any

import pytest

from sae_kernels.nn import presets
from sae_kernels.training import train
from tests.training.same_runs import assert_same
from tests.training.test_resume import STEPS, data, settings

PRESETS = presets()


@pytest.mark.sampled(6)
@pytest.mark.parametrize("route", ["fused", "autograd"])
@pytest.mark.parametrize("name", PRESETS)
def test_the_metrics_are_those_of_whole_batches(name: str, route: str) -> None:
    """Until rounding differences have grown; counters count tokens, so they agree for longer."""
    changes: dict[str, Any] = {"route": route, "dead_after_tokens": 100}
    runs = {}
    for size in (None, 20):
        sae, config = settings(name, micro_batch_size=size, **changes)
        runs[size] = train(**data(name), sae=sae, config=config)
    whole, split = (runs[size].metrics for size in (None, 20))
    assert len(whole) == len(split) == STEPS
    for i, (want, got) in enumerate(zip(whole, split, strict=True)):
        assert (got["step"], got["tokens"], got["skipped"]) == (i + 1, 48 * (i + 1), 0)
        if i < 5:
            assert got["dead_fraction"] == want["dead_fraction"]
            for key in ("loss", "fvu", "l0", "aux_loss"):
                assert got[key] == pytest.approx(want[key], rel=1e-3, abs=1e-6), key
    assert split[-1]["fvu"] == pytest.approx(whole[-1]["fvu"], rel=0.02)


@pytest.mark.parametrize("size", [48, 1000])
def test_one_micro_batch_is_a_run_of_whole_batches(size: int) -> None:
    sae, config = settings("topk")
    whole = train(**data("topk"), sae=sae, config=config)
    sae, config = settings("topk", micro_batch_size=size)
    assert_same(train(**data("topk"), sae=sae, config=config), whole)


def test_a_batch_with_one_bad_micro_batch_is_skipped_whole() -> None:
    """One row of 700 is bad: in 24 batches of 48 it comes once or twice."""
    rows = data("topk")
    rows["source"][300, 3] = float("nan")
    sae, config = settings("topk", micro_batch_size=20, on_nonfinite="skip")
    result = train(**rows, sae=sae, config=config)
    assert 1 <= result.skipped <= 2
    assert all(p.isfinite().all() for p in result.sae.parameters())


def test_the_size_is_a_positive_number() -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        settings("topk", micro_batch_size=0)
