"""TrainConfig: defaults, schedules and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest

from sae_kernels.config import TrainConfig


def test_defaults() -> None:
    assert TrainConfig().to_dict() == {
        "steps": 1000,
        "batch_size": 2048,
        "lr": None,
        "beta1": 0.9,
        "beta2": 0.999,
        "eps": 1e-8,
        "adam": "dense",
        "warmup_steps": None,
        "decay_fraction": 0.2,
        "clip_norm": None,
        "loss": "fvu",
        "sparsity": "none",
        "sparsity_coefficient": 0.0,
        "sparsity_warmup_steps": None,
        "sparsity_norm_weighted": False,
        "target_l0": None,
        "tanh_scale": 4.0,
        "preact_coefficient": 0.0,
        "p_end": 0.2,
        "p_steps": 10,
        "p_start": 0.25,
        "fix_shrinkage": False,
        "matryoshka": "mean",
        "random_prefixes": 0,
        "balance_coefficient": 0.0,
        "multi_topk": False,
        "auxk_alpha": 1 / 32,
        "k_aux": None,
        "auxk_latents": 4096,
        "dead_after_tokens": 10_000_000,
        "k_start": None,
        "k_anneal_steps": 0,
        "device": "auto",
        "compute": "auto",
        "master": "float32",
        "states": "float32",
        "copies": "both",
        "route": "fused",
        "activation_scale": "sqrt_d",
        "init_b_dec": "geometric_median",
        "seed": 0,
        "data_seed": None,
        "on_nonfinite": "stop",
        "log_every": 10,
    }


@pytest.mark.parametrize(
    ("n_latents", "peak"), [(2**14, 2e-4), (2**16, 1e-4), (2**12, 4e-4), (2**20, 2.5e-5)]
)
def test_the_default_peak_follows_the_scaling_law(n_latents: int, peak: float) -> None:
    config = TrainConfig(steps=10_000)
    assert config.learning_rate(5000, n_latents) == pytest.approx(peak, rel=1e-15)


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
BAD: list[tuple[str, Any, str]] = [
    *(
        (name, value, f"an integer of at least {least}")
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
    ("steps", None, "an integer of at least 1"),
    ("eps", None, "a positive number"),
    ("multi_topk", 1, "true or false"),
    ("loss", "l2", "one of fvu, mse"),
    ("compute", "float64", "one of auto, float32, bfloat16, float16"),
    ("route", "fast", "one of fused, composable"),
    ("adam", ["dense"], "one of dense, lazy"),
    ("activation_scale", 2.0, "one of none, sqrt_d"),
    ("init_b_dec", None, "one of geometric_median, mean, zeros"),
    ("on_nonfinite", "ignore", "one of stop, skip"),
    ("device", 0, "auto or a device such as cuda:0"),
    ("master", "bfloat16", "one of float32, split"),
    ("states", "float16", "one of float32, bfloat16"),
    ("copies", "decoder", "one of both, encoder"),
]


@pytest.mark.parametrize(
    ("name", "value", "expected"), BAD, ids=[f"{name}={value!r}" for name, value, _ in BAD]
)
def test_bad_values_are_named(name: str, value: Any, expected: str) -> None:
    with pytest.raises(ValueError) as error:
        TrainConfig(**{name: value})
    assert str(error.value) == f"{name}: expected {expected}, got {value!r}"


@pytest.mark.parametrize(
    ("name", "value", "needed"),
    [
        ("adam", "lazy", "dense"),
        ("master", "split", "float32"),
        ("states", "bfloat16", "float32"),
    ],
)
def test_what_torchs_adam_cannot_do_is_refused_on_its_route(
    name: str, value: str, needed: str
) -> None:
    TrainConfig(**{name: value})
    with pytest.raises(ValueError, match=f"{name}: expected '{needed}' with route 'composable'"):
        TrainConfig(**{name: value, "route": "composable"})


def test_whole_numbers_are_numbers() -> None:
    assert TrainConfig(lr=1, clip_norm=2, auxk_alpha=0, decay_fraction=1).lr == 1


def test_a_config_can_be_rebuilt_from_its_dict() -> None:
    config = TrainConfig(steps=3, lr=1e-3, loss="mse", k_start=4, k_anneal_steps=2)
    assert TrainConfig(**config.to_dict()) == config
