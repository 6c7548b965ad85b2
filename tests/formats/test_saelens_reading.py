"""Files that SAELens writes and we do not: checkpoints of training, scales, old versions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from foreign import F64, D, F, K, assert_same, exact_tensors, formula, refuses, tokens, wide
from saelens_files import CFG, FREE, RAW, plain, save, their_formula

from sae_kernels import formats, nn
from sae_kernels.formats import read_saelens
from sae_kernels.nn import BatchTopKConfig, JumpReLUConfig, ReLUConfig, SAEConfig, TopKConfig

if TYPE_CHECKING:
    from pathlib import Path


def test_a_training_run_s_batchtopk(tmp_path: Path) -> None:
    cfg = CFG | {
        "architecture": "matryoshka_batchtopk",
        "k": 2.5,
        "rescale_acts_by_decoder_norm": True,
        "matryoshka_widths": [4, 10],
    }
    save(tmp_path, cfg, plain() | {"topk_threshold": torch.tensor(1 / 3, dtype=F64)})
    came = read_saelens(tmp_path)
    assert came.config == BatchTopKConfig(
        D,
        F,
        k=2.5,
        rank_by_decoder_norm=True,
        groups=(4, 6, 6),
        threshold_rule="sae_lens",
        unit_norm_decoder=False,
    )
    assert came.tensors["threshold"].dtype == F64
    assert came.tensors["threshold"] == 1 / 3
    cfg["matryoshka_widths"] = [4, 10, F]
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert read_saelens(tmp_path).config == came.config


def test_a_training_run_s_jumprelu(tmp_path: Path) -> None:
    log = torch.randn(F)
    save(tmp_path, CFG | {"architecture": "jumprelu"}, plain() | {"log_threshold": log})
    came = read_saelens(tmp_path)
    assert isinstance(came.config, JumpReLUConfig)
    assert came.config.log_threshold
    assert torch.equal(came.tensors["log_threshold"], log)


def test_a_training_run_s_scale(tmp_path: Path) -> None:
    save(tmp_path, CFG | {"normalize_activations": "expected_average_only_in"}, plain())
    refuses(
        lambda: read_saelens(tmp_path),
        "normalize_activations: expected 'none', got 'expected_average_only_in'",
        "activation_scale (convert: --activation-scale)",
    )
    assert read_saelens(tmp_path, activation_scale=4.0).config.activation_scale == 4
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 4.0}')
    came = read_saelens(tmp_path)
    assert came.config.activation_scale == 4
    # As SAELens folds it in the end: W_enc s, W_dec / s, b_dec / s.
    s, x, w = 4, tokens(came.config), wide(plain())
    h = (x - w["b_dec"] / s) @ (w["W_enc"] * s) + w["b_enc"]
    y = h.relu() @ (w["W_dec"] / s) + w["b_dec"] / s
    assert torch.equal(formula(came.config, came.tensors, x * s)[1] / s, y)
    folded = nn.from_weights(*came[:2]).folded()
    assert folded.config.activation_scale == 1
    for call in (
        lambda: read_saelens(tmp_path, activation_scale=4.0),
        lambda: formats.read(tmp_path, activation_scale=4.0),
    ):
        refuses(call, "activation_scaler.json holds 4.0; got 4.0", error=ValueError)
    save(tmp_path, CFG, plain())
    refuses(
        lambda: read_saelens(tmp_path, activation_scale=4.0),
        "activation_scale: expected none, as",
        "has normalize_activations None; got 4.0",
        error=ValueError,
    )


def test_a_transcoder_s_scale_divides_its_output_too(tmp_path: Path) -> None:
    """SAELens folds the factor as W_enc s, W_dec / s, b_dec / s, whatever the SAE."""
    config = ReLUConfig(D, F, d_out=D, **RAW)
    tensors = exact_tensors(config)
    cfg = CFG | {"architecture": "transcoder", "d_out": D, "apply_b_dec_to_input": False}
    cfg["normalize_activations"] = "expected_average_only_in"
    save(tmp_path, cfg, tensors | {"W_enc": tensors["W_enc"].T})
    came = read_saelens(tmp_path, activation_scale=4.0)
    x, w = tokens(config), wide(tensors)
    y = (x @ (w["W_enc"] * 4).T + w["b_enc"]).relu() @ (w["W_dec"] / 4) + w["b_dec"] / 4
    assert torch.equal(nn.from_weights(*came[:2]).double()(x).x_hat, y)
    assert torch.equal(nn.from_weights(*came[:2]).double().folded()(x).x_hat, y)


def test_a_negative_threshold_is_zero_under_their_relu(tmp_path: Path) -> None:
    threshold = torch.linspace(-200, 300, F)
    save(tmp_path, CFG | {"architecture": "jumprelu"}, plain() | {"threshold": threshold})
    came = read_saelens(tmp_path)
    assert torch.equal(came.tensors["threshold"], threshold.clamp(min=0))
    cfg = CFG | {"architecture": "jumprelu", "apply_b_dec_to_input": True}
    x = tokens(came.config)
    theirs = their_formula(cfg, plain() | {"threshold": threshold}, x)
    assert_same(came.config, x, came.tensors, formula(came.config, came.tensors, x), theirs)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ReLUConfig(D, F, **FREE)),
        ({"activation_fn": "relu", "normalize_activations": False}, ReLUConfig(D, F, **FREE)),
        ({"activation_fn_str": "relu", "normalize_activations": None}, ReLUConfig(D, F, **FREE)),
        ({"apply_b_dec_to_input": False}, ReLUConfig(D, F, **RAW)),
        (
            {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
            TopKConfig(D, F, k=K, **FREE),
        ),
        (
            {"activation_fn": "topk", "activation_fn_kwargs": {"k": K}, "architecture": "standard"},
            TopKConfig(D, F, k=K, **FREE),
        ),
    ],
)
def test_configurations_before_version_6(
    tmp_path: Path, changes: dict[str, Any], expected: SAEConfig
) -> None:
    cfg: dict[str, Any] = {
        "d_in": D,
        "d_sae": F,
        "dtype": "torch.float32",
        "device": "cuda",
        "model_name": "pythia-70m",
        "hook_point": "blocks.3.hook_resid_post",
        "hook_point_layer": 3,
        "hook_point_head_index": None,
        "expansion_factor": 4,
        "l1_coefficient": 1e-3,
        **changes,
    }
    save(tmp_path, cfg, plain())
    came = read_saelens(tmp_path)
    assert came.config == expected
    assert came.metadata["activations"] == {
        "model": "pythia-70m",
        "hook_name": "blocks.3.hook_resid_post",
    }
    own = came.metadata["saelens"]
    assert own["metadata"] == {
        "model_name": "pythia-70m",
        "hook_name": "blocks.3.hook_resid_post",
        "hook_layer": 3,
    }
    assert (own["expansion_factor"], own["l1_coefficient"]) == (4, 1e-3)


def test_a_scaling_factor_multiplies_what_is_decoded(tmp_path: Path) -> None:
    factor = torch.tensor([0.5, 1, 2, 4]).repeat(F // 4)
    cfg = CFG | {"finetuning_scaling_factor": True, "apply_b_dec_to_input": True}
    save(tmp_path, cfg, plain() | {"scaling_factor": factor})
    came = read_saelens(tmp_path)
    x = tokens(came.config)
    codes, _ = their_formula(cfg, plain(), x)
    w = wide(plain())
    theirs = codes, (codes * factor) @ w["W_dec"] + w["b_dec"]
    assert_same(came.config, x, came.tensors, formula(came.config, came.tensors, x), theirs)

    save(tmp_path, CFG, plain() | {"scaling_factor": factor})
    refuses(lambda: read_saelens(tmp_path), "scaling_factor: expected ones where cfg.json")
    save(tmp_path, CFG, plain() | {"scaling_factor": torch.ones(F)})
    assert torch.equal(read_saelens(tmp_path).tensors["W_dec"], plain()["W_dec"])
    save(tmp_path, cfg, plain() | {"scaling_factor": torch.ones(1)})
    refuses(lambda: read_saelens(tmp_path), "scaling_factor: expected [16], got [1]")


def test_a_file_of_several_dtypes_gets_the_widest(tmp_path: Path) -> None:
    half = {n: t.bfloat16() for n, t in plain().items()}
    mixed = half | {"W_dec": half["W_dec"].half(), "threshold": torch.rand(F, dtype=F64)}
    save(tmp_path, CFG | {"architecture": "jumprelu"}, mixed)
    came = read_saelens(tmp_path).tensors
    assert {t.dtype for t in came.values()} == {torch.float32}
    assert (came["threshold"].double() <= mixed["threshold"]).all()
    assert torch.equal(came["threshold"], mixed["threshold"].float()) is False, "it was rounded up"
