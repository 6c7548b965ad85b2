"""The speed bars of TopK and Switch on this machine (minutes; mean nothing on a busy one)."""

from __future__ import annotations

import pytest
import torch

from benchmarks import cpu_bars, screen_bars, switch_bars
from sae_kernels.backends import cpu

pytestmark = pytest.mark.slow

needs_amx = pytest.mark.skipif(
    cpu.isa() != "amx", reason="the bf16 bars are ratios to an AMX product: no AMX here"
)


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def ratios(records) -> dict[str, float]:
    return {f"{r['case']}: {r['provider']}": r["ratio"] for r in records}


@needs_amx
@pytest.mark.parametrize("kind", ["zipf", "uniform"])
def test_encode_costs_little_more_than_the_product(kind):
    got = ratios(cpu_bars.encode(kind, rounds=7))
    assert got[f"encode {kind} bf16 D=768: encode_topk bf16"] <= 1.25
    assert got[f"encode {kind} bf16 D=2304: encode_topk bf16"] <= 1.1
    assert got[f"encode {kind} fp32 D=768: encode_topk fp32"] <= 1.1


@needs_amx
@pytest.mark.parametrize("kind", ["zipf", "uniform"])
def test_a_step_costs_three_products_and_a_fraction_of_a_dense_step(kind):
    got = ratios(cpu_bars.step(kind, rounds=7))
    assert got[f"step {kind}: FusedStep bf16"] <= 3
    dense = [f"step {kind}, Adam {optimizer}: " for optimizer in ("foreach", "fused")]
    assert min(got[case + "dense fp32"] for case in dense) >= 20
    assert min(got[case + "dense autocast bf16"] for case in dense) >= 7
    assert min(got[case + "dense fp32"] / got[case + "autograd bf16"] for case in dense) >= 5


def test_small_shapes_are_never_slower_than_dense():
    for case, ratio in ratios(cpu_bars.small("uniform", rounds=7)).items():
        if "dense" in case:
            assert ratio >= 1, f"{case} is faster than FusedStep float32"


@pytest.mark.parametrize("group", ["hostile", "dense"])
@pytest.mark.parametrize("variant", [v for v in ("avx512", "avx2") if v in cpu.supported_isas()])
def test_a_screen_that_cannot_save_anything_costs_nothing(group, variant, monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, variant)
    for case, ratio in ratios(screen_bars.GROUPS[group]("uniform", rounds=11)).items():
        assert ratio <= 1.03, case


@pytest.mark.parametrize("kind", ["zipf", "uniform"])
def test_bytes_without_vnni_take_less_time_than_fp32(kind, monkeypatch):
    if "avx2" not in cpu.supported_isas():
        pytest.skip("this machine has no AVX2")
    monkeypatch.setenv(cpu.ISA_VARIABLE, "avx2")
    got = {r["provider"]: r["ratio"] for r in screen_bars.encode(kind, rounds=7)}
    assert got["pairs"] <= 0.78


def ratio_of(records: list[dict[str, object]], provider: str) -> float:
    """Of the one whose name begins so."""
    (found,) = (r for r in records if str(r["provider"]).startswith(provider))
    return float(str(found["ratio"]))


@needs_amx
@pytest.mark.parametrize("kind", ["zipf", "uniform"])
def test_a_switch_encoder_costs_its_experts_part_of_the_product(kind):
    got = list(switch_bars.encode(kind, rounds=7))
    assert ratio_of(got, "Switch E=8,") <= 0.32
    assert ratio_of(got, "Switch E=32,") <= 0.16
    for record in switch_bars.uneven(kind, rounds=7):
        assert record["ratio"] <= 1.1, record


@needs_amx
@pytest.mark.parametrize("kind", ["zipf", "uniform"])
def test_a_switch_step_costs_a_part_of_topks_and_of_the_dense_one(kind):
    adam = [r for r in switch_bars.steps(kind, rounds=7) if "dense" in r["case"]]
    assert ratio_of(adam, "Switch E=8") <= 0.7
    assert ratio_of(adam, "Switch E=32") <= 0.7
    # Clipping costs ours another pass over the gradients: off in bars, and in the results.
    got = list(switch_bars.dense(kind, rounds=5))
    assert ratio_of(got[:3], "dense fp32") >= 15
    assert ratio_of(got[3:], "dense autocast") >= 15
