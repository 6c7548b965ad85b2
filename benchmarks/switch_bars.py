"""The CPU bars of Switch SAEs: ``python -m benchmarks.switch_bars [--only encode] [--out FILE]``.

P is ``torch.mm(x_bf16, W_bf16.t(), out=preallocated)``, the product of all F latents. Every ratio
comes from one process with interleaved contestants; medians over the rounds. "load" is the part of
the tokens that the busiest expert has, next to an even 1/E.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.architecture_bars import LR
from benchmarks.study import Records, Runs, bars, fused, product, ratios, record, stepping
from sae_kernels.bench.cases import CPU_SMALL
from sae_kernels.bench.inputs import activations
from sae_kernels.bench.timing import interleaved
from sae_kernels.functional import Routing, encode_topk, route_top1
from sae_kernels.nn import SwitchConfig, TopKConfig
from sae_kernels.testing.dense_steps import DenseSwitchStep

if TYPE_CHECKING:
    from collections.abc import Callable

B, D, F, K = CPU_SMALL
EXPERTS = (2, 8, 32, 128)
STEP_EXPERTS = (8, 32)
BALANCE = 0.3  # the preset's
LB_ALPHA = 3.0  # of amudide/switch_sae's script
DENSE_ROUNDS = 7  # their steps take seconds


def encode(kind: str, rounds: int) -> Records:
    """Switch encoders, routing included, and TopK's against the product."""
    x, W = _operands(kind)

    def switch_encode(router: tuple[torch.Tensor, torch.Tensor]) -> object:
        return encode_topk(x, W, None, K, routing=route_top1(x, *router))

    runs: Runs = {"P": product(x, W), "TopK": partial(encode_topk, x, W, None, K)}
    for n in EXPERTS:
        router = some_router(x, n)
        load = float(route_top1(x, *router).load().max())
        runs[f"Switch E={n}, load {load:.2f}"] = partial(switch_encode, router)
    yield from ratios(f"Switch encode {kind} bf16", runs, "P", rounds)


def parts(kind: str, rounds: int) -> Records:
    """The parts of an encoder's time, as far as they can be told from outside.

    "routing" is `route_top1` alone. "products" is torch.mm of each expert's tokens, which lie in
    order already, and its latents, into one buffer: the necessary product, and nothing selected.
    "k=1" and "k=32" are the encoder with the routing given. k = 1 selects next to nothing: what it
    takes is the encoder's own product, gathering included, or a little more. The two's difference
    is what selecting 32 takes, or a little less.
    """
    x, W = _operands(kind)
    for n in STEP_EXPERTS:
        router = some_router(x, n)
        routing = route_top1(x, *router)
        runs: Runs = {
            "P": product(x, W),
            "routing": partial(route_top1, x, *router),
            "products": _products(x, W, routing),
            **{f"k={k}": partial(encode_topk, x, W, None, k, routing=routing) for k in (1, K)},
        }
        yield from ratios(f"Switch encode in parts {kind} E={n}", runs, "P", rounds)


def uneven(kind: str, rounds: int) -> Records:
    """Encoders whose tokens are split badly, against TopK's; the routing is made by hand."""
    x, W = _operands(kind)
    for n in STEP_EXPERTS:
        runs: Runs = {"TopK": partial(encode_topk, x, W, None, K)}
        for name, weights in splits(n).items():
            routing = by_hand(B, weights)
            name = f"{name}, load {float(routing.load().max()):.2f}"
            runs[name] = partial(encode_topk, x, W, None, K, routing=routing)
        yield from ratios(f"Switch encode uneven {kind} E={n}", runs, "TopK", rounds)


def steps(kind: str, rounds: int) -> Records:
    """Training steps against TopK's with the same Adam; all take turns with one another."""
    x, W = activations(kind, B, D, F, K)
    topk = TopKConfig(D, F, K)
    lazy: dict[str, Any] = {"adam": "lazy"}
    cases = {
        "Adam dense": {
            "TopK": fused(topk, W),
            **{f"Switch E={n}": switch(x, W, n) for n in STEP_EXPERTS},
            "one shared, Switch E=8": switch(x, W, 8, shared=True),
        },
        "Adam lazy": {"TopK": fused(topk, W, **lazy), "Switch E=8": switch(x, W, 8, **lazy)},
    }
    every = {f"{adam}: {name}": step for adam, made in cases.items() for name, step in made.items()}
    times = interleaved(stepping(every, x, LR), rounds)
    for adam, made in cases.items():
        for name in made:
            timing, base = times[f"{adam}: {name}"], times[f"{adam}: TopK"]
            yield record(f"Switch step {kind}, {adam}", name, timing, base, "TopK")


