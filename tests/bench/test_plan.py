"""The planner's formulas by hand, its order of magnitude, and its fit to steps that are planted."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

from benchmarks import plan_check
from sae_kernels import machine
from sae_kernels.backends import cpu
from sae_kernels.bench.cases import Case, Shape
from sae_kernels.bench.plan import (
    Layout,
    Problem,
    calibrated,
    calibration,
    device,
    devices,
    fastest,
    layouts,
    predict,
    prediction,
    unless_told,
)
from sae_kernels.bench.plan.calibration import Observation, fit
from sae_kernels.bench.results import Results
from sae_kernels.cli import numbers
from sae_kernels.config import OptimizerConfig
from sae_kernels.config.parallel import ParallelConfig
from sae_kernels.errors import DataError
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.step import FusedStep

SMALL = Problem(d_in=4, n_latents=8, k=2, batch=16)
SETTINGS = [  # and bytes of a weight, held and moved by an update (docs/training.md)
    ({}, "bfloat16", 14, 26),
    ({}, "float32", 12, 24),
    ({"compute_copies": "encoder"}, "bfloat16", 13, 25),
    ({"master_weights": "split"}, "bfloat16", 12, 24),
    ({"moment_dtype": "bfloat16"}, "bfloat16", 10, 18),
    ({"master_weights": "split", "moment_dtype": "bfloat16"}, "bfloat16", 8, 16),
]
H200 = device("h200")


@pytest.fixture
def nominal():
    return calibrated(H200, [])


def messages(layout: Layout, problem: Problem) -> dict[str, float]:
    return {m.what: m.bytes for m in layout.messages(problem)}


def only(predictions):
    (prediction,) = predictions
    return prediction


@pytest.mark.parametrize(("settings", "dtype", "held", "moved"), SETTINGS)
def test_bytes_per_weight(settings, dtype, held, moved):
    problem = Problem(4, 8, 2, 16, dtype, OptimizerConfig(**settings))
    assert problem.state_bytes == 2 * held
    assert problem.update_bytes == 2 * moved


@pytest.mark.parametrize(("settings", "dtype", "held", "moved"), SETTINGS)
def test_bytes_per_weight_are_those_of_the_step(settings, dtype, held, moved):
    optimizer = OptimizerConfig(compute=dtype, **settings)
    matrices = FusedStep(TopKSAE(TopKConfig(4, 8, 2)), None, optimizer).matrices
    tensors = [t for name in ("W_enc", "W_dec") for t in matrices[name] if t is not None]
    assert sum(t.nbytes for t in tensors) == 2 * 4 * 8 * held


def test_memory_of_one_device_by_hand():
    assert Layout(1, 1).memory(SMALL) == {
        "weights and states": 8 * (4 * 28 + 32),
        "decoder rows": 0,
        "tokens": 16 * 4 * (4 + 2 + 4),
        "partial sums": 0,
        "codes": 16 * 2 * 20,
    }
    assert not Layout(1, 1).messages(SMALL)


def test_a_mixed_layout_by_hand():
    mixed = Layout(shards=2, replicas=2)  # 2 latents a GPU, which decodes 8 tokens by 4 rows
    work = mixed.work(SMALL)
    assert (work.B, work.F, work.B * work.K) == (16, 2, 8)
    assert messages(mixed, SMALL) == {
        "tokens": 3 / 4 * 16 * 4 * 2,
        "candidates": 3 / 4 * 16 * (2 * 4 + 4),  # a key for each of 2 entries, a count back
        "codes": 8 * 4 + 8 / 2 * 8,  # a count a token of the other's, and half of 8 entries
        "partial sums": 8 / 2 * 4 * 4,
        "residuals": 3 / 4 * 16 * 4 * 4,
        "decoder rows": 2 * 4 * 2,
    }
    assert mixed.memory(SMALL)["decoder rows"] == 4 * 4 * 2
    assert mixed.memory(SMALL)["partial sums"] == 8 * 4 * 4
    assert mixed.memory(SMALL)["codes"] == 16 * 2 * (20 + 8)


@pytest.mark.parametrize("partial_sums", ["float32", "bfloat16"])
def test_training_takes_the_layout_that_sends_the_least(partial_sums):
    """Of what differs between layouts, for tokens in plenty and in want; all others send more."""
    for gpus, n_latents, batch in itertools.product((2, 4, 8, 12), (2**12, 2**14), (2**11, 2**14)):
        problem = Problem(1024, n_latents * 3, 32, batch * 3)
        settings = ParallelConfig(partial_sums=partial_sums)
        chosen = settings.fitted(gpus, problem.batch, problem.n_latents, problem.decoder_bytes)
        sent = {}
        for layout in layouts(gpus):
            parts = messages(layout, problem)
            half = 1 if partial_sums == "float32" else 0.5
            rows, sums = parts.get("decoder rows", 0), parts.get("partial sums", 0) * half
            sent[layout.shards, layout.replicas] = rows + sums
        assert sent[chosen.latents_over, chosen.tokens_over] == min(sent.values())


def test_both_are_spread_where_rows_and_tokens_weigh_the_same():
    # 4 B = s F: 3 parts of either by four, or one of each by two and two.
    assert unless_told(Problem(512, 8192, 32, 4096), 4).name == "2 x 2"


def test_parts_of_a_step_by_hand():
    rates = dict.fromkeys(devices.UNITS, 1.0)
    slow = dataclasses.replace(H200, rates=rates)
    times = prediction.step_time(prediction.amounts(SMALL, Layout(1, 1), slow), rates)
    assert times.product == 2 * 16 * 4 * 8
    assert times.decode == times.code_gradients == 16 * 2 * 4 * 2
    assert times.latent_order == 16 * 2 * 4 * (2 + 4)
    assert times.optimizer == 4 * 8 * 52 + 4 * 8 * 2 + 2 * 8
    assert times.selection == pytest.approx(16 * 8 * 8 + 16 * 2 * (1 + 1.3862943611))  # ln(8/2)
    assert times.other == 16 * 4 * 22 + 1
    assert times.total == pytest.approx(sum(times.bounds().values()))


def test_sources_that_overflow_the_cache_are_read_from_memory():
    slow = dataclasses.replace(H200, rates={**H200.rates, "gathered": 2.0, "moved": 1.0})
    found = {
        cache: prediction.step_time(
            prediction.amounts(SMALL, Layout(1, 1), dataclasses.replace(slow, cache_bytes=cache)),
            slow.rates,
        )
        for cache in (1, 2**20)
    }
    assert found[1].latent_order == 2 * found[2**20].latent_order
    # Of decoder rows 8 leave memory and 32 are gathered: the slower of 8 / 1 and 32 / 2.
    assert found[1].decode == found[2**20].decode == 32 * 8 / 2


def test_more_shards_never_need_more_memory_nor_a_longer_product(nominal):
    problem = Problem(d_in=4096, n_latents=2**20, k=64, batch=32768)
    sharded = [
        next(p for p in predict(problem, 2**i, H200, nominal) if p.layout.replicas == 1)
        for i in range(10)
    ]
    for fewer, more in itertools.pairwise(sharded):
        assert more.memory_bytes < fewer.memory_bytes
        assert more.seconds.product < fewer.seconds.product


def test_every_layout_does_the_same_product(nominal):
    problem = Problem(d_in=4096, n_latents=2**20, k=64, batch=32768)
    found = predict(problem, 64, H200, nominal)
    assert [p.layout.shards for p in found] == [1, 2, 4, 8, 16, 32, 64]
    assert len({round(p.seconds.product, 9) for p in found}) == 1


def test_links_within_a_node_are_the_faster_ones(nominal):
    problem = Problem(d_in=1024, n_latents=2**16, k=32, batch=4096)
    seconds = {
        gpus: predict(problem, gpus, H200, nominal)[-1].seconds.communication for gpus in (8, 16)
    }
    assert seconds[16] > 8 * seconds[8]  # 9 times slower, about as many bytes


BOUNDS = {
    "product": (Problem(4096, 2**16, 32, 65536), 1),
    "selection": (Problem(64, 2**20, 32, 65536), 1),
    "gathers": (Problem(4096, 4096, 512, 65536), 1),
    "optimizer": (Problem(4096, 2**20, 32, 64), 1),
    "communication": (Problem(4096, 2**16, 32, 4096), 16),
    "other": (Problem(8, 8, 1, 1), 1),
    "memory": (Problem(16384, 2**24, 32, 64), 1),
}


@pytest.mark.parametrize("bound", BOUNDS)
def test_which_bound_rules(bound, nominal):
    problem, gpus = BOUNDS[bound]
    found = predict(problem, gpus, H200, nominal)
    assert found[0].bound == bound
    assert (fastest(found) is None) == (bound == "memory")


def test_the_fastest_layout_is_one_that_fits(nominal):
    found = predict(Problem(16384, 2**24, 128, 131072), 512, H200, nominal)
    best = fastest(found)
    assert best.fits
    assert all(best.seconds.total <= p.seconds.total for p in found if p.fits)
    assert not found[0].fits, "7.7 TB of states"


def test_a_yardstick(nominal):
    # By a roofline of 790 TFLOP/s, 4.3 TB/s and 5.5 TB/s from L2, worked out apart from this code:
    # product 1.04 ms, optimizer 0.61, decode 0.07.
    seconds = only(predict(Problem(768, 65536, 32, 8192), 1, H200, nominal)).seconds
    assert seconds.product == pytest.approx(1.04e-3, rel=0.01)
    assert seconds.decode == pytest.approx(0.07e-3, rel=0.05)
    assert seconds.optimizer == pytest.approx(0.61e-3 * 27 / 26, rel=0.05)  # and dx_sum's read


@pytest.mark.parametrize(
    ("problem", "gpus", "name", "expected"),
    [
        ({}, 2, "cpu", "--gpus: expected 1 with --device cpu, got 2"),
        ({"batch": 4}, 8, "h200", "--batch: expected a token a GPU, 8, or more, got 4"),
        ({}, 16, "h200", "--gpus: expected at most 8"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(problem, gpus, name, expected, nominal):
    with pytest.raises(ValueError, match=expected):
        predict(dataclasses.replace(SMALL, **problem), gpus, device(name), nominal)


def test_a_problem_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="k: expected 1 <= k <= n_latents = 8, got 9"):
        Problem(4, 8, 9, 16)
    with pytest.raises(ValueError, match="bfloat16"):
        Problem(4, 8, 2, 16, "float32", OptimizerConfig(master_weights="split"))


@pytest.mark.parametrize(
    ("text", "latents", "tokens"),
    [
        ("131072", 131072, 131072),
        ("16M", 16 * 2**20, 16_000_000),
        ("40g", 40 * 2**30, 40_000_000_000),
        ("0.5K", 512, 500),
        ("1_000", 1000, 1000),
        ("1e3", 1000, 1000),
    ],
)
def test_sizes_are_binary_and_tokens_decimal(text, latents, tokens):
    assert numbers.size(text, "x") == latents
    assert numbers.tokens(text, "x") == tokens


@pytest.mark.parametrize("text", ["", "M", "-1", "0", "1.5", "16 Mi", "12x", "nan", "1e99", "²"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match="--k: expected a whole number"):
        numbers.size(text, "--k")


def test_a_layout_for_every_divisor():
    assert [(x.shards, x.replicas) for x in layouts(6)] == [(1, 6), (2, 3), (3, 2), (6, 1)]
    assert [x.shards for x in layouts(9)] == [1, 3, 9]
    assert layouts(1)[0].name == "one device"


# Rates from results.

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


def test_an_unknown_device_is_refused_with_a_hint():
    with pytest.raises(ValueError, match="'h20'; did you mean 'h200'"):
        device("h20")
