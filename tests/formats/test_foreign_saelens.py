"""SAELens' format: exact round trips, its own formulas on the files, what it cannot hold."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from foreign import (
    F64,
    D,
    F,
    K,
    assert_equal_tensors,
    assert_same,
    assert_weights,
    exact_tensors,
    formula,
    keep_largest,
    refuses,
    tokens,
    wide,
)
from safetensors.torch import load_file, save_file

from sae_kernels import formats, nn
from sae_kernels.formats import read_saelens, write_saelens
from sae_kernels.nn import (
    BatchTopKConfig,
    GatedConfig,
    JumpReLUConfig,
    ReLUConfig,
    SAEConfig,
    TopKConfig,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

# Most of what is written here names no hook.
pytestmark = pytest.mark.filterwarnings("ignore:SAELens. hook_name:UserWarning")
FREE: dict[str, Any] = {"unit_norm_decoder": False}
RAW: dict[str, Any] = {"unit_norm_decoder": False, "subtract_b_dec": False}
SIGNED: dict[str, Any] = {"relu": "none", "by_magnitude": True}
RAW_THRESHOLD: dict[str, Any] = {"log_threshold": False}

# What comes back as it went: SAELens' own words for everything that matters after training.
CONFIGS: dict[str, SAEConfig] = {
    "standard": ReLUConfig(D, F, **FREE),
    "standard, input as it is": ReLUConfig(D, F, **RAW),
    "topk": TopKConfig(D, F, k=K, **FREE),
    "topk ranked by norms": TopKConfig(D, F, k=K, rank_by_decoder_norm=True, **RAW),
    "abstopk": TopKConfig(D, F, k=K, **SIGNED, **FREE),
    "abstopk, input as it is": TopKConfig(D, F, k=K, **SIGNED, **RAW),
    "abstopk ranked by norms": TopKConfig(D, F, k=K, rank_by_decoder_norm=True, **SIGNED, **FREE),
    "jumprelu": JumpReLUConfig(D, F, **RAW_THRESHOLD, **FREE),
    "gated": GatedConfig(D, F, **FREE),
    "gated, input as it is": GatedConfig(D, F, **RAW),
    "transcoder": ReLUConfig(D, F, d_out=9, **RAW),
    "skip_transcoder": ReLUConfig(D, F, d_out=9, skip=True, **RAW),
    "jumprelu_transcoder": JumpReLUConfig(D, F, d_out=D, **RAW_THRESHOLD, **RAW),
    "jumprelu_skip_transcoder": JumpReLUConfig(D, F, d_out=5, skip=True, **RAW_THRESHOLD, **RAW),
}
# What becomes something else of the same function.
OTHERS: dict[str, SAEConfig] = {
    "jumprelu from logarithms": JumpReLUConfig(D, F, **FREE),
    "jumprelu from batchtopk": BatchTopKConfig(D, F, k=2.5, **FREE),
    "jumprelu from ranked batchtopk": BatchTopKConfig(D, F, k=K, rank_by_decoder_norm=True),
    "jumprelu from nested groups": JumpReLUConfig(D, F, groups=(4, 12), **RAW_THRESHOLD),
    "jumprelu from groups": BatchTopKConfig(D, F, k=K, groups=(4, 12)),
    "jumprelu_transcoder from batchtopk": BatchTopKConfig(D, F, k=K, d_out=7, **RAW),
    "jumprelu_skip_transcoder from batchtopk": BatchTopKConfig(
        D, F, k=K, skip=True, rank_by_decoder_norm=True, **RAW
    ),
    "topk with its relu before": TopKConfig(D, F, k=K, relu="before", groups=(8, 8)),
}
EVERY = CONFIGS | OTHERS
PLACE = {
    "activations": {
        "model": "gpt2",
        "hook_name": "blocks.3.hook_resid_mid",
        "hook_name_out": "blocks.3.hook_mlp_out",
    }
}
PARAMETERS = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)


def written(folder: Path, config: SAEConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The files of an SAE as their plain contents."""
    write_saelens(folder, config, exact_tensors(config), PLACE)
    cfg = json.loads((folder / "cfg.json").read_text())
    return cfg, load_file(folder / "sae_weights.safetensors")


