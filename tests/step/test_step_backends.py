"""A whole training step on every backend: loss, weights and counters as on the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sae_kernels.nn import SwitchConfig, TopKConfig, build
from sae_kernels.step import FusedStep
from tests.settings import settings
from tests.step.harness import stepping

PRIMITIVES = (
    "auxk",
    "decode",
    "decode_residual",
    "pick_dead",
    "route_top1",
    "row_grad",
    "row_sqnorm",
    "row_update",
    "select_topk",
    "select_topk_routed",
    "transpose_codes",
)
B, D, F, K = 24, 40, 160, 6
# What a GPU's memory or a user's loss asks for; clipping and dead latents in all of them.
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"compute": "float32"},
    "bf16": {"compute": "bfloat16"},
    "small-states": {"compute": "bfloat16", "master_weights": "split", "moment_dtype": "bfloat16"},
    "encoder-copy": {"compute": "bfloat16", "compute_copies": "encoder", "multi_topk": True},
    "lazy-ranked": {"compute": "bfloat16", "adam": "lazy", "loss": "mse"},
    "switch": {"compute": "bfloat16", "balance_coefficient": 0.3},
}


def step_on(backend: str, chosen: dict[str, Any]) -> FusedStep:
    """Some latents are dead, and the longest dead of them are more than take part."""
    ranked = chosen.get("adam") == "lazy"
    routed = "balance_coefficient" in chosen
    topk = TopKConfig(D, F, K, rank_by_decoder_norm=ranked)
    sae = build(SwitchConfig(D, F, k=K, n_experts=5) if routed else topk, backend=backend)
    given = {"clip_norm": 0.1, "auxk_latents": 30, "dead_after_tokens": 1000, **chosen}
    config = settings(sae.config, **given)
    step = stepping(FusedStep, sae.to(torch.get_default_device()), config)
    step.dead.padded = True
    step.dead.since_fired[::4] = 1000 + torch.arange(F // 4) // 10
    return step


@pytest.mark.parametrize("name", SETTINGS)
def test_two_steps_are_the_references(name: str, backend: str) -> None:
    ours, specified = (step_on(b, SETTINGS[name]) for b in (backend, "reference"))
    start = {n: p.detach().float().clone() for n, p in specified.sae.named_parameters()}
    for seed in range(2):
        x = torch.randn(B, D, generator=torch.Generator().manual_seed(seed))
        x = x.to(torch.get_default_device())
        result, expected = (step(x, lr=1e-3) for step in (ours, specified))
        for field in ("loss", "fvu", "aux_loss", "l0"):
            value = float(getattr(expected, field))
            # bf16 products of a backend may come out in bf16 (torch's on the CPU).
            assert float(getattr(result, field)) == pytest.approx(value, rel=5e-3), field
            assert value > 0
        assert torch.equal(ours.dead.since_fired, specified.dead.since_fired)
    for step in (ours, specified):
        step.restore_()
    theirs = specified.sae.state_dict()
    for n, parameter in ours.sae.state_dict().items():
        # Adam moves every weight by about lr whatever its gradient, so where a gradient is nearly
        # 0 its rounding may turn the move around: most weights agree, and none is further off
        # than two moves in the wrong direction.
        moved = (theirs[n] - start[n]).abs()
        off = (parameter - theirs[n]).abs()
        assert float(off.max()) <= 2 * 2 * 1.1e-3 + 2**-7 * float(theirs[n].abs().max())
        assert float(off.mean()) <= 0.02 * float(moved.mean()), n
