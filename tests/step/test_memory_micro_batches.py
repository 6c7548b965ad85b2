"""How much memory a step in micro-batches takes; see memory_probe for how it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.step.memory_probe import mebibytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"),
]

_STEP = """
from sae_kernels.nn import BatchTopKSAE, JumpReLUSAE, ReLUSAE
from sae_kernels.step import AutogradStep

step = ROUTE(MODULE, optimizer=OptimizerConfig(compute="float32"))
step.dead.since_fired[:DEAD] = 10**8
x = torch.randn(TOKENS, 256)
step(x[:1024].split(512), lr=1e-4)  # libraries, Adam's moments, and the first look at a batch
step.dead.since_fired[:DEAD] = 10**8
before = start()
result = step(x.split(1024), lr=1e-4)
assert not result.skipped
print(memory("VmHWM") - before)
"""
# In MiB. A gradient of [4096, 256] takes 4; that of both matrices is there once, and once more
# while a dense gradient of a micro-batch is added to it. On the whole of 65536 tokens each fp32
# [B, D] takes 64, and the entries of a ReLU SAE that starts with half of its latents firing 1024
# for each number of an entry.
CASES = {
    "topk": ("FusedStep", "TopKSAE(256, 4096, k=32)", 0, 65536, 64),
    "topk-auxk": ("FusedStep", "TopKSAE(256, 4096, k=32)", 200, 65536, 80),
    "batchtopk": ("FusedStep", "BatchTopKSAE(256, 4096, k=32)", 0, 65536, 64),
    "relu-dense": ("FusedStep", "ReLUSAE(256, 4096)", 0, 65536, 320),
    "autograd-topk": ("AutogradStep", "TopKSAE(256, 4096, k=32)", 0, 65536, 64),
    "autograd-relu": ("AutogradStep", "ReLUSAE(256, 4096)", 0, 16384, 640),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_batch_of_many_micro_batches_takes_the_room_of_one(
    case: tuple[str, str, int, int, int],
) -> None:
    route, sae, dead, n_tokens, most = case
    came = mebibytes(_STEP, ROUTE=route, MODULE=sae, DEAD=dead, TOKENS=n_tokens)
    print(came)
    assert came < most
