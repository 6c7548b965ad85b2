"""Selections behind the screens: the bits first, then what passes and the times."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import calls
from benchmarks.gpu_check.bench import Bench, Record, check, compared

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

UNSCREENED = "no screen"


def screened(
    bench: Bench, primitive: str, name: str, dtype: torch.dtype = torch.float32
) -> Iterator[Record]:
    """A selection with and without the screen, and torch's product and selection."""
    short = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    shape, case = bench.shape(name), f"{primitive} {name} in {short}"
    inputs = bench.inputs(primitive, shape, dtype=dtype)
    why = calls.reason(primitive, inputs, "triton")
    if why is not None:
        yield {"kind": "not available", "what": f"{case} on triton", "why": why}
        return
    run = calls.implementation(primitive, "triton").run
    contestants: dict[str, Callable[[], Any]] = {
        provider: functools.partial(run, *inputs, screened=takes)
        for provider, takes in ((UNSCREENED, False), ("screened", True))
    }
    exact, found = ([t.view(torch.int32) for t in select()] for select in contestants.values())
    different = sum(not mine.equal(right) for mine, right in zip(found, exact, strict=True))
    yield check(f"{case}, screened: bits", primitive, "triton", different)
    if primitive in PASSING:
        fact = f"{case}: scores of a token that pass the screen, mean"
        yield {"kind": "fact", "what": fact, "value": PASSING[primitive](*inputs[:4]) / shape.B}
    if not bench.compiling:  # torch has nothing to be compiled
        contestants["torch"] = functools.partial(_by_torch, primitive, *inputs[:4])
    yield from compared(case, primitive, bench.time(contestants), UNSCREENED)


def _of_select_topk(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, k: int) -> int:
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


def _of_select_threshold(*operands: Any) -> int:
    from sae_kernels.primitives.select_threshold import triton

    found = triton.behind_screen(*operands)
    x, W, *_ = operands
    return x.shape[0] * W.shape[0] if found is None else found[0].numel()


# How many scores the screen lets through to be computed; select_batch_topk's is select_threshold's.
PASSING: dict[str, Callable[..., int]] = {
    "select_topk": _of_select_topk,
    "select_threshold": _of_select_threshold,
}


def _by_torch(
    primitive: str, x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, wanted: Any
) -> object:
    """The selection from scores in memory; without the bias, which would be one more visit."""
    scores = x @ W.T
    if primitive == "select_threshold":
        kept = scores > wanted
        return scores[kept], kept.nonzero()
    return scores.topk(wanted) if primitive == "select_topk" else scores.flatten().topk(wanted)
