"""How much memory the steps of other architectures take; see memory_probe for how it is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.step.memory_probe import mebibytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc"),
]

# Unit rows in the encoder make h a standard normal number, of which one in 770 is above 3.
_STEP = """
from sae_kernels.nn import BatchTopKConfig, CrossLayerTopKConfig, GatedConfig, JumpReLUConfig
from sae_kernels.nn import ReLUConfig, TopKConfig, build

def step_of(D, F):
    sae = build(CONFIG)
    with torch.no_grad():
        sae.W_enc.div_(sae.W_enc.norm(dim=1, keepdim=True))
        sae.b_enc.fill_(SHIFT)
    plain = {"loss": "fvu", "sparsity": "none", "target_l0": None, "auxk_alpha": 0}
    objective = sae.objective_class(**plain | dict(TRAIN))
    return FusedStep(sae, objective, OptimizerConfig(compute="COMPUTE"))

def run(step, B):
    config = step.sae.config
    target = torch.randn(B, config.output_width) if config.transcodes else None
    step.dense_next = DENSE
    return step(torch.randn(B, config.input_width), lr=1e-4, target=target)

run(step_of(64, 256), 256)
step = step_of(768, 24576)
for row in step.matrices.values():
    row.m.zero_(), row.v.zero_()
before = start()
for _ in range(2):
    result = run(step, 2048)
assert not result.skipped
assert LEAST < float(result.l0) < MOST, float(result.l0)
print(memory("VmHWM") - before)
"""
_GROUPS = "groups=(F // 16, F // 16, F // 8, F // 4, F // 2)"
_L0 = 'loss="mse", sparsity="l0", sparsity_coefficient=1.0'
_L1 = 'loss="mse", sparsity="l1", sparsity_coefficient=1.0'
SPARSE = {
    "batchtopk": ("BatchTopKConfig(D, F, 32)", ""),
    "jumprelu": ("JumpReLUConfig(D, F, threshold_init=3.0, bandwidth=0.1)", _L0),
    "jumprelu-target": (
        "JumpReLUConfig(D, F, threshold_init=3.0, bandwidth=0.1)",
        'sparsity="target_l0", target_l0=30, preact_coefficient=3e-6',
    ),
    "relu": ("ReLUConfig(D, F)", _L1),
    "gated": ("GatedConfig(D, F)", _L1),
    "transcoder": ("TopKConfig(D, F, 32, d_out=512, subtract_b_dec=False)", ""),
    "clt": ("CrossLayerTopKConfig(D // 2, F, k=16, n_layers=2, d_out=D // 2)", ""),
}
MATRYOSHKA = {
    "batchtopk": (f"BatchTopKConfig(D, F, 32, {_GROUPS})", ""),
    "topk": (f"TopKConfig(D, F, 32, {_GROUPS})", ""),
}
DENSE = {
    "relu": ("ReLUConfig(D, F)", _L1),
    "jumprelu": ("JumpReLUConfig(D, F, threshold_init=0.05)", _L0),
    "gated": ("GatedConfig(D, F)", _L1),
}
# In MiB, of B=2048 D=768 F=24576.
H, GRADIENT, BATCH = 192, 72, 6
both = pytest.mark.parametrize("compute", ["float32", "bfloat16"])


def _sparse(case: tuple[str, str], compute: str) -> float:
    config, train = case
    shift = -3.0 if "ReLUConfig(D, F)" in config or "Gated" in config else 0.0
    values = {"SHIFT": shift, "DENSE": False, "LEAST": 20, "MOST": 50}
    return mebibytes(_STEP, CONFIG=config, TRAIN=train, COMPUTE=compute, **values)


@both
@pytest.mark.parametrize("case", SPARSE.values(), ids=SPARSE)
def test_a_sparse_step_fits_in_64mebibytes(case: tuple[str, str], compute: str) -> None:
    """As TopK's does: nothing of [B, F], and no gradient of [F, D]."""
    assert _sparse(case, compute) < 64


@both
@pytest.mark.parametrize("case", MATRYOSHKA.values(), ids=MATRYOSHKA)
def test_prefixes_cost_their_residuals(case: tuple[str, str], compute: str) -> None:
    """Five residuals in the place of one, twice: before and after they are scaled and summed."""
    assert _sparse(case, compute) < 64 + 2 * 4 * BATCH


@both
@pytest.mark.parametrize("case", DENSE.values(), ids=DENSE)
def test_a_dense_pass_holds_two_gradients_and_tiles(case: tuple[str, str], compute: str) -> None:
    """What is [B, F] on paper comes in tiles of 8 MiB: h, codes, gates, windows, their gradients.

    Some twenty of them live at once, which is less than h alone would take, or twice that.
    """
    config, train = case
    values = {"SHIFT": 0.0, "DENSE": True, "LEAST": 5000, "MOST": 20000}
    came = mebibytes(_STEP, CONFIG=config, TRAIN=train, COMPUTE=compute, **values)
    assert 2 * GRADIENT < came < 2 * GRADIENT + (1 if config == "ReLUConfig(D, F)" else 2) * H
