"""TrainConfig: defaults, schedules and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from sae_kernels.config import DataConfig, ObjectiveConfig, OptimizerConfig, TrainConfig
from sae_kernels.config.base import declared
from sae_kernels.nn import ReLUObjective, TopKObjective, TopKSAE, architectures
from sae_kernels.step import AutogradStep


def test_defaults() -> None:
    """The sources of defaults stand in the settings' declarations."""
    assert TrainConfig().to_dict() == {
        "steps": 1000,
        "batch_size": 2048,
        "micro_batch_size": None,
        "lr": None,
        "warmup_steps": None,
        "decay_fraction": 0.2,
        "k_start": None,
        "k_anneal_steps": 0,
        "resample_every": None,
        "route": "fused",
        "device": "auto",
        "normalize_activations": "sqrt_d",
        "init_b_dec": "geometric_median",
        "seed": 0,
        "data_seed": None,
        "on_nonfinite": "stop",
        "log_every": 10,
        "cuda_graph": True,
    }
    assert OptimizerConfig().to_dict() == {
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "clip_norm": None,
        "compute": "auto",
        "adam": "dense",
        "master_weights": "float32",
        "moment_dtype": "float32",
        "compute_copies": "both",
    }
    assert ObjectiveConfig().to_dict() == {
        "loss": "fvu",
        "sparsity": "none",
        "sparsity_coefficient": 0.0,
        "sparsity_warmup_steps": None,
        "sparsity_norm_weighted": False,
        "target_l0": None,
        "tanh_scale": 4.0,
        "p_end": 0.2,
        "p_steps": 10,
        "p_start": 0.25,
        "auxk_alpha": 1 / 32,
        "k_aux": None,
        "auxk_latents": 4096,
        "dead_after_tokens": 10_000_000,
    }


