"""The CPU bars of the other architectures: ``python -m benchmarks.architecture_bars [--out FILE]``.

Steps at cpu-small with L0 = 32 against the TopK step and against the same step written densely, and
ReLU steps from L0 = F / 2 down to 32 against the dense step in the same dtype. Every ratio comes
from one process with interleaved contestants; medians over the rounds.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from benchmarks.study import B, D, F, K, Records, Runs, bars, fused, ratios, stepping
from sae_kernels.bench.inputs import activations, threshold
from sae_kernels.nn import BatchTopKConfig, GatedConfig, JumpReLUConfig, ReLUConfig, TopKConfig
from sae_kernels.testing import dense_steps

LR = 1e-7  # so small that L0 stays what it is set to
PREFIXES = (F // 16, F // 16, F // 8, F // 4, F // 2)
DENSITIES = (F // 2, 4096, 2048, 1024, 512, 128, 32)
L0: dict[str, Any] = {"sparsity": "l0", "sparsity_coefficient": 1e-3}
L1: dict[str, Any] = {"sparsity": "l1", "sparsity_coefficient": 1e-3}


def steps(kind: str, rounds: int) -> Records:
    """Every architecture's step against TopK's."""
    x, W = activations(kind, B, D, F, K)
    edge = threshold(x, W, K)
    jump = JumpReLUConfig(D, F, threshold_init=edge, bandwidth=0.1 * edge)
    made = {
        "TopK": fused(TopKConfig(D, F, K), W),
        "BatchTopK": fused(BatchTopKConfig(D, F, K), W),
        "JumpReLU, L0 penalty": fused(jump, W, **L0),
        "JumpReLU, tanh penalty": fused(jump, W, **{**L0, "sparsity": "tanh"}),
        "ReLU, L1": fused(ReLUConfig(D, F), W, bias=-edge, **L1),
        "Gated": fused(GatedConfig(D, F), W, bias=-edge, **L1),
        "Matryoshka of 5, TopK": fused(TopKConfig(D, F, K, groups=PREFIXES), W),
        "Matryoshka of 5, BatchTopK": fused(BatchTopKConfig(D, F, K, groups=PREFIXES), W),
        "multi-TopK": fused(TopKConfig(D, F, K), W, multi_topk=True),
    }
    yield from ratios(f"steps {kind}", stepping(made, x, LR), "TopK", rounds)


def dense(kind: str, rounds: int) -> Records:
    """BatchTopK and JumpReLU against the same step in eager fp32 and under bf16 autocast."""
    x, W = activations(kind, B, D, F, K)
    edge = threshold(x, W, K)
    window = {"threshold": edge, "bandwidth": 0.1 * edge}
    jump = JumpReLUConfig(D, F, threshold_init=edge, bandwidth=0.1 * edge)
    cases: dict[str, tuple[Any, Any]] = {
        "BatchTopK": (fused(BatchTopKConfig(D, F, K), W), dense_steps.DenseBatchTopKStep),
        "JumpReLU": (fused(jump, W, **L0), partial(dense_steps.DenseJumpReLUStep, **window)),
    }
    for name, (ours, theirs) in cases.items():
        runs: Runs = {
            **stepping({"FusedStep bf16": ours}, x, LR),
            "dense fp32": partial(theirs(W, W, K, "fused", False), x),
            "dense autocast bf16": partial(theirs(W, W, K, "fused", True), x),
        }
        yield from ratios(f"{name} {kind}", runs, "FusedStep bf16", rounds)


def density(kind: str, rounds: int) -> Records:
    """ReLU steps from nearly dense to sparse: as FusedStep chooses, each pass forced, and dense."""
    x, W = activations(kind, B, D, F, K)
    for dtype, cast in (("bfloat16", True), ("float32", False)):
        slow = dense_steps.DenseReLUStep(W, W, K, "fused", cast)
        for l0 in DENSITIES:
            edge = threshold(x, W, l0)
            step = fused(ReLUConfig(D, F), W, bias=-edge, compute=dtype, sparsity="l1")
            slow.b_enc.data.fill_(-edge)
            runs: Runs = {
                f"dense {dtype}": partial(slow, x),
                "FusedStep": partial(step, x, lr=LR),
                "FusedStep, dense pass": partial(_forced, step, x, dense=True),
            }
            if l0 < F // 2:  # there its entries would be gigabytes
                runs["FusedStep, sparse pass"] = partial(_forced, step, x, dense=False)
            yield from ratios(f"ReLU {kind} {dtype} L0={l0}", runs, f"dense {dtype}", rounds)


def crosscoder(kind: str, rounds: int) -> Records:
    """A crosscoder of two layers against one layer, both BatchTopK ranked by decoder norms."""
    x, W = activations(kind, B, D, F, K)
    rows = torch.cat([W, W.flip(1)], dim=1) / 2**0.5
    options: dict[str, Any] = {"unit_norm_decoder": False, "decoder_norm": "sum"}
    one = fused(BatchTopKConfig(D, F, K, True, **options), W)
    two = fused(BatchTopKConfig(D, F, K, True, n_layers=2, **options), rows)
    runs: Runs = {
        "one layer": partial(one, x, lr=LR),
        "two layers": partial(two, torch.cat([x, x.flip(1)], dim=1), lr=LR),
    }
    yield from ratios(f"crosscoder {kind}", runs, "one layer", rounds)


def _forced(step: Any, x: torch.Tensor, *, dense: bool) -> object:
    step.dense_next = dense
    return step(x, lr=LR)


GROUPS = {"steps": steps, "dense": dense, "density": density, "crosscoder": crosscoder}


if __name__ == "__main__":
    bars(GROUPS, __doc__, "architecture_bars")
