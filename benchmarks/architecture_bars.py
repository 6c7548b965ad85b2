"""The CPU bars of the other architectures: ``python -m benchmarks.architecture_bars [--out FILE]``.

Steps at cpu-small with L0 = 32 against the TopK step and against the same step written densely, and
ReLU steps from L0 = F / 2 down to 32 against the dense step in the same dtype. Every ratio comes
from one process with interleaved contestants; medians over the rounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from benchmarks.cpu_bars import B, D, F, K, Record, command_line, ratios
from sae_kernels.bench.contestants.dense_steps import (
    DenseBatchTopKStep,
    DenseJumpReLUStep,
    DenseReLUStep,
)
from sae_kernels.bench.inputs import activations, threshold
from sae_kernels.config import TrainConfig
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
    build,
)
from sae_kernels.step import FusedStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LR = 1e-7  # so small that L0 stays what it is set to
GROUPS_OF_LATENTS = (F // 16, F // 16, F // 8, F // 4, F // 2)
DENSITIES = (F // 2, 4096, 2048, 1024, 512, 128, 32)


def fused(config: SAEConfig, W: torch.Tensor, **settings: Any) -> FusedStep:
    """A step on these encoder and decoder rows."""
    sae = build(config)
    sae.W_enc.data.copy_(W)
    sae.W_dec.data.copy_(W)
    alone = {"loss": "fvu", "sparsity": "none", "sparsity_coefficient": 0.0, "target_l0": None}
    given = {"compute": "bfloat16", "auxk_alpha": 0.0, **alone, **settings}
    train = TrainConfig.of(sae.objective_class, **given)
    return FusedStep(sae, train.objective, train.optimizer)


def steps(kind: str, rounds: int) -> Iterator[Record]:
    """Every architecture's step against TopK's."""
    x, W = activations(kind, B, D, F, K)
    edge = threshold(x, W, K)
    jump = JumpReLUConfig(D, F, threshold_init=edge, bandwidth=0.1 * edge)
    l0 = {"sparsity": "l0", "sparsity_coefficient": 1e-3}
    l1 = {"sparsity": "l1", "sparsity_coefficient": 1e-3}
    made = {
        "TopK": fused(TopKConfig(D, F, K), W),
        "BatchTopK": fused(BatchTopKConfig(D, F, K), W),
        "JumpReLU, L0 penalty": fused(jump, W, **l0),
        "JumpReLU, tanh penalty": fused(jump, W, sparsity="tanh", sparsity_coefficient=1e-3),
        "ReLU, L1": _biased(fused(ReLUConfig(D, F), W, **l1), edge),
        "Gated": _biased(fused(GatedConfig(D, F), W, **l1), edge),
        "Matryoshka of 5, TopK": fused(TopKConfig(D, F, K, groups=GROUPS_OF_LATENTS), W),
        "Matryoshka of 5, BatchTopK": fused(BatchTopKConfig(D, F, K, groups=GROUPS_OF_LATENTS), W),
        "multi-TopK": fused(TopKConfig(D, F, K), W, multi_topk=True),
    }
    contestants: dict[str, Callable[[], object]] = {
        name: (lambda step=step: step(x, lr=LR)) for name, step in made.items()
    }
    yield from ratios(f"steps {kind}", contestants, "TopK", rounds)


def dense(kind: str, rounds: int) -> Iterator[Record]:
    """BatchTopK and JumpReLU against the same step in eager fp32 and under bf16 autocast."""
    x, W = activations(kind, B, D, F, K)
    edge = threshold(x, W, K)
    window = {"threshold": edge, "bandwidth": 0.1 * edge}
    jump = JumpReLUConfig(D, F, threshold_init=edge, bandwidth=0.1 * edge)
    ours = {
        "BatchTopK": fused(BatchTopKConfig(D, F, K), W),
        "JumpReLU": fused(jump, W, sparsity="l0", sparsity_coefficient=1e-3),
    }
    for name, step in ours.items():
        contestants: dict[str, Callable[[], object]] = {
            "FusedStep bf16": lambda step=step: step(x, lr=LR)
        }
        for cast, label in ((False, "dense fp32"), (True, "dense autocast bf16")):
            if name == "BatchTopK":
                slow: Any = DenseBatchTopKStep(W, W, K, "fused", cast)
            else:
                slow = DenseJumpReLUStep(W, W, K, "fused", cast, **window)
            contestants[label] = lambda slow=slow: slow(x)
        yield from ratios(f"{name} {kind}", contestants, "FusedStep bf16", rounds)


def density(kind: str, rounds: int) -> Iterator[Record]:
    """ReLU steps from nearly dense to sparse: as FusedStep chooses, each pass forced, and dense."""
    x, W = activations(kind, B, D, F, K)
    for dtype, cast in (("bfloat16", True), ("float32", False)):
        slow = DenseReLUStep(W, W, K, "fused", cast)
        for l0 in DENSITIES:
            edge = threshold(x, W, l0)
            step = fused(ReLUConfig(D, F), W, compute=dtype, sparsity="l1")
            _biased(step, edge)
            slow.b_enc.data.fill_(-edge)
            contestants: dict[str, Callable[[], object]] = {
                f"dense {dtype}": lambda slow=slow: slow(x),
                "FusedStep": lambda step=step: step(x, lr=LR),
                "FusedStep, dense pass": lambda step=step: _forced(step, x, dense=True),
            }
            if l0 < F // 2:  # there its entries would be gigabytes
                contestants["FusedStep, sparse pass"] = lambda step=step: _forced(
                    step, x, dense=False
                )
            case = f"ReLU {kind} {dtype} L0={l0}"
            yield from ratios(case, contestants, f"dense {dtype}", rounds)


def crosscoder(kind: str, rounds: int) -> Iterator[Record]:
    """A crosscoder of two layers against one layer, both BatchTopK ranked by decoder norms."""
    x, W = activations(kind, B, D, F, K)
    both = torch.cat([x, x.flip(1)], dim=1)
    rows = torch.cat([W, W.flip(1)], dim=1) / 2**0.5
    options: dict[str, Any] = {"unit_norm_decoder": False, "decoder_norm": "sum"}
    one = fused(BatchTopKConfig(D, F, K, True, **options), W)
    two = fused(BatchTopKConfig(D, F, K, True, n_layers=2, **options), rows)
    contestants: dict[str, Callable[[], object]] = {
        "one layer": lambda: one(x, lr=LR),
        "two layers": lambda: two(both, lr=LR),
    }
    yield from ratios(f"crosscoder {kind}", contestants, "one layer", rounds)


def _biased(step: FusedStep, edge: float) -> FusedStep:
    """Moves the encoder's bias so that what is above the edge fires."""
    step.sae.b_enc.data.fill_(-edge)
    return step


def _forced(step: FusedStep, x: torch.Tensor, *, dense: bool) -> object:
    step.dense_next = dense
    return step(x, lr=LR)


GROUPS = {"steps": steps, "dense": dense, "density": density, "crosscoder": crosscoder}


if __name__ == "__main__":
    command_line(GROUPS, __doc__, "benchmarks.architecture_bars")
