"""Training steps on the host kernels do not change by a bit where their scores are screened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

import sae_kernels as sk
from sae_kernels.backends import cpu
from sae_kernels.config.optimizer import OptimizerConfig
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from collections.abc import Callable

D, F, TOKENS, STEPS = 128, 1024, 64, 200
SAES: dict[str, Callable[[], torch.nn.Module]] = {
    "topk": lambda: sk.TopKSAE(D, F, k=4),
    "batch-topk": lambda: sk.BatchTopKSAE(D, F, k=4),
    "jumprelu": lambda: sk.JumpReLUSAE(D, F, threshold_init=1.0),
}


@pytest.mark.parametrize("how", [cpu.Screening.PAIRS, cpu.Screening.FOURS], ids=lambda h: h.name)
@pytest.mark.parametrize("name", SAES)
def test_steps_are_bitwise_the_same(
    name: str, how: cpu.Screening, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = [isa for isa in cpu.supported_isas() if how in cpu.screenings(isa)]
    if not able:
        pytest.skip(f"this machine has no instruction for products of bytes by {how.name}")
    monkeypatch.setenv(cpu.ISA_VARIABLE, able[0])
    torch.set_num_threads(1)
    # By the rule, at sizes for a test.
    monkeypatch.setattr(cpu, "fastest_screening", lambda _: how)
    monkeypatch.setattr(cpu, "SCREENED_TOKENS", TOKENS)
    monkeypatch.setattr(cpu, "SCREENED_WIDTH", D)
    monkeypatch.setattr(cpu, "SCREENED_LATENTS", F)
    directions = torch.randn(2 * D, D)

    def train(screens: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        if not screens:
            monkeypatch.setattr(cpu, "screens", lambda *_: cpu.Screening.NONE)
        step = sk.FusedStep(SAES[name](), optimizer=OptimizerConfig(compute="float32"))
        losses = []
        for _ in range(STEPS):
            active = torch.rand(TOKENS, 2 * D) * (torch.rand(TOKENS, 2 * D) < 0.02)
            losses.append(torch.as_tensor(step(active @ directions, lr=1e-3).loss).detach().clone())
        return [torch.stack(losses), *step.sae.parameters()]

    screened, plain = train(screens=True), train(screens=False)
    for i, (came, expected) in enumerate(zip(screened, plain, strict=True)):
        assert_bitwise(f"tensor {i}", came.detach(), expected.detach())
