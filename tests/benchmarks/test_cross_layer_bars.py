"""benchmarks.cross_layer_bars: the dense step is the same formula; records have ratios."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import cross_layer_bars as bars

if TYPE_CHECKING:
    from sae_kernels.step import FusedStep


@pytest.mark.parametrize("kind", ["zipf", "uniform"])
def test_the_dense_step_is_the_same_formula(kind: str) -> None:
    runs = bars.steps_of(kind, bars.SMALL)
    ours, dense = runs["FusedStep fp32"], runs["dense fp32"]
    for _ in range(5):
        torch.testing.assert_close(dense(), ours().loss, rtol=1e-4, atol=0)
    assert isinstance(ours, partial)
    assert isinstance(dense, partial)
    step: FusedStep = ours.func
    n = bars.SMALL.layers
    parts = {
        "W_enc": dense.func.matrices[:n],
        "W_dec": dense.func.matrices[n:],
        "b_enc": dense.func.b_enc,
        "b_dec": dense.func.b_dec,
    }
    for name, mine in parts.items():
        # Adam's first steps are of the size of lr, in the direction of g: where g is nearly 0
        # rounding decides.
        off = (step.weights()[name] - torch.cat(mine)).abs()
        assert (off > 1e-2 * bars.LR).float().mean() < 0.01, name


@pytest.mark.parametrize("group", [bars.step, bars.decode])
def test_times_have_a_ratio_to_their_base(group) -> None:
    records = list(group("zipf", 1, bars.SMALL))
    assert len(records) == 2
    assert [r["ratio"] for r in records if r["provider"] == r["base"]] == [1]


def test_streaming_reads_as_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []
    monkeypatch.setattr(torch.Tensor, "sum", lambda rows: read.append(len(rows)))
    bars.streaming(torch.zeros(5, 2), 12)()
    assert read == [5, 5, 2]


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"
)


@needs_proc
def test_a_dense_step_holds_its_gradients() -> None:
    shape = bars.Shape(3, 64, 1024, 64, 4)
    gradients = (3 + 6) * shape.latents * shape.width * 4
    ours, dense = (bars.peak(f"{name} fp32", "zipf", shape, 1) for name in ("FusedStep", "dense"))
    assert ours < gradients < dense


@needs_proc
@pytest.mark.slow
def test_memory_is_measured_in_processes_of_their_own() -> None:
    ours, dense = bars.memory("zipf", 1, bars.Shape(3, 64, 1024, 64, 4))
    assert (ours["ratio"], ours["base"]) == (1, ours["provider"])
    assert dense["ratio"] > 1
