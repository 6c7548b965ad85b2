"""What is refused of SAELens' format: settings that we cannot read, SAEs that it cannot hold."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from foreign import F64, D, F, K, exact_tensors, refuses
from saelens_files import CFG, RAW_THRESHOLD, plain, save

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

pytestmark = pytest.mark.filterwarnings("ignore:SAELens. hook_name:UserWarning")

CFGS: dict[str, tuple[Any, list[str]]] = {
    "architecture": (
        {"architecture": "spiral"},
        ["expected one of standard, topk", "got 'spiral'"],
    ),
    "temporal": (
        {"architecture": "temporal"},
        ["SAELens' architecture 'temporal', which sae_kernels does not have (it has standard, "],
    ),
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
    save(tmp_path, CFG | changes, plain())
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
