"""Configurations of every architecture, what they refuse, and where training starts."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    SwitchConfig,
    TopKConfig,
    architecture,
    architectures,
    build,
)
from sae_kernels.testing import (
    assert_bitwise,
)
from tests.nn.modules import CASES, D, F, each, scaled, x_of


@each
def test_configurations_survive_json(config: SAEConfig) -> None:
    for each_scale in (config, scaled(config, 0.1 + 0.2, 1 / 3)):
        values = json.loads(json.dumps(each_scale.to_dict()))
        again = type(config).from_dict(values)
        assert again == each_scale
        assert hash(again) == hash(each_scale)  # a list of groups became a tuple
        assert build(again).config == each_scale


def test_architectures_by_name() -> None:
    own = {"topk", "batchtopk", "gated", "jumprelu", "relu", "switch"}
    assert own <= set(architectures())
    assert next(iter(architectures())) == "topk"
    for config in CASES.values():
        assert architecture(config.architecture).config_class is type(config)


@each
def test_a_seed_names_the_weights(config: SAEConfig) -> None:
    first, again, other = build(config, seed=1), build(config, seed=1), build(config, seed=2)
    for name, t in first.state_dict().items():
        assert_bitwise(name, again.state_dict()[name].reshape(-1), t.reshape(-1))
    assert (other.W_enc != first.W_enc).any()
    assert first(x_of(config, 3)).x_hat.isfinite().all()


def test_where_training_starts() -> None:
    """A copy of the decoder, but a transcoder's decoder cannot be its encoder."""
    for name in ("topk", "gated", "crosscoder"):
        sae = build(CASES[name])
        assert_bitwise(name, sae.W_enc.data, sae.W_dec.data)
        assert sae.W_enc.data_ptr() != sae.W_dec.data_ptr()
    free, unit = build(CASES["transcoder"]), build(CASES["crosscoder-of-transcoders"])
    assert not free.W_dec.any()
    torch.testing.assert_close(unit.decoder_norms(), torch.ones(F, 2))
    torch.testing.assert_close(build(CASES["crosscoder-unit"]).decoder_norms(), torch.ones(F, 3))
    torch.testing.assert_close(build(CASES["crosscoder"]).W_dec.norm(dim=1), torch.ones(F))
    for sae in (free, unit):
        torch.testing.assert_close(sae.W_enc.norm(dim=1), torch.ones(F))
    assert not build(CASES["skip-transcoder"]).W_skip.any()
    thresholds = build(CASES["jumprelu-log"]).thresholds()  # type: ignore[attr-defined]
    torch.testing.assert_close(thresholds, torch.full((F,), 0.5))


def _refused(config: type[SAEConfig], **values: Any) -> str:
    with pytest.raises(ValueError) as error:
        config(**{"d_in": 4, "n_latents": 8, **values})
    return str(error.value)


_LISTS = "groups: expected positive integers that add up to n_latents = 8, got "


@pytest.mark.parametrize("config", [TopKConfig, BatchTopKConfig])
@pytest.mark.parametrize(
    ("groups", "came"),
    [
        ((3, 4), "(3, 4) (7 in all)"),
        ([3, 6], "(3, 6) (9 in all)"),
        ((), "() (no such list)"),
        ((9, -1), "(9, -1) (no such list)"),
        ((4, 0, 4), "(4, 0, 4) (no such list)"),
    ],
)
def test_groups_that_do_not_add_up_are_named(
    config: type[SAEConfig], groups: Any, came: str
) -> None:
    assert _refused(config, k=2, groups=groups) == _LISTS + came


@pytest.mark.parametrize("groups", [(4.0, 4), (True, 7), ("8",)])
def test_groups_that_are_no_integers_are_named(groups: Any) -> None:
    wanted = f"groups: expected a list of integers such as 512,512,1024, got {groups}"
    assert _refused(TopKConfig, k=2, groups=groups) == wanted