def dense(kind: str, rounds: int) -> Records:
    """A step of amudide/switch_sae, which multiplies all experts, against ours at E = 8.

    It clips gradients, and so do ours then; the tuned one, in bf16, is compared without that too.
    """
    x, W = activations(kind, B, D, F, K)
    router: dict[str, Any] = {"W_router": some_router(x, 8)[0], "balance_coefficient": LB_ALPHA}
    for clipped, clip_norm in ((", clipped", 1.0), ("", None)):
        settings: dict[str, Any] = {
            "loss": "mse",
            "clip_norm": clip_norm,
            "balance_coefficient": LB_ALPHA,
        }
        theirs = partial(DenseSwitchStep, W, W, K, clip_norm=clip_norm, **router)
        runs: Runs = {
            **stepping({"FusedStep bf16": switch(x, W, 8, **settings)}, x, LR),
            "dense autocast bf16, fused Adam": partial(theirs("fused", autocast=True), x),
        }
        if clipped:
            runs["dense fp32, default Adam"] = partial(theirs("default", autocast=False), x)
        case, n = f"Switch step {kind} E=8, dense{clipped}", min(rounds, DENSE_ROUNDS)
        yield from ratios(case, runs, "FusedStep bf16", n, untimed=1)


def switch(
    x: torch.Tensor, W: torch.Tensor, n: int, *, shared: bool = False, **settings: Any
) -> Any:
    """A step of an SAE of n experts, one of them shared or all routed to."""
    config = SwitchConfig(D, F, K, n_experts=n, shared_expert=shared)
    step = fused(config, W, **{"balance_coefficient": BALANCE, **settings})
    W_router, b_router = some_router(x, n - shared)
    step.sae.W_router.data.copy_(W_router)
    step.sae.b_router.data.copy_(b_router)
    return step


def some_router(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """W_router and b_router that send tokens to n experts about as evenly as chance does."""
    draw = torch.Generator().manual_seed(n)
    rows = torch.nn.functional.normalize(torch.randn(n, x.shape[1], generator=draw), dim=1)
    return rows.to(x.dtype), x.mean(0)


def splits(n: int) -> dict[str, torch.Tensor]:
    """Weights of n experts, by the name of the split."""
    one = torch.zeros(n)
    one[n // 2] = 1
    return {"even": torch.ones(n), "zipf": 1 / torch.arange(1.0, n + 1), "one has all": one}


def by_hand(n_tokens: int, weights: torch.Tensor) -> Routing:
    """Tokens that are drawn experts with these weights.

    Example:
        >>> by_hand(4, torch.tensor([0.0, 1.0, 0.0])).starts.tolist()
        [0, 0, 4, 4]
    """
    draw = torch.Generator().manual_seed(0)
    experts = weights.multinomial(n_tokens, replacement=True, generator=draw)
    counts = experts.bincount(minlength=len(weights))
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    tokens = experts.sort(stable=True).indices
    probabilities = (weights / weights.sum()).expand(n_tokens, -1)
    return Routing(experts.int(), probabilities, tokens.int(), starts.int())


def _operands(kind: str) -> tuple[torch.Tensor, torch.Tensor]:
    x, W = activations(kind, B, D, F, K)
    return x.bfloat16(), W.bfloat16()


def _products(x: torch.Tensor, W: torch.Tensor, routing: Routing) -> Callable[[], object]:
    bounds = routing.starts.tolist()
    n = len(bounds) - 1
    rows, out = x[routing.tokens.long()], torch.empty(B, F // n, dtype=torch.bfloat16)
    experts = list(zip(bounds, bounds[1:], W.chunk(n), strict=False))

    def run() -> None:
        for start, end, latents in experts:
            torch.mm(rows[start:end], latents.t(), out=out[start:end])

    return run


GROUPS = {"encode": encode, "parts": parts, "uneven": uneven, "steps": steps, "dense": dense}


if __name__ == "__main__":
    bars(GROUPS, __doc__, "switch_bars")
