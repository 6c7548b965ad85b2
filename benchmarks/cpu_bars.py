"""The CPU bars of the TopK path: ``python -m benchmarks.cpu_bars [--only encode] [--out FILE]``.

P is ``torch.mm(x_bf16, W_bf16.t(), out=preallocated)``, the one product that is necessary. Every
ratio comes from one process with interleaved contestants; medians over the rounds.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from sae_kernels.bench.contestants.dense_steps import DenseStep
from sae_kernels.bench.inputs import activations
from sae_kernels.bench.provenance import provenance
from sae_kernels.bench.timing import Timing, interleaved
from sae_kernels.config import OptimizerConfig
from sae_kernels.functional import encode_topk
from sae_kernels.nn import TopKConfig, TopKObjective, TopKSAE
from sae_kernels.step import AutogradStep, FusedStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

B, D, F, K = 2048, 768, 24576, 32  # cpu-small
_OFF = TopKObjective(auxk_alpha=0.0)
_BF16 = OptimizerConfig(compute="bfloat16")
Record = dict[str, object]


def ratios(
    case: str,
    contestants: dict[str, Callable[[], object]],
    base: str,
    rounds: int,
    untimed: int = 0,
) -> Iterator[Record]:
    """Times the contestants and gives each with its ratio to the base."""
    for name, timing in (times := interleaved(contestants, rounds, untimed=untimed)).items():
        yield record(case, name, timing, timing.median_ms / times[base].median_ms, base)


def record(case: str, name: str, timing: Timing, ratio: float, base: str) -> Record:
    """One line of the output."""
    values = {key: round(value, 3) for key, value in timing._asdict().items()}
    return {"case": case, "provider": name, **values, "ratio": round(ratio, 3), "base": base}


def encode(kind: str, rounds: int) -> Iterator[Record]:
    """encode_topk against the product alone, bf16 and fp32, at D=768 and D=2304."""
    for d_in in (D, 2304):
        x, W = activations(kind, B, d_in, F, K)
        xb, Wb = x.bfloat16(), W.bfloat16()
        buffer = torch.empty(B, F, dtype=torch.bfloat16)
        contestants: dict[str, Callable[[], object]] = {
            "P": lambda xb=xb, Wb=Wb, out=buffer: torch.mm(xb, Wb.t(), out=out),
            "product, allocating": lambda xb=xb, Wb=Wb: xb @ Wb.t(),
            "encode_topk bf16": lambda xb=xb, Wb=Wb: encode_topk(xb, Wb, None, K),
        }
        yield from ratios(f"encode {kind} bf16 D={d_in}", contestants, "P", rounds)
    x, W = activations(kind, B, D, F, K)
    wide = torch.empty(B, F)
    yield from ratios(
        f"encode {kind} fp32 D={D}",
        {
            "fp32 product": lambda: torch.mm(x, W.t(), out=wide),
            "encode_topk fp32": lambda: encode_topk(x, W, None, K),
        },
        "fp32 product",
        rounds,
    )


def step(kind: str, rounds: int) -> Iterator[Record]:
    """FusedStep against P, and against the dense steps."""
    x, W = activations(kind, B, D, F, K)
    xb, Wb = x.bfloat16(), W.bfloat16()
    buffer = torch.empty(B, F, dtype=torch.bfloat16)
    sae = _sae(W)
    fused = FusedStep(sae, _OFF, _BF16)
    autograd = AutogradStep(_sae(W), _OFF, _BF16)
    quick: dict[str, Callable[[], object]] = {
        "P": lambda: torch.mm(xb, Wb.t(), out=buffer),
        "FusedStep bf16": lambda: fused(x, lr=1e-4),
        "autograd bf16": lambda: autograd(x, lr=1e-4),
    }
    yield from ratios(f"step {kind}", quick, "P", rounds)
    del autograd
    for optimizer in ("foreach", "fused"):
        dense = DenseStep(W, W, K, optimizer, autocast=False)
        cast = DenseStep(W, W, K, optimizer, autocast=True)
        autograd = AutogradStep(_sae(W), _OFF, _BF16)
        contestants: dict[str, Callable[[], object]] = {
            "FusedStep bf16": lambda: fused(x, lr=1e-4),
            "autograd bf16": lambda c=autograd: c(x, lr=1e-4),
            "dense fp32": lambda d=dense: d(x),
            "dense autocast bf16": lambda c=cast: c(x),
        }
        yield from ratios(f"step {kind}, Adam {optimizer}", contestants, "FusedStep bf16", rounds)


def auxk(kind: str, rounds: int) -> Iterator[Record]:
    """FusedStep with AuxK at 0 %, 2 % and 50 % dead latents."""
    x, W = activations(kind, B, D, F, K)
    steps = {"AuxK off": FusedStep(_sae(W), _OFF, _BF16)}
    for percent in (0, 2, 50):
        fused = FusedStep(_sae(W), None, _BF16)
        steps[f"AuxK, {percent} % dead"] = fused
    rows = torch.randperm(F, generator=torch.Generator().manual_seed(0))
    contestants: dict[str, Callable[[], object]] = {}
    for name, fused in steps.items():
        dead = rows[: F * int(name.split()[1]) // 100] if "%" in name else rows[:0]

        def run(fused: FusedStep = fused, dead: torch.Tensor = dead) -> None:
            fused.dead.since_fired.zero_()[dead] = fused.dead.after
            fused(x, lr=1e-4)

        contestants[name] = run
    yield from ratios(f"auxk {kind}", contestants, "AuxK off", rounds)


def small(_kind: str, rounds: int) -> Iterator[Record]:
    """Small shapes against the dense fp32 step."""
    for tokens, d_in, n_latents, k in (
        (256, 64, 512, 8),
        (256, 128, 2048, 16),
        (512, 256, 4096, 32),
        (1024, 384, 8192, 32),
    ):
        x, W = activations("uniform", tokens, d_in, n_latents, k)
        contestants: dict[str, Callable[[], object]] = {}
        for optimizer in ("foreach", "fused"):
            dense = DenseStep(W, W, k, optimizer, autocast=False)
            contestants[f"dense fp32 {optimizer}"] = lambda d=dense, x=x: d(x)
        for dtype in ("float32", "bfloat16"):
            fused = FusedStep(_sae(W, k), _OFF, OptimizerConfig(compute=dtype))
            contestants[f"FusedStep {dtype}"] = lambda f=fused, x=x: f(x, lr=1e-4)
        case = f"small B={tokens} D={d_in} F={n_latents} K={k}"
        yield from ratios(case, contestants, "FusedStep float32", 3 * rounds)


def _sae(W: torch.Tensor, k: int = K) -> TopKSAE:
    sae = TopKSAE(TopKConfig(W.shape[1], W.shape[0], k))
    sae.W_enc.data.copy_(W)
    sae.W_dec.data.copy_(W)
    return copy.deepcopy(sae)


GROUPS = {"encode": encode, "step": step, "auxk": auxk, "small": small}


def command_line(
    groups: dict[str, Callable[[str, int], Iterator[Record]]], about: str | None, command: str
) -> None:
    """Prints the groups' records as JSON lines and, with --out, writes them to a file."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--only", nargs="+", choices=groups, default=list(groups))
    parser.add_argument("--inputs", nargs="+", choices=("zipf", "uniform"), default=["zipf"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = [json.dumps({"provenance": provenance(f"python -m {command}")})]
    print(lines[0])
    for name in options.only:
        kinds = options.inputs if name != "small" else ["uniform"]
        for kind in kinds:
            for entry in groups[name](kind, options.rounds):
                lines.append(json.dumps(entry))
                print(lines[-1], flush=True)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    command_line(GROUPS, __doc__, "benchmarks.cpu_bars")
