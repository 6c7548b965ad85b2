"""Measurements of whole training steps: each group is a generator of records."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_check import floors
from benchmarks.gpu_check.bench import Bench, Record, check, compared, rates
from benchmarks.gpu_check.kernels import PRODUCT, product
from sae_kernels.bench.cases import Shape
from sae_kernels.config import TrainConfig
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.step import FusedStep
from sae_kernels.testing.dense_steps import DenseStep

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FUSED = "FusedStep"
# Two ways to keep a million latents inside 80 GB.
LAYOUTS = {
    "split-master": {"master_weights": "split"},
    "encoder-copy-only": {"compute_copies": "encoder"},
}


def fused(bench: Bench, shape: Shape, **settings: object) -> FusedStep:
    """A step on the device as a user makes it, AuxK off unless asked for."""
    sae = TopKSAE(TopKConfig(shape.D, shape.F, shape.K), device=bench.device)
    settings = {"compute": "bfloat16", "auxk_alpha": 0.0} | settings
    own = TrainConfig.of(sae.objective_class, **settings)
    return FusedStep(sae, own.objective, own.optimizer)


def graphed(step: FusedStep, x: torch.Tensor) -> Callable[[], object]:
    """The step as a CUDA graph; on the CPU, where there is none, the step."""
    lr = torch.tensor(1e-4, device=x.device)
    if x.device.type != "cuda":
        return lambda: step(x, lr=lr)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(x, lr=lr)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x, lr=lr)
    return graph.replay


def step(bench: Bench, name: str) -> Iterator[Record]:
    """FusedStep as a CUDA graph, as the trainer runs it, against its floor."""
    shape = bench.shape(name)
    x = torch.randn(shape.B, shape.D, device=bench.device)
    own = fused(bench, shape)
    extra = bench.peak_bytes(lambda: own(x, lr=1e-4))
    contestants: dict[str, Callable[[], object]] = {
        PRODUCT: product(bench, shape),
        _FUSED: graphed(own, x),
    }
    times = bench.time(contestants)
    floor = 1e3 * floors.step(shape, rates(bench), times[PRODUCT].median_ms / 1e3)
    for record in compared(f"step {name}", _FUSED, times, _FUSED):
        if record["provider"] != PRODUCT:
            record |= {"floor_ms": floor, "of_floor": record["median_ms"] / floor}
            if extra is not None:
                record["extra_mib"] = extra / 2**20
        yield record


def eager(bench: Bench, name: str) -> Iterator[Record]:
    """What the launches of a step cost without a graph, and what AuxK does when nothing is dead."""
    shape = bench.shape(name)
    x = torch.randn(shape.B, shape.D, device=bench.device)
    plain, auxk = fused(bench, shape), fused(bench, shape, auxk_alpha=1 / 32)
    captured = graphed(fused(bench, shape), x)
    contestants: dict[str, Callable[[], object]] = {
        _FUSED: captured,
        f"{_FUSED}, eager": lambda: plain(x, lr=1e-4),
        f"{_FUSED}, eager, AuxK and none dead": lambda: auxk(x, lr=1e-4),
    }
    yield from compared(f"eager {name}", _FUSED, bench.time(contestants), _FUSED)


def dense(bench: Bench, name: str) -> Iterator[Record]:
    """FusedStep against what trainers do today."""
    if bench.compiling:  # the kernels are those of `step`, and the rest is torch's
        return
    shape = bench.shape(name)
    x = torch.randn(shape.B, shape.D, device=bench.device)
    ours = fused(bench, shape)
    W = ours.sae.W_enc.detach()
    # Dynamo's own backend in a dry run: it goes the same way and generates no code.
    compiler = "eager" if bench.small else "inductor"
    theirs = DenseStep(W, W, shape.K, "fused", autocast=True, compiler=compiler)
    contestants: dict[str, Callable[[], object]] = {
        _FUSED: lambda: ours(x, lr=1e-4),
        "dense, bf16 autocast, torch.compile": lambda: _with_grad(theirs, x),
    }
    yield from compared(f"dense {name}", _FUSED, bench.time(contestants, rounds=7), _FUSED)


def _with_grad(theirs: DenseStep, x: torch.Tensor) -> object:
    with torch.enable_grad():
        return theirs(x)


def hot(bench: Bench) -> Iterator[Record]:
    """What latents that are in very many tokens cost a step."""
    shape = bench.shape("gpu-small")
    x = torch.randn(shape.B, shape.D, device=bench.device)
    uniform, single, zipf = (fused(bench, shape) for _ in range(3))
    single.sae.b_enc.data[0] = 1e3  # wins every token
    # A bias that falls with the logarithm of the rank gives firing rates that fall as a power.
    ranks = torch.arange(1, shape.F + 1, device=bench.device)
    scores = x @ uniform.sae.W_enc.detach().T
    zipf.sae.b_enc.data.copy_(-ranks.log() * scores.std() / 2)
    # A learning rate of 0 keeps the popularities as they are.
    contestants: dict[str, Callable[[], object]] = {
        "uniform": lambda: uniform(x, lr=0.0),
        "one latent in every token": lambda: single(x, lr=0.0),
        "Zipf": lambda: zipf(x, lr=0.0),
    }
    yield from compared("hot latents", _FUSED, bench.time(contestants), "uniform")
    for name, step_ in (("one latent in every token", single), ("Zipf", zipf)):
        counts = step_.sae.encode(x).indices.flatten().bincount(minlength=shape.F)
        yield {
            "kind": "fact",
            "what": f"hot latents, {name}: share of the tokens that hold the hottest latent",
            "value": float(counts.max()) / shape.B,
        }


def wide(bench: Bench, layout: str) -> Iterator[Record]:
    """A million latents on one device: the memory from nothing to a whole step, and its time."""
    shape = bench.shape("gpu-wide")
    made: list[FusedStep] = []
    x = torch.randn(shape.B, shape.D, device=bench.device)

    def from_nothing() -> None:
        made.append(fused(bench, shape, **LAYOUTS[layout]))
        made[0](x, lr=1e-4)

    peak = bench.peak_bytes(from_nothing)
    times = bench.time({_FUSED: lambda: made[0](x, lr=1e-4)}, rounds=5, warmup=1)
    for record in compared(f"step gpu-wide, {layout}", _FUSED, times, _FUSED):
        yield record if peak is None else {**record, "peak_gb": peak / 1e9}


def repeats(bench: Bench) -> Iterator[Record]:
    """Three steps twenty times from the same start: how many ends differ from the first."""
    shape = bench.cut(Shape(2048, 768, 16384, 32))
    x = torch.randn(shape.B, shape.D, device=bench.device)
    first = fused(bench, shape)
    ends = []
    for _ in range(2 if bench.small else 21):
        trained = FusedStep(copy.deepcopy(first.sae), first.objective, first.optimizer)
        for _ in range(1 if bench.small else 3):
            trained(x, lr=1e-3)
        ends.append([p.detach().view(torch.int32) for p in trained.sae.parameters()])
    different = sum(not all(map(torch.equal, end, ends[0])) for end in ends[1:])
    yield check("repeats", _FUSED, "automatic", different)
