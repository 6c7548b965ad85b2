"""How much memory a step takes on top of what must be there anyway.

Each case runs in a process of its own, which resets its high-water mark (VmHWM) by writing 5 to
/proc/self/clear_refs once everything that is not the step's own is resident: the libraries and
thread pools (a step of a tiny SAE pays for them), weights, compute copies, Adam states (written
once, as fresh zeros occupy no memory) and the batch. What it reports is VmHWM after the work less
VmRSS before: every buffer of the step itself counts, also those torch's allocator keeps.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"),
]

_PRELUDE = """
import torch
from sae_kernels.functional import encode_topk
from sae_kernels.nn import TopKSAE
from sae_kernels.config import OptimizerConfig
from sae_kernels.step import FusedStep

torch.set_num_threads(2)

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))

def start():
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")
    return memory("VmRSS")

BF16 = OptimizerConfig(compute="bfloat16")
tiny = FusedStep(TopKSAE(64, 256, k=8), optimizer=BF16)
for _ in range(2):
    tiny(torch.randn(256, 64), lr=1e-3)
"""

_STEP = """
step = FusedStep(TopKSAE(768, 24576, k=32), optimizer=BF16)
for row in step.matrices.values():
    row.m.zero_(), row.v.zero_()
step.dead.since_fired[:DEAD] = 10**8
x = torch.randn(2048, 768)
before = start()
for _ in range(STEPS):
    result = step(x, lr=1e-4)
assert not result.skipped
assert (float(result.aux_loss) > 0) == (DEAD > 0)
print(memory("VmHWM") - before)
"""

_ENCODE = """
x, W = torch.randn(16384, 32), torch.randn(131072, 32)
W_rounded = W.to(DTYPE)
before = start()
codes = encode_topk(x, W_rounded, None, 32)
assert codes.indices.shape == (16384, 32)
print(memory("VmHWM") - before)
"""


def _mebibytes(script: str, **values: object) -> float:
    for name, value in values.items():
        script = script.replace(name, str(value))
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_the_probe_sees_a_buffer() -> None:
    """A measurement that cannot fail measures nothing."""
    assert _mebibytes(
        "before = start(); torch.ones(100 << 18); print(memory('VmHWM') - before)"
    ) == pytest.approx(100, abs=5)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_training_step_fits_in_64_mebibytes(steps: int) -> None:
    """B=2048 D=768 F=24576 K=32: h alone would be 192 MiB, a decoder gradient 72 MiB."""
    assert _mebibytes(_STEP, STEPS=steps, DEAD=0) < 64


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_encoding_holds_candidates_only(dtype: str) -> None:
    """h would be 8 GiB. The codes are 4 MiB, and the candidates in the making less than that."""
    assert _mebibytes(_ENCODE, DTYPE=dtype) < 16
