"""route_top1 in Triton: a program takes some tokens and all experts."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sae_kernels import gpu
from sae_kernels.primitives.candidate_lists import key_of, ordered
from sae_kernels.primitives.products import product
from sae_kernels.primitives.tensors import packed

_MOST_EXPERTS = 512  # a token's logits stay in registers
_FEWEST = 16  # rows and columns of a matrix instruction
_MOST_TOKENS = 64
# Logits of a program, and bytes of d_in that it loads at a time. Triton's interpreter is slow by
# operation, whatever its size.
_LOGITS, _DEPTH = (1 << 15, 1024) if gpu.interpreted() else (8192, 128)
_NO_KEY = tl.constexpr(-(2**31))  # below every ordered key, that of -inf included


@triton.jit
def _route(
    x,
    W,
    b,
    experts,
    probabilities,
    B,
    D,
    E,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.arange(0, EXPERTS)
    exists = (e < E)[None, :]
    logits = product(x, W, tl.minimum(rows, B - 1), tl.minimum(e, E - 1), D, DEPTH, WIDEN)
    if b is not None:
        logits += tl.load(b + e, mask=e < E, other=0.0)[None, :]
    key = tl.where(exists, ordered(logits), _NO_KEY)
    best = tl.max(key, 1)
    first = tl.min(tl.where(key == best[:, None], e[None, :], EXPERTS), 1)
    # The key of a NaN is a NaN: then, as after an infinity, no probability is a number.
    weight = tl.where(exists, tl.exp(logits - key_of(best)[:, None]), 0.0)
    p = weight / tl.sum(weight, 1)[:, None]
    tl.store(experts + rows, first, mask=rows < B)
    at = rows.to(tl.int64)[:, None] * E + e[None, :]
    tl.store(probabilities + at, p, mask=(rows < B)[:, None] & exists)


def refuses(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> str | None:
    """Why this call cannot run, or None."""
    if W.shape[0] > _MOST_EXPERTS:
        return f"it routes to at most {_MOST_EXPERTS} experts, got {W.shape[0]}"
    return None


def run(
    x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the kernel, fewer tokens a program the more experts there are."""
    x, W, b = packed(x), packed(W), packed(b)
    (B, D), E = x.shape, W.shape[0]
    experts = x.new_empty(B, dtype=torch.int32)
    probabilities = x.new_empty((B, E), dtype=torch.float32)
    columns = max(_FEWEST, gpu.next_power_of_two(E))
    rows = max(_FEWEST, min(_MOST_TOKENS, _LOGITS // columns))
    if B:
        _route[(-(-B // rows),)](
            x,
            W,
            b,
            experts,
            probabilities,
            B,
            D,
            E,
            ROWS=rows,
            EXPERTS=columns,
            DEPTH=_DEPTH // x.element_size(),
            WIDEN=gpu.interpreted(),
            num_warps=4,
            num_stages=3,
        )
    return experts, probabilities
