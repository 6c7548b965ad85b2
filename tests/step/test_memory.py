"""How much memory a step takes on top of what must be there anyway."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.step.memory_probe import mebibytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"),
]

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


def test_the_probe_sees_a_buffer() -> None:
    """A measurement that cannot fail measures nothing."""
    assert mebibytes(
        "before = start(); torch.ones(100 << 18); print(memory('VmHWM') - before)"
    ) == pytest.approx(100, abs=5)


@pytest.mark.parametrize("steps", [1, 3])
def test_a_training_step_fits_in_64mebibytes(steps: int) -> None:
    """B=2048 D=768 F=24576 K=32: h alone would be 192 MiB, a decoder gradient 72 MiB."""
    assert mebibytes(_STEP, STEPS=steps, DEAD=0) < 64


@pytest.mark.parametrize("dtype", ["torch.float32", "torch.bfloat16"])
def test_encoding_holds_candidates_only(dtype: str) -> None:
    """h would be 8 GiB. The codes are 4 MiB, and the candidates in the making less than that."""
    assert mebibytes(_ENCODE, DTYPE=dtype) < 16
