"""Counts what screens in 8 bits would let through on a GPU, and what their time would be at best.

``python -m benchmarks.narrow_counts [--only gpu-small ...] [--activations DIR] [--out FILE]``. bf16
operands are rounded to int8, e4m3 or e5m2 with a scale for every row, scores bounded as in
docs/numerics.md, and the bounds compared with thresholds as the kernels would: for select_threshold
with each token's K-th best score, for select_topk with what each of its passes knows. Nothing is
timed: milliseconds are bytes and products at an H200's rates, without launches and without what is
done to a score once it is there.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks.study import Records, parser, report
from sae_kernels.bench.cases import CPU_SMALL, GPU_YARDSTICKS
from sae_kernels.data import ShardDataset
from sae_kernels.primitives import schedule
from sae_kernels.testing import screening

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable

    from sae_kernels.bench.cases import Shape

PRODUCTS, BYTES = 989e12 / 2, 4.3e12  # a second: of bf16, half of those of 8 bits; of memory
SHAPES = {
    "cpu-small": CPU_SMALL,
    **GPU_YARDSTICKS,
    "gpu-small-wide": GPU_YARDSTICKS["gpu-small"]._replace(F=1 << 20),
}
_TILE = 256  # latents of a tile of the passes
_AT_ONCE = 8192  # latents that are multiplied at a time


def rounded(
    largest: float, to: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor
) -> screening.Narrow:
    """Rounds rows to a format, the largest element of each to the format's largest; in fp32."""
    scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / largest
    q = to(rows / scale).float()
    lengths = (t.norm(dim=1, keepdim=True) for t in (scale * q, rows - scale * q))
    return screening.Narrow(q, scale, *lengths)


FORMATS: dict[str, Callable[[torch.Tensor], screening.Narrow]] = {
    "int8": partial(rounded, 127, torch.round),
    "e4m3": partial(rounded, 448, lambda rows: rows.to(torch.float8_e4m3fn)),
    "e5m2": partial(rounded, 57344, lambda rows: rows.to(torch.float8_e5m2)),
}


class Scores(NamedTuple):
    """Scores [tokens, F] of the bf16 product and their upper bounds."""

    exact: torch.Tensor
    upper: torch.Tensor


def scored(
    x: torch.Tensor,
    latents: Iterable[torch.Tensor],
    narrow: Callable[[torch.Tensor], screening.Narrow],
) -> Scores:
    """Scores of tokens and of latents that come some at a time, and bounds by rounded rows.

    Sums of int8 are exact. Those of fp8 are taken to be, which they are not on Hopper.
    """
    token, length = narrow(x), x.norm(dim=1, keepdim=True)
    share = 1.01 * (5 * x.shape[1] + 128) * 2.0**-24
    exact, upper = [], []
    for W in latents:
        latent = narrow(W)
        lost = latent.error + share * W.norm(dim=1, keepdim=True)
        product = (token.q * token.scale) @ (latent.q * latent.scale).T
        upper.append(product + length @ lost.T + token.error @ latent.narrow.T)
        exact.append(x @ W.T)
    return Scores(torch.cat(exact, 1), torch.cat(upper, 1))


