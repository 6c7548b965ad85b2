"""Lists that overflow, as the real kernels meet them: who is scored again and who is rescued."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from benchmarks import calls
from emulator import triton_driver
from sae_kernels.primitives.select_topk import column_passes

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.full
B, D, F, K = 33, 32, 4096, 32
# What is added to the scores of sorted latents, and rows that are rescued.
POPULARITIES: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "zipf": (lambda f: -torch.log1p(f), 0),
    "matryoshka": (lambda f: 2.0 * (f < F // 32), 0),
    "a tile": (lambda f: 4.0 * ((f >= 1000) & (f < 1256)), 0),  # all rows are scored again
    "equal": (lambda f: 1e6 + 0 * f, B),  # so large that no product changes it
}


@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("written_in", "sm"), [("triton", 80), ("gluon", 90)])
def test_sorted_latents_need_no_rescue(
    written_in: str, sm: int, popularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bias, rescued = POPULARITIES[popularity]
    x = torch.randn(B, D).bfloat16()
    W = (torch.randn(F, D) / D**0.5).bfloat16() * (popularity != "equal")
    b = bias(torch.arange(F).float())
    write, seen = column_passes._write, []

    def note(operands: Any, lists: Any, overflow: column_passes.Overflow, *results: Any) -> None:
        seen.append(overflow)
        write(operands, lists, overflow, *results)

    monkeypatch.setattr(column_passes, "_write", note)
    with triton_driver.emulated(sm):
        came = calls.implementation("select_topk", written_in).run(x, W, b, K, None)
    wanted = calls.implementation("select_topk", "reference").run(x, W, b, K, None)
    assert came[1].equal(wanted[1])
    assert [int(overflow.n) for overflow in seen] == [rescued]
