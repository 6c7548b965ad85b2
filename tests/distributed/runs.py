"""Runs of several ranks, as the functions that each of them carries out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from sae_kernels.config import OutputConfig
from sae_kernels.config.parallel import ParallelConfig
from sae_kernels.errors import DataError
from sae_kernels.nn import architecture
from sae_kernels.training import train

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STEPS, EVERY = 12, 4
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 51,
    "lr": 1e-3,
    "seed": 4,
    "compute": "float32",
    "log_every": 1,
    "dead_after_tokens": 150,
    "auxk_latents": 16,
    "clip_norm": 1.0,
    "device": "cpu",
}


class Stopped(Exception):
    """Raised by a test in the middle of a run, on all ranks after the same step."""


def activations() -> torch.Tensor:
    """Rows [700, 16], sparse sums of fixed directions."""
    generator = torch.Generator().manual_seed(0)
    on = torch.rand(700, 48, generator=generator) < 0.05
    codes = on * torch.rand(on.shape, generator=generator)
    return codes @ torch.randn(48, 16, generator=generator)


def run(
    group: ProcessGroup | None,
    folder: str | None,
    *,
    kind: str = "topk",
    n_latents: int = 96,
    k: int = 6,
    blocks: int = 0,
    harvest_ranks: int = 0,
    layout: dict[str, int] | None = None,
    resume: bool = False,
    stop_after: int | None = None,
    source: Any = None,
    **settings: Any,
) -> dict[str, Any]:
    """Trains on the group's ranks, with the latents over all; metric lines, and what is here."""

    def on_step(step: int, line: dict[str, Any] | None) -> None:
        if step + 1 == stop_after:
            raise Stopped

    config = architecture(kind).config_class(d_in=16, n_latents=n_latents, k=k)
    layout = layout or {"tokens_over": 1}
    mesh = None if group is None else DeviceMesh.from_group(group, "cpu")
    if group is not None and layout.keys() >= {"latents", "tokens"}:
        ranks = torch.arange(group.size()).view(*layout.values())
        mesh, layout = DeviceMesh("cpu", ranks, mesh_dim_names=tuple(layout)), {}
    try:
        result = train(
            config,
            activations() if source is None else source,
            folder=folder,
            output=OutputConfig(checkpoint_every=EVERY),
            resume=resume,
            on_step=on_step,
            mesh=mesh,
            parallel=ParallelConfig(blocks=blocks, harvest_ranks=harvest_ranks, **layout),
            **(SETTINGS | settings),
        )
    except Stopped:
        return {}
    timed = ("tokens_per_second",)
    lines = [{n: v for n, v in line.items() if n not in timed} for line in result.metrics]
    return {"lines": lines, "weights": dict(result.sae.state_dict())}


def refused(group: ProcessGroup, folder: str, **settings: Any) -> str:
    """The message of a run's error."""
    if settings.pop("differs", False):
        settings["lr"] = 1e-3 * (1 + group.rank())
    try:
        run(group, folder, **settings)
    except (DataError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "trained"