@pytest.mark.parametrize(
    ("config", "values", "message"),
    [
        (TopKConfig, {"k": 9}, "k: expected at most n_latents = 8, got 9"),
        (BatchTopKConfig, {"k": 8.5}, "k: expected at most n_latents = 8, got 8.5"),
        (BatchTopKConfig, {"k": 0}, "k: expected a positive number, got 0"),
        (BatchTopKConfig, {"k": float("nan")}, "k: expected a positive number, got nan"),
        (
            BatchTopKConfig,
            {"k": 2, "threshold_rule": "mean"},
            "threshold_rule: expected one of dictionary_learning, sae_lens, got 'mean'",
        ),
        (JumpReLUConfig, {"bandwidth": 0}, "bandwidth: expected a positive number, got 0"),
        (
            JumpReLUConfig,
            {"threshold_init": 0.0},
            "threshold_init: expected a positive number (log_threshold needs its logarithm), got "
            "0.0",
        ),
        (
            JumpReLUConfig,
            {"threshold_init": -0.5, "log_threshold": False},
            "threshold_init: expected a number of at least 0, got -0.5",
        ),
        (GatedConfig, {"frozen_decoder": 1}, "frozen_decoder: expected true or false, got 1"),
        (
            SwitchConfig,
            {"k": 2, "n_experts": 3},
            "n_experts: expected a divisor of n_latents = 8, got 3",
        ),
        *(
            (
                SwitchConfig,
                {"k": 2, "n_experts": n},
                f"n_experts: expected a positive integer, got {n!r}",
            )
            for n in (0, -4, 2.0, True, "4", None)
        ),
        (
            SwitchConfig,
            {"k": 2, "n_experts": 2**62},
            f"n_experts: expected a divisor of n_latents = 8, got {2**62}",
        ),
        (
            SwitchConfig,
            {"k": 3, "n_experts": 4},
            "k: expected at most 2, the latents of one of 4 experts, got 3",
        ),
        (SwitchConfig, {"k": 1.0}, "k: expected a positive integer, got 1.0"),
        (
            SwitchConfig,
            {"k": 1, "gate": "sigmoid"},
            "gate: expected one of softmax, heaviside, got 'sigmoid'",
        ),
        (
            SwitchConfig,
            {"k": 1, "shared_expert": 1},
            "shared_expert: expected true or false, got 1",
        ),
        (
            SwitchConfig,
            {"k": 1, "n_experts": 1, "shared_expert": True},
            "shared_expert: expected false with n_experts = 1, there is none to choose from",
        ),
        (ReLUConfig, {"d_out": 0}, "d_out: expected a positive integer, got 0"),
        (ReLUConfig, {"n_layers": 0}, "n_layers: expected a positive integer, got 0"),
        (ReLUConfig, {"skip": "yes"}, "skip: expected true or false, got 'yes'"),
        (
            ReLUConfig,
            {"decoder_norm": "max"},
            "decoder_norm: expected one of joint, sum, mixed, got 'max'",
        ),
        (
            ReLUConfig,
            {"d_out": 3},
            "subtract_b_dec: expected false where the output is not the input (d_out or skip is "
            "given), got true",
        ),
        (
            ReLUConfig,
            {"skip": True},
            "subtract_b_dec: expected false where the output is not the input (d_out or skip is "
            "given), got true",
        ),
        (
            ReLUConfig,
            {"target_scale": 2.0},
            "target_scale: expected 1 where the input is its own target, got 2.0",
        ),
    ],
)
def test_bad_values_are_named(
    config: type[SAEConfig], values: dict[str, Any], message: str
) -> None:
    assert _refused(config, **values) == message


def test_a_raw_threshold_may_start_at_zero() -> None:
    sae = build(JumpReLUConfig(4, 8, threshold_init=0, log_threshold=False)).eval()
    assert_bitwise("relu", sae.thresholds().data, torch.zeros(8))  # type: ignore[attr-defined]


def test_repr_names_what_is_not_the_default() -> None:
    assert repr(build(CASES["jumprelu-raw"])) == (
        f"JumpReLUSAE(d_in={D}, n_latents={F}, threshold_init=0.5, log_threshold=False)"
    )
    assert "groups=(10, 40)" in repr(build(CASES["matryoshka"]))
