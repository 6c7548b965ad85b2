"""What ranks and one process are compared on: tokens with ties, and short trainings."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.codes import SparseCodes
from sae_kernels.config.optimizer import OptimizerConfig
from sae_kernels.distributed.batch_topk import largest
from sae_kernels.distributed.collectives import Collectives
from sae_kernels.distributed.latents import LatentRanks
from sae_kernels.nn import architecture
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.step import FusedStep

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from torch.distributed import ProcessGroup


def batches(n: int, tokens: int, width: int, seed: int = 1) -> Iterator[Tensor]:
    """Sparse sums of fixed directions."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(3 * width, width, generator=generator)
    for _ in range(n):
        on = torch.rand(tokens, len(truth), generator=generator) < 0.03
        yield (on * torch.rand(on.shape, generator=generator)) @ truth


def stepper(
    kind: str,
    config: dict[str, Any],
    objective: dict[str, Any],
    optimizer: dict[str, Any],
    ranks: LatentRanks | None = None,
) -> FusedStep:
    """A step of one process, or of one of several ranks."""
    make = architecture(kind)
    latents = None if ranks is None else ranks.latents
    sae = make(make.config_class(**config), seed=3, latents=latents)
    aims = make.objective_class(**objective)
    return FusedStep(sae, aims, OptimizerConfig(**optimizer), steps=100, ranks=ranks)


def trained(
    group: ProcessGroup | None,
    problem: dict[str, Any],
    steps: int,
    tokens: int = 50,
    spread: bool = True,
    **layout: Any,
) -> dict[str, Any]:
    """The figures of each step, and weights, counters and moments after the last."""
    n_latents = problem["config"]["n_latents"]
    ranks = None
    if spread:
        ranks = LatentRanks(group, n_latents, **layout)
    step = stepper(**problem, ranks=ranks)
    config = step.sae.config
    width = config.input_width + (config.output_width if config.transcodes else 0)
    lines = []
    for rows in batches(steps, tokens, width):
        x, target = rows, None
        if config.transcodes:
            x, target = rows[:, : config.input_width], rows[:, config.input_width :]
        result = step(x, lr=1e-3, target=target)
        lines.append([float(v) for v in (result.loss, result.fvu, result.l0, result.aux_loss)])
    return {
        "lines": lines,
        "weights": dict(step.weights()),
        "state": dict(step.state().tensors),
        "sent": {} if ranks is None else dict(ranks.collectives.sent),
    }


def joined(parts: list[dict[str, Tensor]], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole tensors of ranks that hold a part each; what all have must be bit-equal."""
    whole = {}
    for name, one in like.items():
        each = [part[name] for part in parts]
        if len(each[0]) == len(one) if one.dim() else True:
            for other in each:
                assert torch.equal(each[0], other), f"{name} differs between ranks"
            whole[name] = each[0]
        else:
            whole[name] = torch.cat(each)
    return whole


def best(
    x: Tensor, n: int, floor: Tensor | None = None, *, W: Tensor, scale: Tensor | None
) -> tuple[SparseCodes, Tensor]:
    """The n largest entries of each token, and the keys that rank them."""
    codes = SparseCodes(*select_topk(x, W, None, n, scale, None, False, floor), len(W))
    return codes, codes.values if scale is None else codes.values * scale[codes.indices.long()]


def kept_sets(group: ProcessGroup, cases: int, tokens: int) -> list[str]:
    """Where the entries that ranks keep are not those of one process, over tokens of two kinds."""
    generator = torch.Generator().manual_seed(0)
    differing = []
    for case in range(cases):
        B, D = tokens, int(torch.randint(1, 60, (), generator=generator))
        F = int(torch.randint(group.size() ** 2, 500, (), generator=generator))
        ranks = LatentRanks(group, F)
        k = int(torch.randint(1, min(F, 40) + 1, (), generator=generator))
        if case % 2:  # of -1, 0 and 1: exact in every order, with very many ties
            x, W = (torch.randint(-1, 2, (n, D), generator=generator).float() for n in (B, F))
        else:
            x, W = (torch.randn(n, D, generator=generator) for n in (B, F))
        if case % 7 == 3:  # nearly all that wins is in one share
            W[: F // group.size()] *= 8
        if case % 5 == 4:
            x[::7, 0] = torch.nan
        scale = torch.rand(F, generator=generator) if case % 3 == 2 else None
        dtype = torch.bfloat16 if case % 4 > 1 else torch.float32
        some = slice(ranks.latents.start, ranks.latents.stop)
        x, W = x.to(dtype), W.to(dtype)
        one, _ = best(x, k, W=W, scale=scale)
        mine = functools.partial(best, W=W[some], scale=None if scale is None else scale[some])
        won = ranks.top(mine, x, k)
        if won.offsets is None:
            won = won.first(torch.full((B,), k))
        places = won.tokens.long() * F + won.indices.long() + some.start
        marks = torch.zeros(B * F, dtype=torch.int32)
        marks[places] = 1
        values = torch.zeros(B * F)
        values[places] = won.values
        for sums in (marks, values):
            torch.distributed.all_reduce(sums, group=group)
        expected = torch.zeros(B, F, dtype=torch.int32).scatter(1, one.indices.long(), 1)
        same = torch.equal(expected, marks.view(B, F))
        bits = one.to_dense().flatten().nan_to_num(7e7) == values.nan_to_num(7e7)
        if not (same and bits.all()):
            differing.append(f"case {case}: {B=} {D=} {F=} {k=} {dtype} {scale is not None=}")
    return differing


def batch_winners(group: ProcessGroup, cases: int) -> list[str]:
    """Where the largest entries of a batch, with ties and NaN, are not those of one sorted list."""
    generator = torch.Generator().manual_seed(2)
    size, rank, differing = group.size(), group.rank(), []
    for case in range(cases):
        sizes = torch.randint(0, 300, (size,), generator=generator).tolist()
        keys = torch.rand(sum(sizes), generator=generator) + 0.1
        if case % 2:
            keys = torch.randint(1, 5, keys.shape, generator=generator).float()
        if case % 5 == 4:
            keys[::9] = torch.nan
        places = torch.randperm(len(keys), generator=generator) * 1_000_003
        count = int(torch.randint(0, len(keys) + 9, (), generator=generator))
        # Sorted by key, NaN first, then by place.
        order = places.argsort()
        order = order[keys[order].sort(descending=True, stable=True).indices]
        expected = torch.zeros(len(keys), dtype=torch.bool)
        expected[order[:count]] = True
        parts = (t.split(sizes)[rank] for t in (keys, places, expected))
        own_keys, own_places, wanted = parts
        kept, found = largest(own_keys, own_places, count, Collectives(group))
        if not torch.equal(kept, wanted) or int(found) != len(keys):
            differing.append(f"case {case}: {sizes=} {count=}")
    return differing
