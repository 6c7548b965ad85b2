"""Thresholds of +inf are read and written in every format that has thresholds; others are not."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from foreign import D, F, assert_equal_tensors, assert_weights, exact_tensors, refuses, tokens

import sae_kernels as sk
from sae_kernels.formats import Weights, read, write
from sae_kernels.nn import BatchTopKConfig, JumpReLUConfig, SAEConfig

if TYPE_CHECKING:
    from pathlib import Path

RAW: dict[str, Any] = {"subtract_b_dec": False, "unit_norm_decoder": False}
SAE = JumpReLUConfig(D, F, log_threshold=False, **RAW)
TRANSCODER = JumpReLUConfig(D, F, log_threshold=False, d_out=D, **RAW)
PLACE = {"hook_name": "blocks.0.mlp.hook_in", "hook_name_out": "blocks.0.hook_mlp_out"}
CONFIGS: dict[str, SAEConfig] = {
    "native": SAE,
    "saelens": SAE,
    "dictionary_learning": JumpReLUConfig(D, F, log_threshold=False, subtract_b_dec=False),
    "circuit_tracer": TRANSCODER,
    "gemma_scope": JumpReLUConfig(D, F, log_threshold=False, subtract_b_dec=False),
}


def save(folder: Path, format: str, tensors: Any) -> None:
    if format == "gemma_scope":
        folder.mkdir(exist_ok=True)
        arrays = {n: np.asarray(t) for n, t in (tensors | {"W_enc": tensors["W_enc"].T}).items()}
        np.savez(folder / "params.npz", **arrays)
    else:
        write(folder, Weights(CONFIGS[format], tensors, {"activations": PLACE}), format)


def silenced(config: SAEConfig, name: str = "threshold") -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = exact_tensors(config)
    tensors[name][::3] = math.inf
    return tensors


@pytest.mark.parametrize("format", CONFIGS)
def test_a_latent_that_never_fires(tmp_path: Path, format: str) -> None:
    tensors = silenced(CONFIGS[format])
    save(tmp_path, format, tensors)
    came = read(tmp_path)
    assert_weights(came, CONFIGS[format], tensors)
    codes = sk.load(tmp_path)(tokens(came.config).float()).codes.to_dense()
    assert codes.isfinite().all()
    assert not codes[:, ::3].any()
    assert codes.any()


@pytest.mark.parametrize("bad", [-math.inf, math.nan])
@pytest.mark.parametrize("format", [name for name in CONFIGS if name != "native"])
def test_other_numbers_that_are_not_finite(tmp_path: Path, format: str, bad: float) -> None:
    tensors = exact_tensors(CONFIGS[format])
    for name, expected in (("threshold", "threshold: expected finite"), ("b_enc", "b_enc: expe")):
        broken = tensors | {name: tensors[name].clone()}
        broken[name][2] = bad
        if format == "gemma_scope":
            save(tmp_path, format, broken)
            refuses(lambda: read(tmp_path), expected)
        else:
            refuses(lambda b=broken: save(tmp_path / "new", format, b), expected, error=ValueError)


def test_logarithms_are_written_as_thresholds(tmp_path: Path) -> None:
    config = JumpReLUConfig(D, F, **RAW)
    tensors = silenced(config, "log_threshold")
    expected = tensors["log_threshold"].exp()
    for format in ("saelens", "dictionary_learning"):
        write(tmp_path / format, Weights(config, tensors, {"activations": PLACE}), format)
        came = read(tmp_path / format).tensors["threshold"]
        assert_equal_tensors({"threshold": came}, {"threshold": expected})


def test_the_one_threshold_of_batchtopk_is_finite(tmp_path: Path) -> None:
    """An SAE none of whose latents ever fires is a damaged one."""
    config = BatchTopKConfig(D, F, k=2)
    tensors = exact_tensors(config) | {"threshold": torch.tensor(math.inf, dtype=torch.float64)}
    for format in ("saelens", "dictionary_learning"):
        refuses(
            lambda f=format: write(tmp_path / f, Weights(config, tensors, {}), f),
            "threshold: expected finite numbers",
        )
