"""How much the host does in a small step: the gate on Python around the kernels."""

from __future__ import annotations

import pytest
import torch

from sae_kernels.nn import TopKSAE
from sae_kernels.step import FusedStep
from tests.settings import settings
from tests.step.host_work import host_work


def step(**options: object) -> FusedStep:
    sae = TopKSAE(64, 512, k=16)
    config = settings(sae, **({"compute": "float32"} | options))
    return FusedStep(sae, config.objective, config.optimizer)


def test_a_small_step_is_little_work_for_the_host() -> None:
    # Before calls went past the dispatcher 762 functions and 101 operators.
    small, x = step(), torch.randn(256, 64)
    for _ in range(3):
        small(x, lr=1e-3)
    work = host_work(lambda: small(x, lr=1e-3))
    assert work.functions <= 640
    assert work.operators <= 72


@pytest.mark.parametrize("wanted", ["reference", "cpu"])
def test_calls_past_the_dispatcher_follow_the_choice_of_backend(
    wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sae_kernels
    from sae_kernels.primitives.select_topk import cpu, reference, select_topk

    ran = []
    for name, module in (("cpu", cpu), ("reference", reference)):
        own = module.run
        monkeypatch.setattr(
            module, "run", lambda *a, own=own, name=name: (ran.append(name), own(*a))[1]
        )
    x, W = torch.randn(5, 8), torch.randn(16, 8)
    with torch.no_grad():
        select_topk(x, W, None, 2)
        select_topk(x, W, None, 2, backend=wanted)
        with sae_kernels.use_backend(wanted):
            select_topk(x, W, None, 2)
        monkeypatch.setenv("SAE_KERNELS_BACKEND", wanted)
        select_topk(x, W, None, 2)
        monkeypatch.delenv("SAE_KERNELS_BACKEND")
        select_topk(x, W, None, 2)
    assert ran == ["cpu", wanted, wanted, wanted, "cpu"]
