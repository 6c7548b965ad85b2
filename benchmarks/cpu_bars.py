"""The CPU bars of the TopK path: ``python -m benchmarks.cpu_bars [--only encode] [--out FILE]``.

P is ``torch.mm(x_bf16, W_bf16.t(), out=preallocated)``, the one product that is necessary. Every
ratio comes from one process with interleaved contestants; medians over the rounds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.study import Records, Runs, bars, fused, product, ratios, stepping
from sae_kernels.bench.cases import CPU_SMALL, SMALL
from sae_kernels.bench.inputs import activations
from sae_kernels.functional import encode_topk
from sae_kernels.nn import TopKConfig
from sae_kernels.step import AutogradStep, FusedStep
from sae_kernels.testing.dense_steps import DenseStep

B, D, F, K = CPU_SMALL
LR = 1e-4


def encode(kind: str, rounds: int) -> Records:
    """encode_topk against the product alone, bf16 and fp32, at D=768 and D=2304."""
    for d_in in (D, 2304):
        x, W = (t.bfloat16() for t in activations(kind, B, d_in, F, K))
        runs: Runs = {
            "P": product(x, W),
            "product, allocating": partial(torch.matmul, x, W.t()),
            "encode_topk bf16": partial(encode_topk, x, W, None, K),
        }
        yield from ratios(f"encode {kind} bf16 D={d_in}", runs, "P", rounds)
    x, W = activations(kind, B, D, F, K)
    runs = {
        "fp32 product": product(x, W),
        "encode_topk fp32": partial(encode_topk, x, W, None, K),
    }
    yield from ratios(f"encode {kind} fp32 D={D}", runs, "fp32 product", rounds)


def step(kind: str, rounds: int) -> Records:
    """FusedStep against P, and against the dense steps."""
    x, W = activations(kind, B, D, F, K)
    ours, composable = topk(W), partial(topk, W, make=AutogradStep)
    runs: Runs = {
        "P": product(x.bfloat16(), W.bfloat16()),
        **stepping({"FusedStep bf16": ours, "composable bf16": composable()}, x, LR),
    }
    yield from ratios(f"step {kind}", runs, "P", rounds)
    for optimizer in ("foreach", "fused"):
        runs = {
            **stepping({"FusedStep bf16": ours, "composable bf16": composable()}, x, LR),
            "dense fp32": partial(DenseStep(W, W, K, optimizer, autocast=False), x),
            "dense autocast bf16": partial(DenseStep(W, W, K, optimizer, autocast=True), x),
        }
        yield from ratios(f"step {kind}, Adam {optimizer}", runs, "FusedStep bf16", rounds)


def auxk(kind: str, rounds: int) -> Records:
    """FusedStep with AuxK at 0 %, 2 % and 50 % dead latents."""
    x, W = activations(kind, B, D, F, K)
    rows = torch.randperm(F, generator=torch.Generator().manual_seed(0))

    def run(fused: FusedStep, percent: int) -> None:
        fused.dead.since_fired.zero_()[rows[: F * percent // 100]] = fused.dead.after
        fused(x, lr=LR)

    runs: Runs = {"AuxK off": partial(run, topk(W), 0)}
    for percent in (0, 2, 50):
        runs[f"AuxK, {percent} % dead"] = partial(run, topk(W, auxk_alpha=1 / 32), percent)
    yield from ratios(f"auxk {kind}", runs, "AuxK off", rounds)


def small(_kind: str, rounds: int) -> Records:
    """Small shapes against the dense fp32 step."""
    for tokens, d_in, n_latents, k in SMALL:
        x, W = activations("uniform", tokens, d_in, n_latents, k)
        runs: Runs = {
            f"dense fp32 {optimizer}": partial(DenseStep(W, W, k, optimizer, autocast=False), x)
            for optimizer in ("foreach", "fused")
        }
        ours = {f"FusedStep {t}": topk(W, k, compute=t) for t in ("float32", "bfloat16")}
        case = f"small B={tokens} D={d_in} F={n_latents} K={k}"
        yield from ratios(case, runs | stepping(ours, x, LR), "FusedStep float32", 3 * rounds)


def topk(W: torch.Tensor, k: int = K, **settings: Any) -> Any:
    """A TopK step on these encoder and decoder rows."""
    return fused(TopKConfig(W.shape[1], W.shape[0], k), W, **settings)


GROUPS = {"encode": encode, "step": step, "auxk": auxk, "small": small}


if __name__ == "__main__":
    bars(GROUPS, __doc__, "cpu_bars")
