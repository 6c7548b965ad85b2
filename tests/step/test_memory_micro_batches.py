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
# In MiB. Of 65536 tokens, of which an fp32 [B, D] takes 64, the steps of topk must stay below one
# such matrix; on the whole batch they take 184 to 408. Two numbers for each of the k B entries
# that BatchTopK keeps take 16, and some copies of them live at once. Of a ReLU SAE half of the
# latents fire: in tiles of 8 MiB (some twenty live at once) on the fused route; 8 for each number
# of a micro-batch's entries under autograd, where the whole of 16384 tokens would take 128 for it.
CASES = {
    "topk": ("FusedStep", "TopKSAE(256, 4096, k=32)", 0, 65536, 64),
    "topk-auxk": ("FusedStep", "TopKSAE(256, 4096, k=32)", 200, 65536, 64),
    "batchtopk": ("FusedStep", "BatchTopKSAE(256, 4096, k=32)", 0, 65536, 128),
    "relu-dense": ("FusedStep", "ReLUSAE(256, 4096)", 0, 65536, 192),
    "autograd-topk": ("AutogradStep", "TopKSAE(256, 4096, k=32)", 0, 65536, 64),
    "autograd-relu": ("AutogradStep", "ReLUSAE(256, 4096)", 0, 16384, 256),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_batch_of_many_micro_batches_takes_the_room_of_one(
    case: tuple[str, str, int, int, int],
) -> None:
    route, sae, dead, n_tokens, most = case
    came = mebibytes(_STEP, ROUTE=route, MODULE=sae, DEAD=dead, TOKENS=n_tokens)
    assert came < most
