"""Training steps on a GPU, and looking into them."""

from __future__ import annotations

from typing import Any

import torch

from sae_kernels.nn import SwitchConfig, TopKConfig
from sae_kernels.nn import build as build_sae
from sae_kernels.step import FusedStep
from sae_kernels.testing import assert_bitwise
from tests.settings import settings

B, D, F, K = 512, 256, 4096, 16
DEAD = 300
VARIANTS: dict[str, dict[str, Any]] = {
    "bf16": {"compute": "bfloat16", "auxk_alpha": 0.0},
    "fp32-clipped": {"compute": "float32", "auxk_alpha": 0.0, "clip_norm": 0.1},
    "auxk": {"compute": "bfloat16", "auxk_alpha": 0.5, "auxk_latents": 256},
    "auxk-none-dead": {"compute": "bfloat16"},
    "random-prefixes": {"compute": "bfloat16", "auxk_alpha": 0.0, "random_prefixes": 3},
    "switch": {"compute": "bfloat16", "auxk_alpha": 0.0, "balance_coefficient": 0.3},
    "split-bf16-moments": {
        "compute": "bfloat16",
        "master_weights": "split",
        "moment_dtype": "bfloat16",
    },
}


def build(variant: str, device: torch.device) -> FusedStep:
    """A step that always starts from the same state; with "auxk" some latents are dead."""
    switch = SwitchConfig(D, F, k=K, n_experts=8)
    sae = build_sae(switch if variant == "switch" else TopKConfig(D, F, K), device=device)
    config = settings(sae, **VARIANTS[variant])
    step = FusedStep(sae, config.objective, config.optimizer)
    if variant == "auxk":
        step.dead.since_fired[:DEAD] = step.dead.after + torch.arange(DEAD, device=device)
    return step


def batches(n: int, device: torch.device) -> list[torch.Tensor]:
    """The same tokens every time."""
    generator = torch.Generator("cpu").manual_seed(1)
    return [torch.randn(B, D, generator=generator).to(device) for _ in range(n)]


def state(step: FusedStep) -> dict[str, torch.Tensor]:
    """All that a step changes, in copies."""
    rows = {
        f"{name}.{part}": tensor
        for name, row in step.matrices.items()
        for part, tensor in row._asdict().items()
        if tensor is not None
    }
    counters = {"since_fired": step.dead.since_fired, "n_updates": step.n_updates}
    return {name: tensor.clone() for name, tensor in (rows | counters).items()}


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raises AssertionError unless two states hold the same bits."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert_bitwise(name, actual[name].flatten().cpu(), tensor.flatten().cpu())


def assert_trained(step: FusedStep) -> None:
    """Raises AssertionError if the steps were no-ops: then equal states mean nothing."""
    assert int(step.n_updates) > 0
    assert all(bool((row.m != 0).any()) for row in step.matrices.values())