def their_formula(cfg: dict[str, Any], tensors: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """SAELens' classes on its own layout, in fp64."""
    w = wide(tensors)
    kind = cfg["architecture"]
    centred = x - w["b_dec"] if cfg["apply_b_dec_to_input"] else x
    norms = w["W_dec"].norm(dim=-1)
    if kind == "gated":
        gate = centred @ w["W_enc"] + w["b_gate"] > 0
        codes = gate * (centred @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
        return codes, codes @ w["W_dec"] + w["b_dec"]
    h = centred @ w["W_enc"] + w["b_enc"]
    if kind in ("topk", "abstopk"):
        h = h * norms if cfg["rescale_acts_by_decoder_norm"] else h
        if kind == "topk":
            codes = keep_largest(h, h, cfg["k"]).relu()
        else:
            codes = keep_largest(h, h.abs(), cfg["k"])
        codes = codes / norms if cfg["rescale_acts_by_decoder_norm"] else codes
    elif kind.startswith("jumprelu"):
        codes = h.relu() * (h > w["threshold"])
    else:
        codes = h.relu()
    y = codes @ w["W_dec"] + w["b_dec"]
    return codes, y + x @ w["W_skip"].T if "skip" in kind else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_round_trip_is_bitwise(tmp_path: Path, config: SAEConfig, dtype: torch.dtype) -> None:
    tensors = exact_tensors(config, dtype=dtype)
    write_saelens(tmp_path / "a" / "b", config, tensors, PLACE)
    came = read_saelens(tmp_path / "a" / "b")
    assert_weights(came, config, tensors)
    assert came.metadata["activations"] == PLACE["activations"]
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "cfg.json",
        "sae_weights.safetensors",
    ]


@PARAMETERS
def test_their_formula_gives_our_codes(tmp_path: Path, config: SAEConfig) -> None:
    cfg, theirs = written(tmp_path, config)
    assert cfg["architecture"] == next(n for n in EVERY if EVERY[n] is config).split()[0].strip(",")
    tensors, x = exact_tensors(config), tokens(config)
    assert_same(config, x, tensors, formula(config, tensors, x), their_formula(cfg, theirs, x))


@PARAMETERS
def test_a_module_of_what_was_read_gives_the_same(tmp_path: Path, config: SAEConfig) -> None:
    cfg, theirs = written(tmp_path, config)
    came = read_saelens(tmp_path)
    x = tokens(config)
    codes, y = their_formula(cfg, theirs, x)
    sae = nn.from_weights(came.config, came.tensors)
    out = sae(x.float())
    if isinstance(config, GatedConfig):  # rounded in fp32 there: its own tests have the budget
        assert torch.equal(out.codes.to_dense() > 0, codes > 0)
    else:
        assert torch.equal(out.codes.to_dense().to(F64), codes)
        assert torch.equal(out.x_hat.to(F64), y)


def test_the_layout(tmp_path: Path) -> None:
    """Orientation and keys, spelled out."""
    config = ReLUConfig(D, F, d_out=9, skip=True, subtract_b_dec=False)
    tensors = exact_tensors(config)
    cfg, theirs = written(tmp_path, config)
    assert_equal_tensors(
        dict(sorted(theirs.items())),
        {
            "W_dec": tensors["W_dec"],
            "W_enc": tensors["W_enc"].T.contiguous(),
            "W_skip": tensors["W_skip"],
            "b_dec": tensors["b_dec"],
            "b_enc": tensors["b_enc"],
        },
    )
    assert cfg.pop("metadata")["sae_lens_version"] == "6.0.0"
    assert cfg == {
        "architecture": "skip_transcoder",
        "d_in": D,
        "d_sae": F,
        "d_out": 9,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
    }


def test_what_came_back_from_batch_topk_is_jumprelu(tmp_path: Path) -> None:
    config = BatchTopKConfig(D, F, k=2.5, unit_norm_decoder=False)
    tensors = exact_tensors(config)
    write_saelens(tmp_path, config, tensors)
    expected = {n: t for n, t in tensors.items() if n != "threshold"}
    expected["threshold"] = tensors["threshold"].float().expand(F).contiguous()
    assert_weights(read_saelens(tmp_path), JumpReLUConfig(D, F, **RAW_THRESHOLD, **FREE), expected)


@pytest.mark.parametrize("theta", [0.1, 0.7, 1 / 3, 1e-50, 2.0**-140 / 3, 1e30, 1.0, 0.0])
def test_a_threshold_keeps_every_fp32_value_on_its_side(tmp_path: Path, theta: float) -> None:
    config = BatchTopKConfig(D, F, k=2)
    tensors = exact_tensors(config) | {"threshold": torch.tensor(theta, dtype=F64)}
    write_saelens(tmp_path, config, tensors)
    (threshold,) = load_file(tmp_path / "sae_weights.safetensors")["threshold"].unique()
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    near = torch.tensor(theta)
    for value in (near, torch.nextafter(near, up), torch.nextafter(near, down)):
        assert bool(value > threshold) == bool(value.double() > theta)


def test_a_dead_row_that_norms_rank_stays_silent(tmp_path: Path) -> None:
    config = BatchTopKConfig(D, F, k=2, rank_by_decoder_norm=True)
    tensors = exact_tensors(config)
    tensors["W_dec"][3] = 0
    write_saelens(tmp_path, config, tensors)
    threshold = read_saelens(tmp_path).tensors["threshold"]
    assert threshold[3] == torch.finfo(torch.float32).max
    assert torch.equal(
        threshold[4], (tensors["threshold"] / tensors["W_dec"][4].double().norm()).float()
    )


# -- what SAELens writes and we do not -------------------------------------------------------------


def _save(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """As SAELens lays it out."""
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({n: t.contiguous() for n, t in tensors.items()}, folder / "sae_weights.safetensors")


def _plain() -> dict[str, Tensor]:
    ours = exact_tensors(ReLUConfig(D, F))
    return ours | {"W_enc": ours["W_enc"].T}


CFG = {"architecture": "standard", "d_in": D, "d_sae": F, "dtype": "float32"}


def test_a_training_run_s_batchtopk(tmp_path: Path) -> None:
    cfg = CFG | {
        "architecture": "matryoshka_batchtopk",
        "k": 2.5,
        "rescale_acts_by_decoder_norm": True,
        "matryoshka_widths": [4, 10],
    }
    _save(tmp_path, cfg, _plain() | {"topk_threshold": torch.tensor(1 / 3, dtype=F64)})
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
    _save(tmp_path, CFG | {"architecture": "jumprelu"}, _plain() | {"log_threshold": log})
    came = read_saelens(tmp_path)
    assert isinstance(came.config, JumpReLUConfig)
    assert came.config.log_threshold
    assert torch.equal(came.tensors["log_threshold"], log)


def test_a_training_run_s_scale(tmp_path: Path) -> None:
    _save(tmp_path, CFG | {"normalize_activations": "expected_average_only_in"}, _plain())
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
    s, x, w = 4, tokens(came.config), wide(_plain())
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
    _save(tmp_path, CFG, _plain())
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
    _save(tmp_path, cfg, tensors | {"W_enc": tensors["W_enc"].T})
    came = read_saelens(tmp_path, activation_scale=4.0)
    x, w = tokens(config), wide(tensors)
    y = (x @ (w["W_enc"] * 4).T + w["b_enc"]).relu() @ (w["W_dec"] / 4) + w["b_dec"] / 4
    assert torch.equal(nn.from_weights(*came[:2]).double()(x).x_hat, y)
    assert torch.equal(nn.from_weights(*came[:2]).double().folded()(x).x_hat, y)


def test_a_negative_threshold_is_zero_under_their_relu(tmp_path: Path) -> None:
    threshold = torch.linspace(-200, 300, F)
    _save(tmp_path, CFG | {"architecture": "jumprelu"}, _plain() | {"threshold": threshold})
    came = read_saelens(tmp_path)
    assert torch.equal(came.tensors["threshold"], threshold.clamp(min=0))
    cfg = CFG | {"architecture": "jumprelu", "apply_b_dec_to_input": True}
    x = tokens(came.config)
    theirs = their_formula(cfg, _plain() | {"threshold": threshold}, x)
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
    _save(tmp_path, cfg, _plain())
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
    _save(tmp_path, cfg, _plain() | {"scaling_factor": factor})
    came = read_saelens(tmp_path)
    x = tokens(came.config)
    codes, _ = their_formula(cfg, _plain(), x)
    w = wide(_plain())
    theirs = codes, (codes * factor) @ w["W_dec"] + w["b_dec"]
    assert_same(came.config, x, came.tensors, formula(came.config, came.tensors, x), theirs)

    _save(tmp_path, CFG, _plain() | {"scaling_factor": factor})
    refuses(lambda: read_saelens(tmp_path), "scaling_factor: expected ones where cfg.json")
    _save(tmp_path, CFG, _plain() | {"scaling_factor": torch.ones(F)})
    assert torch.equal(read_saelens(tmp_path).tensors["W_dec"], _plain()["W_dec"])
    _save(tmp_path, cfg, _plain() | {"scaling_factor": torch.ones(1)})
    refuses(lambda: read_saelens(tmp_path), "scaling_factor: expected [16], got [1]")


def test_a_file_of_several_dtypes_gets_the_widest(tmp_path: Path) -> None:
    half = {n: t.bfloat16() for n, t in _plain().items()}
    mixed = half | {"W_dec": half["W_dec"].half(), "threshold": torch.rand(F, dtype=F64)}
    _save(tmp_path, CFG | {"architecture": "jumprelu"}, mixed)
    came = read_saelens(tmp_path).tensors
    assert {t.dtype for t in came.values()} == {torch.float32}
    assert (came["threshold"].double() <= mixed["threshold"]).all()
    assert torch.equal(came["threshold"], mixed["threshold"].float()) is False, "it was rounded up"


# -- refusals --------------------------------------------------------------------------------------

CFGS: dict[str, tuple[Any, list[str]]] = {
    "architecture": (
        {"architecture": "spiral"},
        ["expected one of standard, topk", "got 'spiral'"],
    ),
    **{
        name: (
            {"architecture": name},
            [f"SAELens' architecture '{name}', which sae_kernels does not have (it has standard, "],
        )
        for name in ("temporal",)
    },
    "architecture-a-list": ({"architecture": []}, ["architecture: expected one of", "got []"]),
    "tanh": ({"activation_fn_str": "tanh-relu"}, ["got 'standard with tanh-relu'"]),
    "topk-without-k": ({"activation_fn_str": "topk"}, ["k: expected a positive integer, got None"]),
    "layer-norm": (
        {"normalize_activations": "layer_norm"},
        ["normalize_activations: expected 'none', got 'layer_norm'", "every activation by itself"],
    ),
    "hook-z": (
        {"reshape_activations": "hook_z"},
        ["reshape_activations: expected 'none'", "heads"],
    ),
    "old-hook-z": (
        {"hook_point": "blocks.0.attn.hook_z"},
        ["reshape_activations: expected 'none'"],
    ),
    "no-width": ({"d_sae": None}, ["d_sae: expected an integer of at least 0, got None"]),
    "width-a-string": ({"d_in": "6"}, ["d_in: expected an integer of at least 0, got '6'"]),
    "zero": ({"d_in": 0}, ["d_in: expected a positive integer, got 0"]),
    "flag": ({"apply_b_dec_to_input": 1}, ["apply_b_dec_to_input: expected true or false, got 1"]),
    "metadata": ({"metadata": [1]}, ["metadata: expected an object, got [1]"]),
    "lying": ({"d_sae": 17}, ["W_enc: expected [6, 17], got [6, 16]"]),
    "lying-absurdly": ({"d_sae": 10**40}, ["n_latents: expected a number of at most 63 bits"]),
    "other-architecture": ({"architecture": "gated"}, ["expected a tensor b_gate [16]"]),
    "transcoder-without-d-out": ({"architecture": "transcoder"}, ["d_out: expected an integer"]),
    "widths": (
        {"architecture": "batchtopk", "k": 2, "matryoshka_widths": "x"},
        ["matryoshka_widths: expected a list of integers, got 'x'"],
    ),
    "widths-descend": (
        {"architecture": "batchtopk", "k": 2, "matryoshka_widths": [9, 3, 16]},
        ["groups: expected positive integers"],
    ),
    "k": ({"architecture": "topk", "k": 99}, ["k: expected at most n_latents = 16, got 99"]),
}


@pytest.mark.parametrize(("changes", "parts"), CFGS.values(), ids=CFGS)
def test_configurations_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    _save(tmp_path, CFG | changes, _plain())
    refuses(lambda: read_saelens(tmp_path), str(tmp_path), *parts)


def _write(config: SAEConfig, **tensors: Tensor) -> Any:
    return lambda: write_saelens("never-made", config, exact_tensors(config) | tensors)


UNWRITABLE: dict[str, tuple[Any, list[str]]] = {
    "scale": (_write(ReLUConfig(D, F, activation_scale=2)), ["activation_scale 1, got 2", "fold"]),
    "target-scale": (
        _write(ReLUConfig(D, F, d_out=5, target_scale=3, subtract_b_dec=False)),
        ["target_scale 1, got 3", "sae.folded()"],
    ),
    "crosscoder": (_write(ReLUConfig(D, F, n_layers=2)), ["n_layers 1, got 2"]),
    "negative-codes": (_write(TopKConfig(D, F, k=K, relu="none")), ["got relu 'none'", "negative"]),
    "topk-transcoder": (
        _write(TopKConfig(D, F, k=K, d_out=D, subtract_b_dec=False)),
        ["expected a ReLU, JumpReLU or BatchTopK transcoder, got topk"],
    ),
    "gated-skip": (
        _write(GatedConfig(D, F, skip=True, subtract_b_dec=False)),
        ["transcoder, got gated"],
    ),
    "unset": (
        _write(BatchTopKConfig(D, F, k=2), threshold=torch.tensor(-1.0, dtype=F64)),
        ["expected a threshold of at least 0, got -1.0", "train"],
    ),
    "negative-threshold": (
        _write(JumpReLUConfig(D, F, **RAW_THRESHOLD), threshold=torch.full((F,), -0.5)),
        ["expected thresholds of at least 0, got -0.5"],
    ),
    "shape": (_write(ReLUConfig(D, F), b_enc=torch.zeros(3)), ["b_enc: expected [16], got [3]"]),
    "nan": (
        _write(ReLUConfig(D, F), b_dec=torch.full((D,), torch.nan)),
        ["b_dec: expected finite"],
    ),
    "extra": (_write(ReLUConfig(D, F), r_mag=torch.ones(F)), ["got 'r_mag' too"]),
}


@pytest.mark.parametrize(("call", "parts"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written_leaves_no_folder(
    tmp_path: Path, call: Any, parts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refuses(call, *parts, error=ValueError)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "metadata", [{"x": {1}}, {"x": float("nan")}, {"saelens": {"metadata": {"x": {1}}}}]
)
def test_metadata_that_json_lacks(tmp_path: Path, metadata: dict[str, Any]) -> None:
    config = ReLUConfig(D, F)
    with pytest.raises((TypeError, ValueError)):
        write_saelens(tmp_path / "new", config, exact_tensors(config), metadata)
    assert not (tmp_path / "new").exists()


# -- the real thing --------------------------------------------------------------------------------


@PARAMETERS
def test_sae_lens_itself_agrees(tmp_path: Path, config: SAEConfig) -> None:
    """In fp64, where nothing is rounded."""
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    tensors, x = exact_tensors(config), tokens(config)
    write_saelens(tmp_path, config, tensors, PLACE)
    sae = sae_lens.SAE.load_from_disk(tmp_path, dtype="float64")
    with torch.no_grad():
        codes, y = sae.encode(x), sae(x)
    if getattr(config, "rank_by_decoder_norm", False) and isinstance(config, TopKConfig):
        codes = codes / tensors["W_dec"].to(F64).norm(dim=1)
    assert_same(config, x, tensors, formula(config, tensors, x), (codes, y))
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_mid"
    # And back: what it saves is what we wrote.
    again = tmp_path / "again"
    sae_lens.SAE.load_from_disk(tmp_path).save_model(again)
    came, before = read_saelens(again), read_saelens(tmp_path)
    assert_weights(came, before.config, before.tensors)


@pytest.mark.parametrize("rescale", [True, False])
def test_a_training_sae_of_sae_lens_is_read(tmp_path: Path, rescale: bool) -> None:
    """Its checkpoint and its export are one function."""
    saes = pytest.importorskip("sae_lens.saes", reason="needs the package sae-lens")
    cfg = saes.MatryoshkaBatchTopKTrainingSAEConfig(
        d_in=D, d_sae=F, k=2.5, matryoshka_widths=[4, F], rescale_acts_by_decoder_norm=rescale
    )
    sae = saes.MatryoshkaBatchTopKTrainingSAE(cfg)
    exact = exact_tensors(BatchTopKConfig(D, F, k=2.5))
    exact["W_enc"] = exact["W_enc"].T.contiguous()
    exact["topk_threshold"] = exact.pop("threshold")
    sae.load_state_dict(exact)
    sae.save_model(tmp_path / "checkpoint")
    sae.save_inference_model(tmp_path / "export")
    checkpoint, export = read_saelens(tmp_path / "checkpoint"), read_saelens(tmp_path / "export")
    assert checkpoint.config.architecture == "batchtopk"
    assert checkpoint.config.groups == (4, 12)  # type: ignore[attr-defined]
    x = tokens(checkpoint.config)
    codes, y = formula(checkpoint.config, checkpoint.tensors, x)
    if rescale:  # the export's norms are folded into its encoder
        codes = codes * checkpoint.tensors["W_dec"].to(F64).norm(dim=1)
    assert_same(export.config, x, None, (codes, y), formula(export.config, export.tensors, x))


@pytest.mark.parametrize("place", [{"layer": "h.1"}, {}], ids=["named", "nameless"])
def test_sae_lens_runs_a_model_with_it_if_it_is_named(tmp_path: Path, place: Any) -> None:
    """The silence that write_saelens warns of is real."""
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    config_class = pytest.importorskip("transformer_lens").HookedTransformerConfig
    settings = {"n_layers": 2, "d_model": D, "n_ctx": 8, "d_head": 3, "n_heads": 2}
    model = sae_lens.HookedSAETransformer(config_class(**settings, d_vocab=9, act_fn="relu"))
    config = TopKConfig(D, F, k=K, **FREE)
    write_saelens(tmp_path, config, exact_tensors(config), {"activations": place})
    sae = sae_lens.SAE.load_from_disk(tmp_path)
    tokens = torch.arange(8)[None]
    with torch.no_grad():
        plain, spliced = model(tokens), model.run_with_saes(tokens, saes=[sae])
    assert torch.equal(plain, spliced) == (not place)