@pytest.mark.parametrize(
    ("n_latents", "peak"), [(2**14, 2e-4), (2**16, 1e-4), (2**12, 4e-4), (2**20, 2.5e-5)]
)
def test_the_default_peak_follows_the_scaling_law(n_latents: int, peak: float) -> None:
    for steps in (30_000, 10**6):
        config = TrainConfig(steps=steps)
        assert config.learning_rate(steps // 2, n_latents) == pytest.approx(peak, rel=1e-15)


@pytest.mark.parametrize(
    ("steps", "n_latents", "peak"),
    [
        (29_999, 2**14, 2e-4),
        (7500, 2**14, 4e-4),
        (300, 2**14, 2e-3),
        (3, 2**14, 0.01),  # and no more
        (300, 4, 2e-4 * 2**6),  # what is more already stays
    ],
)
def test_short_runs_have_a_larger_default_peak(steps: int, n_latents: int, peak: float) -> None:
    config = TrainConfig(steps=steps, warmup_steps=0)
    assert config.learning_rate(0, n_latents) == pytest.approx(peak, rel=1e-4)


def test_the_schedule_rises_stays_and_falls_to_zero() -> None:
    config = TrainConfig(steps=1000, lr=1.0, warmup_steps=100, decay_fraction=0.25)
    rates = [config.learning_rate(i, 7) for i in range(1001)]
    for i in range(100):
        assert rates[i] == pytest.approx((i + 1) / 100, rel=1e-12)
    assert rates[99:751] == [1.0] * 652
    for i in range(750, 1001):
        assert rates[i] == pytest.approx((1000 - i) / 250, rel=1e-12)
    assert rates[999] > 0 == rates[1000]  # the last step still learns


@pytest.mark.parametrize(
    ("steps", "warmup"), [(100_000, 1000), (20_000, 1000), (4000, 200), (100, 5), (19, 0)]
)
def test_default_warmup(steps: int, warmup: int) -> None:
    """1000 steps, at most a twentieth of the run."""
    config = TrainConfig(steps=steps, lr=1.0)
    if warmup:
        assert config.learning_rate(0, 1) == pytest.approx(1 / warmup)
        assert config.learning_rate(warmup - 1, 1) == 1.0
        assert warmup == 1 or config.learning_rate(warmup - 2, 1) < 1.0
    else:
        assert config.learning_rate(0, 1) == 1.0


@pytest.mark.parametrize(
    ("options", "rates"),
    [
        ({"decay_fraction": 0.0, "warmup_steps": 0}, [1, 1, 1, 1]),
        ({"decay_fraction": 1.0, "warmup_steps": 0}, [1, 0.75, 0.5, 0.25]),
        ({"decay_fraction": 1.0, "warmup_steps": 4}, [0.25, 0.5, 0.5, 0.25]),  # the lower wins
        ({"decay_fraction": 0.0, "warmup_steps": 8}, [0.125, 0.25, 0.375, 0.5]),
    ],
    ids=["flat", "all-decay", "overlap", "warmup-beyond-the-run"],
)
def test_schedule_extremes(options: dict[str, Any], rates: list[float]) -> None:
    config = TrainConfig(steps=4, lr=1.0, **options)
    assert [config.learning_rate(i, 1) for i in range(4)] == pytest.approx(rates)


def test_k_falls_linearly_and_stays() -> None:
    config = TrainConfig(k_start=100, k_anneal_steps=10)
    assert [config.k_at(i, 50) for i in range(13)] == [100, 95, 90, 85, 80, 75, 70, 65, 60, 55] + [
        50
    ] * 3
    assert [TrainConfig(k_start=2, k_anneal_steps=2).k_at(i, 4) for i in range(3)] == [2, 3, 4]
    assert TrainConfig().k_at(0, 7) == 7
    assert TrainConfig(k_start=9).k_at(0, 7) == 7  # no steps to anneal over


NAN, INF = math.nan, math.inf
WHOLE = {1: "a positive integer", 0: "an integer of at least 0"}
BAD: list[tuple[str, Any, str]] = [
    *(
        (name, value, WHOLE[least])
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("warmup_steps", 0),
            ("k_aux", 1),
            ("auxk_latents", 1),
            ("dead_after_tokens", 1),
            ("k_start", 1),
            ("k_anneal_steps", 0),
            ("seed", 0),
            ("log_every", 1),
        )
        for value in (least - 1, 1.5, "3", True)
    ),
    *(
        (name, value, "a positive number")
        for name in ("lr", "clip_norm", "eps")
        for value in (0, -1.0, NAN, INF, "1e-3", True)
    ),
    *((name, v, "a number in [0, 1)") for name in ("beta1", "beta2") for v in (-0.1, 1, NAN, "0")),
    *(("decay_fraction", value, "a number in [0, 1]") for value in (-0.1, 1.1, NAN, None)),
    *(("auxk_alpha", value, "a number of at least 0") for value in (-1e-9, INF, NAN, None)),
    ("steps", None, "a positive integer"),
    ("eps", None, "a positive number"),
    ("multi_topk", 1, "true or false"),
    ("loss", "l2", "one of fvu, mse"),
    ("sparsity", "l0", "one of none, l1, lp, tanh"),
    ("compute", "float64", "one of auto, float32, bfloat16, float16"),
    ("route", "fast", "one of fused, autograd"),
    ("adam", ["dense"], "one of dense, lazy"),
    ("normalize_activations", 2.0, "one of none, sqrt_d"),
    ("init_b_dec", None, "one of geometric_median, mean, zeros"),
    ("on_nonfinite", "ignore", "one of stop, skip"),
    ("device", 0, "a name"),
    ("master_weights", "bfloat16", "one of float32, split"),
    ("moment_dtype", "float16", "one of float32, bfloat16"),
    ("compute_copies", "decoder", "one of both, encoder"),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), BAD, ids=[f"{name}={value!r}" for name, value, _ in BAD]
)
def test_bad_values_are_named(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        TrainConfig.of(TopKObjective, **{name: value})
    assert str(error.value) == f"{name}: expected {expected}, got {value!r}"


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("adam", "lazy", "dense"),
        ("master_weights", "split", "float32"),
        ("moment_dtype", "bfloat16", "float32"),
        ("compute_copies", "encoder", "both"),
    ],
)
def test_what_torchs_adam_cannot_do_is_refused_on_its_route(
    name: str, value: str, needed: str
) -> None:
    optimizer = OptimizerConfig(**{name: value})
    with pytest.raises(ValueError, match=f"{name}: expected '{needed}' with route 'autograd'"):
        TrainConfig(optimizer=optimizer, route="autograd")
    with pytest.raises(ValueError, match=f"{name}: expected '{needed}' with route 'autograd'"):
        AutogradStep(TopKSAE(4, 8, k=2), optimizer=optimizer)


def test_whole_numbers_are_numbers() -> None:
    config = TrainConfig.of(TopKObjective, lr=1, clip_norm=2, auxk_alpha=0, decay_fraction=1)
    assert (config.lr, config.optimizer.clip_norm) == (1, 2)


def test_a_config_can_be_rebuilt_from_its_dict() -> None:
    config = TrainConfig(steps=3, lr=1e-3, k_start=4, k_anneal_steps=2)
    assert TrainConfig(**config.to_dict()) == config


def test_a_setting_that_nobody_has_is_named_with_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"unknown setting 'clip_nrm'; did you mean 'clip_norm'\?"):
        TrainConfig.of(TopKObjective, clip_nrm=1.0)


def test_no_name_stands_in_two_of_the_parts() -> None:
    """Flags and keyword arguments are one list of names."""
    for sae in architectures().values():
        parts = (sae.config_class, sae.objective_class, OptimizerConfig, TrainConfig, DataConfig)
        names = [field.name for part in parts for field in dataclasses.fields(part)]
        assert len(names) == len(set(names)), sae


def test_every_setting_has_words_and_help_shows_them() -> None:
    for sae in architectures().values():
        for part in (sae.config_class, sae.objective_class, OptimizerConfig, DataConfig):
            said = declared(part)
            assert all(each.words for each in said.values()), part
    assert "multi_topk: add 1/8 of the FVU of a second reconstruction" in (
        TopKObjective.__doc__ or ""
    )
    # An override of a default keeps words and limits.
    assert declared(ReLUObjective)["loss"].words == declared(ObjectiveConfig)["loss"].words
    with pytest.raises(ValueError, match="sparsity_coefficient: expected a number of at least 0"):
        ReLUObjective(sparsity_coefficient=-1.0)
