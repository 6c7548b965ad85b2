"""The planner's rates: fitted to steps that are planted, and taken from stored results."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import plan_check
from sae_kernels import machine
from sae_kernels.backends import cpu
from sae_kernels.bench.cases import Case, Shape
from sae_kernels.bench.plan import Layout, Problem, calibrated, calibration, device, prediction
from sae_kernels.bench.plan.calibration import Observation, fit
from sae_kernels.bench.results import Results
from sae_kernels.errors import DataError

H200 = device("h200")
SHAPES = (*plan_check.SEEN, *plan_check.UNSEEN)


def planted(rates: dict[str, float], shapes=SHAPES) -> list[dict[str, object]]:
    """Records of steps that take as long as these rates say."""
    cpu_device = device("cpu")
    records = []
    for shape in shapes:
        for dtype in ("bfloat16", "float32"):
            problem = Problem(shape.D, shape.F, shape.K, shape.B, dtype)
            times = prediction.step_time(
                prediction.amounts(problem, Layout(1, 1), cpu_device), rates
            )
            records.append(record(shape, dtype, 1e3 * times.total))
    return records


def record(shape: Shape, dtype: str, ms: float) -> dict[str, object]:
    times = {"median_ms": ms, "p20_ms": ms, "p80_ms": ms}
    facts = Case("step", "step", shape).facts()
    return {**facts, "provider": "ours", "dtype": dtype, "status": "measured", **times}


def rates_of(**factors: float) -> dict[str, float]:
    return {unit: rate * factors.get(unit, 1.0) for unit, rate in device("cpu").rates.items()}


@pytest.fixture
def here():
    """A provenance of this machine."""
    return {
        "cpu": machine.cpu_model(),
        "isa": cpu.isa(),
        "threads": torch.get_num_threads(),
    }


@pytest.fixture
def stored(tmp_path):
    def write(provenance, records, name="results.jsonl"):
        lines = [{"provenance": provenance}, *records]
        path = tmp_path / name
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path

    return write


PLANTED = {"bfloat16": 1.7, "float32": 0.8, "gathered": 0.6, "moved": 1.9, "candidates": 0.5}


def test_planted_rates_are_found_again():
    rates = rates_of(**PLANTED, latents=1.3, steps=2.0)
    seen = calibration.observations(Results({}, planted(rates)), device("cpu"))
    found = fit(seen, device("cpu").rates, pull=1e-7)
    assert found == pytest.approx(rates, rel=1e-5)


def test_with_its_own_pull_planted_steps_are_predicted():
    # Nothing but the pull is in the way: the steps are exact.
    seen = Results({}, planted(rates_of(**PLANTED), plan_check.SEEN))
    unseen = Results({}, planted(rates_of(**PLANTED), plan_check.UNSEEN))
    checks = plan_check.checked(seen, unseen)
    assert len(checks) == len(unseen.records)
    assert max(abs(check.error) for check in checks) < plan_check.TOLERANCE / 2
    assert "within 30%" in plan_check.report(checks)


def test_a_wrong_model_is_reported():
    seen, unseen = (planted(rates_of(), half) for half in (plan_check.SEEN, plan_check.UNSEEN))
    unseen[3]["median_ms"] *= 2
    report = plan_check.report(plan_check.checked(Results({}, seen), Results({}, unseen)))
    assert "NOT within 30%" in report
    assert "(-50%)" in report


def test_no_step_leaves_the_nominal_rates_and_one_moves_those_it_needs():
    assert fit([], {"moved": 1.0}) == {}
    found = fit([Observation({"moved": 6.0}, 2.0)], {"moved": 1.0, "gathered": 1.0}, pull=1e-6)
    assert found == {"moved": pytest.approx(3.0)}


def test_a_unit_that_costs_nothing_is_infinitely_fast_and_never_negative():
    # The second unit would need a negative time: 1 s for 1 + 1, but 2 s for 1 alone.
    seen = [
        Observation({"moved": 1.0, "gathered": 1.0}, 1.0),
        Observation({"moved": 1.0}, 2.0),
    ]
    found = fit(seen, {"moved": 1.0, "gathered": 1.0}, pull=1e-9)
    assert found["gathered"] == float("inf")
    # min over t of (t - 1)^2 + (t / 2 - 1)^2 is at t = 1.2
    assert found["moved"] == pytest.approx(1 / 1.2)


def test_results_of_this_device_give_its_rates(stored, here):
    path = stored(here, planted(rates_of(**PLANTED)))
    found = calibrated(device("cpu"), [path])
    assert found.steps == 2 * len(SHAPES)
    assert found.rates["float32"] == pytest.approx(rates_of(**PLANTED)["float32"], rel=0.05)
    assert set(found.origins.values()) == {"fitted"}
    assert found.text(device("cpu")).startswith(f"calibrated by {found.steps} steps in results")


def test_records_that_are_no_step_of_ours_do_not_count(stored, here):
    records = planted(rates_of())[:6]
    records[0]["provider"] = "sparsify"
    records[1]["operation"] = "encode"
    records[2]["architecture"] = "relu"
    records[3]["status"], records[3]["median_ms"] = "refused", None
    records[4]["B"] = None
    assert calibrated(device("cpu"), [stored(here, records)]).steps == 1


def test_measured_rates_take_the_place_of_nominal_ones(stored):
    there = {"cpu": "some host", "device": "NVIDIA H200"}
    with pytest.raises(DataError, match="got neither"):
        calibrated(H200, [stored(there, [], "none.jsonl")])
    shape = {"case": "step", "status": "measured", "B": 8192, "D": 768, "F": 65536, "K": 32}
    product = {**shape, "provider": "product", "dtype": "bfloat16", "median_ms": 1.0}
    copy = {**shape, "provider": "copy", "dtype": "int8", "median_ms": 0.125}
    records = [{**r, "p20_ms": r["median_ms"], "p80_ms": r["median_ms"]} for r in (product, copy)]
    found = calibrated(H200, [stored(there, records)])
    assert found.rates["moved"] == pytest.approx(2 * 2**28 / 0.125e-3)  # read and written
    assert found.rates["bfloat16"] == pytest.approx(2 * 8192 * 768 * 65536 / 1e-3)
    assert found.rates["float32"] == H200.rates["float32"]
    assert found.origins["moved"] == "measured"
    assert found.origins["network"] == "nominal"


def test_without_files_the_results_of_the_checkout_count(stored, here, monkeypatch):
    theirs = stored({**here, "cpu": "another"}, planted(rates_of()), "theirs.jsonl")
    other = stored(here, [{"case": "of another kind"}], "other.jsonl")
    ours = stored(here, planted(rates_of()), "ours.jsonl")
    monkeypatch.setattr(calibration, "stored", lambda: [theirs, other, ours])
    assert calibrated(device("cpu")).files == ["ours.jsonl"]
    found = calibrated(H200)
    assert found.text(H200) == "not calibrated: no stored result for h200"
    assert found.rates == H200.rates


def test_foreign_and_damaged_results_are_refused(stored, here, tmp_path):
    def refusal(path, name="cpu"):
        with pytest.raises(DataError) as caught:
            calibrated(device(name), [path])
        assert "\n" not in str(caught.value)
        return str(caught.value)

    steps = planted(rates_of())[:2]
    assert "expected results of cpu, got another" in refusal(
        stored({**here, "cpu": "another"}, steps)
    )
    assert "threads" in refusal(stored({**here, "threads": 99}, steps))
    assert "got those of NVIDIA H200" in refusal(stored({**here, "device": "NVIDIA H200"}, steps))
    assert "expected results of h100" in refusal(stored({"device": "NVIDIA H200"}, steps), "h100")
    assert "got those of NVIDIA GH200" in refusal(stored({"device": "NVIDIA GH200"}, steps), "h200")
    assert "got neither" in refusal(stored(here, []))
    assert "line 2" in refusal(stored(here, [{"case": "of another kind"}]))
    assert "nowhere" in refusal(tmp_path / "nowhere.jsonl")
    damaged = tmp_path / "damaged.jsonl"
    damaged.write_bytes(b"\xff\xfe{")
    assert "damaged" in refusal(damaged)
