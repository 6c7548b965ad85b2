"""TopKConfig refuses what it cannot mean."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sae_kernels.nn import TopKConfig

GOOD = {"d_in": 4, "n_latents": 16, "k": 2}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_in": 0}, "d_in: expected a positive integer, got 0"),
        ({"n_latents": -3}, "n_latents: expected a positive integer, got -3"),
        ({"k": 2.0}, "k: expected a positive integer, got 2.0"),
        ({"k": True}, "k: expected a positive integer, got True"),
        ({"k": 17}, "k: expected at most n_latents = 16, got 17"),
        ({"relu": "never"}, "relu: expected one of after, before, none, got 'never'"),
        ({"relu": ["after"]}, "relu: expected one of after, before, none, got ['after']"),
        ({"subtract_b_dec": "yes"}, "subtract_b_dec: expected true or false, got 'yes'"),
        (
            {"by_magnitude": True},
            "relu: expected 'none' with by_magnitude (codes keep signs), got 'after'",
        ),
        ({"rank_by_decoder_norm": 1}, "rank_by_decoder_norm: expected true or false, got 1"),
        ({"unit_norm_decoder": None}, "unit_norm_decoder: expected true or false, got None"),
        *(
            (
                {"activation_scale": s},
                f"activation_scale: expected a positive finite number, got {s!r}",
            )
            for s in (0, -1.0, float("nan"), float("inf"), "2", None, True)
        ),
    ],
    ids=lambda v: str(v)[:40] if isinstance(v, dict) else "",
)
def test_bad_values_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        TopKConfig(**{**GOOD, **changes})
    assert str(error.value) == message


def test_defaults() -> None:
    assert TopKConfig(4, 64).to_dict() == {
        "d_in": 4,
        "n_latents": 64,
        "k": 32,
        "d_out": None,
        "n_layers": 1,
        "skip": False,
        "decoder_norm": "joint",
        "target_scale": 1.0,
        "groups": None,
        "subtract_b_dec": True,
        "relu": "after",
        "by_magnitude": False,
        "rank_by_decoder_norm": False,
        "unit_norm_decoder": True,
        "activation_scale": 1.0,
    }


def test_survives_json() -> None:
    config = TopKConfig(
        4, 16, 2, "none", True, (4, 12), subtract_b_dec=False, activation_scale=0.1 + 0.2
    )
    assert TopKConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({**GOOD, "n_latent": 1}, "config: unknown key 'n_latent'; did you mean 'n_latents'?"),
        ({**GOOD, "decoder_unit_norm": 1}, "config: unknown key 'decoder_unit_norm'; "),
        ({**GOOD, "zzz": 1}, "config: unknown key 'zzz'; known are d_in, n_latents, d_out, "),
        ({"n_latents": 4}, "config: expected the key 'd_in', it is not there"),
        ({"d_in": 4}, "config: expected the key 'n_latents', it is not there"),
    ],
    ids=["near-name", "far-name", "no-near-name", "no-d_in", "no-n_latents"],
)
def test_from_dict_names_wrong_keys(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        TopKConfig.from_dict(values)
    assert str(error.value).startswith(message)
