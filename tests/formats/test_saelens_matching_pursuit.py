"""SAELens' matching pursuit folders: its function on them, both ways, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from foreign import refuses
from safetensors.torch import load_file, save_file

import sae_kernels as sk
from sae_kernels.formats import Weights, read, write
from sae_kernels.nn import MatchingPursuitConfig, MatchingPursuitSAE
from sae_kernels.testing.dense_pursuit import dense_pursuit

if TYPE_CHECKING:
    from pathlib import Path

D, F = 6, 20
PLACE = {"activations": {"model": "gpt2", "hook_name": "blocks.3.hook_resid_mid"}}


def theirs(folder: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """A folder as sae-lens 6.54.12 writes it: no encoder, as it is W_dec; its tensors."""
    g = torch.Generator().manual_seed(0)
    rows = torch.nn.functional.normalize(torch.randn(F, D, generator=g), dim=1)
    tensors = {"W_dec": 0.9 * rows, "b_dec": 0.3 * torch.randn(D, generator=g)}
    settings = {
        "architecture": "matching_pursuit",
        "d_in": D,
        "d_sae": F,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "residual_threshold": 0.2,
        "max_iterations": None,
        "stop_on_duplicate_support": True,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_mid"},
    }
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(settings | changes))
    save_file(tensors, folder / "sae_weights.safetensors")
    return tensors


@pytest.mark.parametrize(
    ("changes", "k", "options"),
    [
        ({}, D, {"residual_threshold": 0.2}),
        ({"max_iterations": 3}, 3, {"residual_threshold": 0.2}),
        (
            {"stop_on_duplicate_support": False, "residual_threshold": 0.0, "max_iterations": 15},
            15,
            {"stop_on_repeat": False},
        ),
    ],
)
def test_their_files_are_their_function(
    tmp_path: Path, changes: dict[str, Any], k: int, options: dict[str, Any]
) -> None:
    tensors = {name: t.double() for name, t in theirs(tmp_path, **changes).items()}
    sae, x = sk.load(tmp_path, dtype=torch.float64), torch.randn(30, D, dtype=torch.float64)
    codes = dense_pursuit(x, tensors["W_dec"], tensors["b_dec"], k, **options)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes)
    torch.testing.assert_close(sae(x).x_hat, codes @ tensors["W_dec"] + tensors["b_dec"])


def test_a_bias_that_is_not_applied_is_none(tmp_path: Path) -> None:
    tensors = theirs(tmp_path, apply_b_dec_to_input=False)
    sae, x = sk.load(tmp_path), torch.randn(30, D)
    codes = dense_pursuit(x, tensors["W_dec"], torch.zeros(D), D, residual_threshold=0.2)
    torch.testing.assert_close(sae.encode(x).to_dense(), codes)
    torch.testing.assert_close(sae(x).x_hat, codes @ tensors["W_dec"])


def test_a_file_without_their_settings_has_their_defaults(tmp_path: Path) -> None:
    theirs(tmp_path)
    path = tmp_path / "cfg.json"
    own = ("residual_threshold", "max_iterations", "stop_on_duplicate_support")
    values = {n: v for n, v in json.loads(path.read_text()).items() if n not in own}
    path.write_text(json.dumps(values))
    expected = MatchingPursuitConfig(D, F, D, residual_threshold=0.01, unit_norm_decoder=False)
    assert read(tmp_path).config == expected


def test_read_and_written_again_they_are_the_same(tmp_path: Path) -> None:
    tensors = theirs(tmp_path / "first", max_iterations=4)
    weights = read(tmp_path / "first")
    write(tmp_path / "again", weights, "saelens")
    assert read(tmp_path / "again").config == weights.config
    found = load_file(tmp_path / "again" / "sae_weights.safetensors")
    assert sorted(found) == ["W_dec", "b_dec"]
    assert all(torch.equal(found[name], tensors[name]) for name in found)
    first, again = (
        json.loads((tmp_path / name / "cfg.json").read_text()) for name in ("first", "again")
    )
    del first["metadata"], again["metadata"]
    assert again == first


def test_ours_with_a_scale_is_the_same_function_there(tmp_path: Path) -> None:
    sae = MatchingPursuitSAE(D, F, k=4, residual_threshold=0.5, activation_scale=0.25).eval()
    write(tmp_path, Weights(sae.config, sae.state_dict(), PLACE), "saelens")
    assert json.loads((tmp_path / "cfg.json").read_text())["residual_threshold"] == 2.0
    x = 4 * torch.randn(30, D)
    torch.testing.assert_close(sk.load(tmp_path)(x).x_hat, sae(x).x_hat)


@pytest.mark.parametrize("to", ["sparsify", "dictionary_learning", "circuit_tracer"])
def test_other_formats_do_not_have_it(tmp_path: Path, to: str) -> None:
    sae = MatchingPursuitSAE(D, F, k=4)
    place = {"activations": {**PLACE["activations"], "hook_name_out": "blocks.3.hook_mlp_out"}}
    weights = Weights(sae.config, sae.state_dict(), place)
    refuses(lambda: write(tmp_path, weights, to), "MatchingPursuitConfig", error=ValueError)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"max_iterations": 0}, ("cfg.json: k: expected a positive integer, got 0",)),
        ({"residual_threshold": "x"}, ("residual_threshold: expected a number", "got 'x'")),
        ({"stop_on_duplicate_support": 1}, ("expected true or false, got 1",)),
        ({"normalize_activations": "covariance_whitening"}, ("no whitening of", "pursuit SAE's")),
    ],
)
def test_settings_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], parts: tuple[str, ...]
) -> None:
    theirs(tmp_path, **changes)
    refuses(lambda: read(tmp_path), *parts)


def test_a_factor_of_latents_is_refused(tmp_path: Path) -> None:
    """Times the decoder it would be the encoder's too."""
    tensors = theirs(tmp_path)
    save_file({**tensors, "scaling_factor": torch.ones(F)}, tmp_path / "sae_weights.safetensors")
    refuses(lambda: read(tmp_path), "expected no tensors but W_dec, b_dec, got 'scaling_factor'")