def of_passes(scores: Scores, k: int) -> torch.Tensor:
    """Bounds of every token that the passes of select_topk compute scores for."""
    F = scores.exact.shape[1]
    n_sampled = min(F, schedule.capacity(k))
    # The sample's best only give a threshold: its latents are scored again in the passes.
    last = scores.exact[:, torch.arange(n_sampled) * F // n_sampled].topk(k).values[:, -1:]
    kept = torch.full((len(last), k), -torch.inf)
    n, passed = -(-F // _TILE), torch.zeros(len(last))
    room = schedule.capacity(k) // 2
    for start, stop in schedule.column_passes(n, _TILE, k, room):
        tiles = torch.arange(start, stop) * schedule.stride(n) % n
        columns = (tiles[:, None] * _TILE + torch.arange(_TILE)).flatten()
        columns = columns[columns < F]
        passed += (scores.upper[:, columns] >= last).sum(1)
        kept = torch.cat([kept, scores.exact[:, columns]], 1).topk(k).values
        last = torch.maximum(last, kept[:, -1:])
    return passed


def empty_tiles(passes: torch.Tensor, rows: int, columns: int) -> float:
    """The share of tiles of so many tokens and latents in which nothing passes."""
    whole = passes[: len(passes) // rows * rows, : passes.shape[1] // columns * columns]
    tiles = whole.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))
    return float((~tiles.any(3).any(1)).float().mean())


def counted(case: str, shape: Shape, scores: Scores) -> dict[str, object]:
    """Counts the scores of a case that pass, and the times that this would cost and save."""
    B, D, F, k = shape
    above = scores.upper >= scores.exact.topk(k).values[:, -1:]
    threshold, topk = above.sum(1).float(), of_passes(scores, k)
    product, a_score = B * D * F / PRODUCTS, B * 2 * D / BYTES
    times = {
        "bf16 product": product,
        "saved": product / 2,
        "rounding": 3 * D * (B + F) / BYTES,
        "threshold's rows": float(threshold.mean()) * a_score,
        "topk's rows": float(topk.mean()) * a_score,
    }
    return {
        "case": case,
        **shape._asdict(),
        "tokens": len(above),
        "pass, threshold": round(float(threshold.mean()), 1),
        "pass, threshold, p99": round(float(threshold.quantile(0.99)), 1),
        "pass, topk": round(float(topk.mean()), 1),
        **{
            f"empty tiles of {rows} x {columns}": round(empty_tiles(above, rows, columns), 4)
            for rows, columns in ((16, 8), (128, 128))
            if rows <= len(above)
        },
        "ms": {name: round(1e3 * time, 3) for name, time in times.items()},
    }


def random_rows(shape: Shape, tokens: int) -> tuple[torch.Tensor, Iterable[torch.Tensor]]:
    """Normal tokens, and unit latents some at a time, both exact in bf16."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, shape.D, generator=draw).bfloat16().float()

    def latents() -> Iterable[torch.Tensor]:
        for start in range(0, shape.F, _AT_ONCE):
            W = torch.randn(min(_AT_ONCE, shape.F - start), shape.D, generator=draw)
            yield (W / shape.D**0.5).bfloat16().float()

    return x, latents()


def near_tokens(folder: str, tokens: int) -> tuple[torch.Tensor, Iterable[torch.Tensor]]:
    """Stored activations less their mean, and latents that are others of them and some noise."""
    store = ShardDataset(folder)
    rows = store.rows(0, min(store.n_tokens, 1 << 15)).activations.float()
    draw = torch.Generator().manual_seed(0)
    rows = (rows - rows.mean(0))[torch.randperm(len(rows), generator=draw)]
    W = rows[tokens:][torch.randint(len(rows) - tokens, (CPU_SMALL.F,), generator=draw)]
    noise = torch.randn(W.shape, generator=draw) / W.shape[1] ** 0.5
    W = torch.nn.functional.normalize(W + 0.3 * W.norm(dim=1, keepdim=True) * noise, dim=1)
    return rows[:tokens].bfloat16().float(), W.bfloat16().float().split(_AT_ONCE)


def records(options: argparse.Namespace) -> Records:
    """A record for every shape and format, and for every store of activations."""
    for name, form in itertools.product(options.only, options.formats):
        shape = SHAPES[name]
        scores = scored(*random_rows(shape, options.tokens), FORMATS[form])
        yield counted(f"{name}, random rows, {form}", shape, scores)
    for folder, form in itertools.product(options.activations, options.formats):
        x, latents = near_tokens(folder, options.tokens)
        shape = CPU_SMALL._replace(D=x.shape[1])
        case = f"{folder.rstrip('/').split('/')[-2]}, {form}"
        yield counted(case, shape, scored(x, latents, FORMATS[form]))


if __name__ == "__main__":
    made = parser(__doc__, tokens=128, threads=2)
    made.add_argument("--only", nargs="*", choices=SHAPES, default=["gpu-small"])
    made.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    made.add_argument("--activations", nargs="*", default=[], help="folders of stored activations")
    given = made.parse_args()
    torch.set_num_threads(given.threads)
    report("narrow_counts", records(given), given.out)
