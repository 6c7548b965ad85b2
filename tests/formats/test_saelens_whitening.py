"""SAELens' covariance whitening folded into the weights: its formula, exactly.

The whitening matrix is whole and has a whole inverse, so nothing rounds.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from foreign import F64, D, F, K, assert_same, exact_tensors, formula, refuses, tokens, wide
from saelens_files import FREE, RAW, their_formula
from safetensors.torch import load_file, save_file

import sae_kernels as sk
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

CONFIGS: dict[str, SAEConfig] = {
    "standard": ReLUConfig(D, F, **FREE),
    "standard, input as it is": ReLUConfig(D, F, **RAW),
    "topk": TopKConfig(D, F, k=K, **FREE),
    "topk ranked by norms": TopKConfig(D, F, k=K, rank_by_decoder_norm=True, **FREE),
    "topk ranked, input as it is": TopKConfig(D, F, k=K, rank_by_decoder_norm=True, **RAW),
    "jumprelu": JumpReLUConfig(D, F, log_threshold=False, **FREE),
    "jumprelu, input as it is": JumpReLUConfig(D, F, log_threshold=False, **RAW),
    "gated": GatedConfig(D, F, **FREE),
    "gated, input as it is": GatedConfig(D, F, **RAW),
}
HOOK = {"activations": {"hook_name": "blocks.0.hook_resid_post"}}


def whitening() -> dict[str, torch.Tensor]:
    """A whole matrix of determinant 1, its inverse, and a mean."""
    g = torch.Generator().manual_seed(5)
    upper = torch.randint(-1, 2, (D, D), generator=g).triu(1) + torch.eye(D)
    lower = torch.randint(-1, 2, (D, D), generator=g).tril(-1) + torch.eye(D)
    matrix = (upper @ lower).to(F64)
    inverse = torch.linalg.inv(matrix).round()
    assert torch.equal(inverse @ matrix, torch.eye(D, dtype=F64))
    assert not torch.equal(matrix, matrix.T)
    mean = torch.randint(-9, 10, (D,), generator=g).to(F64)
    return {"mean": mean, "matrix": matrix.contiguous(), "inverse_matrix": inverse.contiguous()}


def whitened(folder: Path, config: SAEConfig) -> tuple[dict[str, Any], Any]:
    """A training checkpoint's folder, as SAELens 6.54.12 lays it out: its settings and tensors."""
    tensors = exact_tensors(config)
    if "r_mag" in tensors:
        tensors["r_mag"].zero_()  # its exponential would round
    write_saelens(folder, config, tensors, HOOK)
    cfg = json.loads((folder / "cfg.json").read_text())
    cfg["normalize_activations"] = "covariance_whitening"
    (folder / "cfg.json").write_text(json.dumps(cfg))
    scaler = {"scaling_factor": None, "has_whitening": True}
    (folder / "activation_scaler.json").write_text(json.dumps(scaler))
    save_file(whitening(), folder / "activation_whitening.safetensors")
    return cfg, load_file(folder / "sae_weights.safetensors")


def theirs(cfg: Any, tensors: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    w = whitening()
    codes, z_hat = their_formula(cfg, tensors, (x - w["mean"]) @ w["matrix"])
    if cfg.get("rescale_acts_by_decoder_norm"):  # their_formula gives our codes
        codes = codes * wide(tensors)["W_dec"].norm(dim=1)
    return codes, z_hat @ w["inverse_matrix"] + w["mean"]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_it_is_the_same_function(tmp_path: Path, config: SAEConfig) -> None:
    cfg, tensors = whitened(tmp_path, config)
    came = read_saelens(tmp_path)
    assert came.config.activation_scale == 1
    assert not getattr(came.config, "rank_by_decoder_norm", False)
    x = tokens(config)
    ours = formula(came.config, came.tensors, x)
    assert_same(came.config, x, came.tensors, ours, theirs(cfg, tensors, x))
    sae = sk.load(tmp_path)
    assert {t.dtype for t in sae.state_dict().values()} == {torch.float32}
    assert all(t.is_contiguous() for t in came.tensors.values())


def test_a_batchtopk_in_training(tmp_path: Path) -> None:
    """Its threshold stays: it is compared with codes times norms before and after."""
    config = BatchTopKConfig(D, F, k=2.5, rank_by_decoder_norm=True, **FREE)
    tensors = exact_tensors(config)
    whitened(tmp_path, TopKConfig(D, F, k=K, rank_by_decoder_norm=True, **FREE))
    cfg = json.loads((tmp_path / "cfg.json").read_text()) | {"architecture": "batchtopk", "k": 2.5}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    stored = {n: t for n, t in tensors.items() if n not in ("threshold", "W_enc")}
    stored |= {"W_enc": tensors["W_enc"].T.contiguous(), "topk_threshold": tensors["threshold"]}
    save_file(stored, tmp_path / "sae_weights.safetensors")
    came = read_saelens(tmp_path)
    x, w = tokens(config), whitening()
    codes, z_hat = formula(config, tensors, (x - w["mean"]) @ w["matrix"])
    codes = codes * wide(tensors)["W_dec"].norm(dim=1)
    expected = codes, z_hat @ w["inverse_matrix"] + w["mean"]
    assert_same(came.config, x, came.tensors, formula(came.config, came.tensors, x), expected)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_sae_lens_itself_folds_it_so(tmp_path: Path, config: SAEConfig) -> None:
    sae_lens = pytest.importorskip("sae_lens", reason="needs the package sae-lens")
    whitened(tmp_path, config)
    sae = sae_lens.SAE.load_from_disk(tmp_path, dtype="float64")
    w = whitening()
    sae.fold_activation_whitening(w["mean"], w["matrix"], w["inverse_matrix"])
    came = read_saelens(tmp_path)
    x = tokens(config)
    with torch.no_grad():
        expected = sae.encode(x), sae(x)
    assert_same(came.config, x, came.tensors, formula(came.config, came.tensors, x), expected)


def test_what_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "activation_whitening.safetensors"
    cfg, _ = whitened(tmp_path, CONFIGS["standard"])
    whole = whitening()
    for wrong, part in (
        (whole | {"mean": torch.zeros(3)}, "mean: expected [6], got [3]"),
        ({n: t for n, t in whole.items() if n != "matrix"}, "expected a tensor matrix [6, 6]"),
        (whole | {"matrix": whole["matrix"] / 0}, "matrix: expected finite numbers"),
        (whole | {"matrix": whole["matrix"] * 2}, "expected the inverse of matrix"),
    ):
        save_file(wrong, path)
        refuses(lambda: read_saelens(tmp_path), "activation_whitening.safetensors", part)
    path.unlink()
    refuses(lambda: read_saelens(tmp_path), "expected the whitening that the SAE's activations go")
    config = ReLUConfig(D, F, d_out=D, **RAW)
    whitened(tmp_path, config)
    refuses(
        lambda: read_saelens(tmp_path),
        "expected no whitening of a transcoder's or a matching pursuit SAE's activations",
    )
    cfg["normalize_activations"] = "constant_scalar_rescale"
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    refuses(lambda: read_saelens(tmp_path), "expected 'none', got 'constant_scalar_rescale'")
