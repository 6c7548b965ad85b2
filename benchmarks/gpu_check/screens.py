"""Selections in fp32 behind the screen in bf16: the bits first, then what passes and the times."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import calls
from benchmarks.gpu_check.bench import Bench, Record, check, compared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UNSCREENED = "fp32 product"


def select_topk(bench: Bench, name: str) -> Iterator[Record]:
    """select_topk with and without the screen, and torch's product and topk."""
    shape, case = bench.shape(name), f"select_topk {name} in fp32"
    x, W, b, k, *_ = inputs = bench.inputs("select_topk", shape, dtype=torch.float32)
    why = calls.reason("select_topk", inputs, "triton")
    if why is not None:
        yield {"kind": "not available", "what": f"{case} on triton", "why": why}
        return
    run = calls.implementation("select_topk", "triton").run
    contestants: dict[str, Callable[[], Any]] = {
        provider: functools.partial(run, *inputs, screened=screened)
        for provider, screened in ((UNSCREENED, False), ("screened", True))
    }
    exact, found = ([t.view(torch.int32) for t in select()] for select in contestants.values())
    different = sum(not mine.equal(right) for mine, right in zip(found, exact, strict=True))
    yield check(f"{case}, screened: bits", "select_topk", "triton", different)
    fact = f"{case}: scores of a token that pass the screen, mean"
    yield {"kind": "fact", "what": fact, "value": passing(x, W, b, k) / shape.B}
    if not bench.compiling:  # torch has nothing to be compiled
        scores = x.new_empty(shape.B, shape.F)
        contestants["torch"] = lambda: torch.mm(x, W.T, out=scores).topk(k, dim=1)
    yield from compared(case, "select_topk", bench.time(contestants), UNSCREENED)


def passing(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, k: int) -> int:
    """How many scores select_topk's screen lets through to be computed."""
    # Not at the top: the kernels can only be imported where Triton is.
    from sae_kernels.primitives.select_topk import column_passes, screen, triton

    found: list[torch.Tensor] = []

    def encode(operands: Any, lists: Any, columns: Any, tile: Any) -> None:
        before = lists.counts.clone()
        triton.encode_pass(operands, lists, columns, tile)
        if operands.screen is not None:  # it is, for lists that overflowed
            found.append((lists.counts - before)[: operands.x.shape[0]].sum())

    of = screen.screen_of(x, W)
    assert of is not None
    operands = column_passes.EncoderOperands(x, W, b, None, screen=of)
    column_passes.select(operands, k, triton.tile_for(of.x.rows, of.W.rows), encode)
    return int(sum(found))
