"""The planner's formulas by hand, and its order of magnitude."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from sae_kernels.bench.plan import (
    Layout,
    Problem,
    calibrated,
    device,
    devices,
    fastest,
    layouts,
    predict,
    prediction,
    unless_told,
)
from sae_kernels.config import OptimizerConfig
from sae_kernels.config.parallel import ParallelConfig
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
        # A key for each of 2 entries, one below which nobody need look, a count back.
        "candidates": 3 / 4 * 16 * ((2 + 1) * 4 + 4),
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


def test_a_layout_for_every_divisor():
    assert [(x.shards, x.replicas) for x in layouts(6)] == [(1, 6), (2, 3), (3, 2), (6, 1)]
    assert [x.shards for x in layouts(9)] == [1, 3, 9]
    assert layouts(1)[0].name == "one device"


def test_an_unknown_device_is_refused_with_a_hint():
    with pytest.raises(ValueError, match="'h20'; did you mean 'h200'"):
        device("h20")
