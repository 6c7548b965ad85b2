"""The runs: which there are, and what one of them leaves."""

from __future__ import annotations

import dataclasses
import statistics
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.analyze import effective_number
from sae_kernels.bench.work import Work
from sae_kernels.config import TrainConfig
from sae_kernels.functional import RoutedCodes
from sae_kernels.nn import SAEConfig, SparseAutoencoder, SwitchConfig, TopKConfig, preset
from sae_kernels.training import evaluate, train

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from benchmarks.study import Record
    from sae_kernels.data.rows import RowSource

ARMS = ("width", "flops")
POINTS = 24  # of a curve
_HELD_OUT_BATCH = 4096


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run before it is made."""

    arm: str  # "width", as many latents as TopK in all; "flops", in each expert; "base", TopK
    n_experts: int
    n_latents: int
    k: int
    seed: int  # of the weights and of the order of the data
    steps: int
    batch_size: int
    lr: float

    def sae(self, d_in: int) -> SAEConfig:
        """The SAE.

        Raises:
            ValueError: k is more than an expert has latents.
        """
        if self.arm == "base":
            return TopKConfig(d_in, self.n_latents, self.k)
        return SwitchConfig(d_in, self.n_latents, self.k, n_experts=self.n_experts)

    def train(self) -> TrainConfig:
        """The preset's settings, without AuxK: it would be TopK's alone, and FLOPs by chance."""
        kind = preset("topk" if self.arm == "base" else "switch")
        given = {name: getattr(self, name) for name in ("seed", "steps", "batch_size", "lr")}
        own = {**kind.preset.objective, **kind.preset.optimizer, "auxk_alpha": 0.0}
        return TrainConfig.of(kind.sae.objective_class, log_every=1, **given, **own)

    def flops(self, d_in: int) -> int:
        """FLOPs of a step."""
        sizes = self.batch_size, d_in, self.n_latents, self.k
        return int(Work(*sizes, n_experts=self.n_experts).step)

    def made(self, record: Record) -> bool:
        """Whether a record is of this run."""
        return all(record.get(name) == value for name, value in dataclasses.asdict(self).items())


def plans(
    n_latents: int,
    experts: Iterable[int],
    k: Iterable[int],
    seeds: Iterable[int],
    arms: Iterable[str],
    **training: Any,
) -> Iterator[Plan]:
    """Seed by seed, so that what drifts while they run does not fall on one kind alone.

    Example:
        >>> found = plans(8, [2], [1], [0], ARMS, steps=1, batch_size=1, lr=0.1)
        >>> [(plan.arm, plan.n_experts, plan.n_latents) for plan in found]
        [('base', 1, 8), ('width', 2, 8), ('flops', 2, 16)]
    """
    shapes = [("base", 1, n_latents)]
    for arm in arms:
        shapes += [(arm, n, n_latents * (n if arm == "flops" else 1)) for n in experts]
    for seed in seeds:
        for kept in k:
            yield from (Plan(*shape, kept, seed, **training) for shape in shapes)


def run(plan: Plan, data: RowSource, held_out: RowSource) -> Record:
    """Trains and evaluates; "seconds" are those of the steps, waiting for data included."""
    d_in, flops = data.d_in, plan.flops(data.d_in)
    done = train(plan.sae(d_in), data, plan.train())
    measured = evaluate(done.sae, held_out)
    seconds = [line["tokens"] / line["tokens_per_second"] for line in done.metrics]
    each = [now - before for before, now in zip([0.0, *seconds], seconds, strict=False)]
    return {
        **dataclasses.asdict(plan),
        "architecture": "topk" if plan.arm == "base" else "switch",
        "d_in": d_in,
        **{name: getattr(measured, name) for name in ("fvu", "mse", "l0", "dead_fraction")},
        "flops": flops * plan.steps,
        "seconds": done.seconds,
        "step_ms": 1e3 * statistics.median(each),
        **balance(done.sae, held_out),
        "curve": curve([line["fvu"] for line in done.metrics], seconds, flops),
    }


def curve(fvu: list[float], seconds: list[float], flops: int) -> list[Record]:
    """Points spread evenly over the logarithm of the step, FVU averaged since the point before.

    Args:
        fvu: of each step's batch, before its update.
        seconds: from the start to the end of each step.
        flops: of a step.

    Example:
        >>> [point["step"] for point in curve([1.0] * 100, [0.1] * 100, 7)][-4:]
        [55, 67, 82, 100]
    """
    steps = sorted({round(len(fvu) ** (i / (POINTS - 1))) for i in range(POINTS)})
    return [
        {
            "step": step,
            "seconds": seconds[step - 1],
            "flops": flops * step,
            "fvu": statistics.fmean(fvu[before:step]),
        }
        for before, step in zip([0, *steps], steps, strict=False)
    ]


@torch.inference_mode()
def balance(sae: SparseAutoencoder, rows: RowSource) -> Record:
    """The busiest expert's part of the tokens, and e to the entropy of all parts."""
    tokens = torch.zeros(getattr(sae.config, "n_experts", 1))
    for start in range(0, rows.n_tokens, _HELD_OUT_BATCH):
        stop = min(start + _HELD_OUT_BATCH, rows.n_tokens)
        codes = sae.encode(rows.rows(start, stop).activations.float())
        if isinstance(codes, RoutedCodes):
            tokens += codes.routing.starts.diff()
        else:
            tokens += stop - start
    parts = tokens / tokens.sum()
    return {"largest_load": float(parts.max()), "effective_experts": effective_number(parts)}
