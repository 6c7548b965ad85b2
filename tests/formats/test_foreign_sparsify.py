"""sparsify's format: exact round trips, its own formula on the files, what it cannot hold."""

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

from sae_kernels import nn
from sae_kernels.formats import read_sparsify, write_sparsify
from sae_kernels.nn import BatchTopKConfig, SAEConfig, TopKConfig

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

SAE = TopKConfig(D, F, k=K, relu="before")
CONFIGS = {
    "sae": SAE,
    "free decoder": TopKConfig(D, F, k=K, relu="before", unit_norm_decoder=False),
    "transcoder": TopKConfig(D, F, k=K, relu="before", d_out=D, subtract_b_dec=False),
    "skip": TopKConfig(D, F, k=K, relu="before", d_out=D, skip=True, subtract_b_dec=False),
}
PARAMETERS = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def their_formula(cfg: dict[str, Any], tensors: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """SparseCoder on its own layout, in fp64."""
    w = wide(tensors)
    centred = x if cfg["transcode"] else x - w["b_dec"]
    h = (centred @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    codes = keep_largest(h, h, cfg["k"])
    y = codes @ w["W_dec"] + w["b_dec"]
    return codes, y + x @ w["W_skip"].T if cfg["skip_connection"] else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, F64], ids=str)
@PARAMETERS
def test_a_round_trip_is_bitwise(tmp_path: Path, config: SAEConfig, dtype: torch.dtype) -> None:
    tensors = exact_tensors(config, dtype=dtype)
    write_sparsify(tmp_path / "run" / "layers.5", config, tensors)
    assert_weights(read_sparsify(tmp_path / "run" / "layers.5"), config, tensors)
    assert sorted(p.name for p in (tmp_path / "run" / "layers.5").iterdir()) == [
        "cfg.json",
        "sae.safetensors",
    ]


@PARAMETERS
def test_their_formula_gives_our_codes(tmp_path: Path, config: SAEConfig) -> None:
    tensors, x = exact_tensors(config), tokens(config)
    write_sparsify(tmp_path, config, tensors)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    theirs = their_formula(cfg, load_file(tmp_path / "sae.safetensors"), x)
    assert_same(config, x, tensors, formula(config, tensors, x), theirs)
    sae = nn.from_weights(*read_sparsify(tmp_path)[:2])
    out = sae(x.float())
    assert torch.equal(out.codes.to_dense().to(F64), theirs[0])
    assert torch.equal(out.x_hat.to(F64), theirs[1])


def test_the_layout(tmp_path: Path) -> None:
    config = CONFIGS["skip"]
    tensors = exact_tensors(config)
    write_sparsify(tmp_path, config, tensors)
    assert_equal_tensors(
        dict(sorted(load_file(tmp_path / "sae.safetensors").items())),
        {
            "W_dec": tensors["W_dec"],
            "W_skip": tensors["W_skip"],
            "b_dec": tensors["b_dec"],
            "encoder.bias": tensors["b_enc"],
            "encoder.weight": tensors["W_enc"],
        },
    )
    assert json.loads((tmp_path / "cfg.json").read_text()) == {
        "activation": "topk",
        "expansion_factor": 3,
        "normalize_decoder": True,
        "num_latents": F,
        "k": K,
        "multi_topk": False,
        "skip_connection": True,
        "transcode": True,
        "d_in": D,
    }


def test_relu_after_the_selection_is_the_same_function(tmp_path: Path) -> None:
    config = TopKConfig(D, F, k=K, groups=(4, 12))
    tensors = exact_tensors(config)
    write_sparsify(tmp_path, config, tensors)
    assert_weights(read_sparsify(tmp_path), SAE, tensors)


# -- what sparsify writes --------------------------------------------------------------------------


def _save(folder: Path, cfg: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> None:
    ours = exact_tensors(SAE) if tensors is None else tensors
    theirs = {"W_enc": "encoder.weight", "b_enc": "encoder.bias"}
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(cfg))
    save_file({theirs.get(n, n): t for n, t in ours.items()}, folder / "sae.safetensors")


def test_num_latents_0_is_the_expansion_factor(tmp_path: Path) -> None:
    config = TopKConfig(D, 4 * D, k=2, relu="before")
    cfg = {"d_in": D, "num_latents": 0, "expansion_factor": 4, "k": 2}
    _save(tmp_path, cfg, exact_tensors(config))
    assert_weights(read_sparsify(tmp_path), config, exact_tensors(config))
    config = TopKConfig(D, 32 * D, k=32, relu="before")
    _save(tmp_path, {"d_in": D}, exact_tensors(config))
    assert read_sparsify(tmp_path).config == config


def test_old_and_unknown_keys_are_tolerated(tmp_path: Path) -> None:
    cfg = {"d_in": D, "num_latents": F, "k": K, "signed": False, "multi_topk": True, "jump": 1}
    _save(tmp_path, cfg)
    assert read_sparsify(tmp_path).config == SAE


CFG = {"d_in": D, "num_latents": F, "k": K}
CFGS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "groupmax": ({"activation": "groupmax"}, ["expected 'topk', got 'groupmax'", "k groups"]),
    "signed": ({"signed": True}, ["signed: expected false, got true", "magnitude"]),
    "skip-alone": (
        {"skip_connection": True},
        ["skip_connection: expected false without tr"],
    ),
    "no-width": ({"d_in": None}, ["d_in: expected an integer of at least 0, got None"]),
    "flag": ({"transcode": "no"}, ["transcode: expected true or false, got 'no'"]),
    "k": ({"k": 99}, ["k: expected at most n_latents = 16, got 99"]),
    "lying": ({"d_in": 7}, ["encoder.weight: expected [16, 7], got [16, 6]"]),
    "skip-missing": (
        {"transcode": True, "skip_connection": True},
        ["expected a tensor W_skip [6, 6], got W_dec, b_dec, encoder.bias, encoder.weight"],
    ),
}


@pytest.mark.parametrize(("changes", "parts"), CFGS.values(), ids=CFGS)
def test_configurations_that_are_refused(
    tmp_path: Path, changes: dict[str, Any], parts: list[str]
) -> None:
    _save(tmp_path, CFG | changes)
    refuses(lambda: read_sparsify(tmp_path), str(tmp_path), *parts)


def _topk(**options: Any) -> TopKConfig:
    return TopKConfig(D, F, k=K, **options)


UNWRITABLE: dict[str, tuple[SAEConfig, list[str]]] = {
    "batchtopk": (BatchTopKConfig(D, F, k=K), ["expected a TopK SAE, got BatchTopKConfig"]),
    "negative-codes": (_topk(relu="none"), ["relu 'before' or 'after', got 'none'"]),
    "ranked": (_topk(rank_by_decoder_norm=True), ["rank_by_decoder_norm false", "W_enc and b_enc"]),
    "widths": (_topk(d_out=5, subtract_b_dec=False), ["d_out = d_in = 6, got 5"]),
    "not-centred": (_topk(subtract_b_dec=False), ["subtract_b_dec true", "W_enc b_dec to b_enc"]),
    "scale": (_topk(activation_scale=3), ["activation_scale 1, got 3", "sae.folded()"]),
    "crosscoder": (_topk(n_layers=2), ["n_layers 1, got 2"]),
}


@pytest.mark.parametrize(("config", "parts"), UNWRITABLE.values(), ids=UNWRITABLE)
def test_what_cannot_be_written_leaves_no_folder(
    tmp_path: Path, config: SAEConfig, parts: list[str]
) -> None:
    folder = tmp_path / "new"
    refuses(lambda: write_sparsify(folder, config, exact_tensors(config)), *parts, error=ValueError)
    assert not folder.exists()


# -- the real thing --------------------------------------------------------------------------------


@PARAMETERS
def test_sparsify_itself_agrees(
    tmp_path: Path, config: SAEConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64, where nothing is rounded."""
    monkeypatch.setenv("SPARSIFY_DISABLE_TRITON", "1")
    module = pytest.importorskip("sparsify.sparse_coder", reason="needs the package eai-sparsify")
    tensors, x = exact_tensors(config, dtype=F64), tokens(config)
    write_sparsify(tmp_path / "ours", config, tensors)
    coder = module.SparseCoder.load_from_disk(tmp_path / "ours")
    with torch.no_grad():
        top = coder.encode(x)
        codes = torch.zeros(len(x), F, dtype=F64).scatter(1, top.top_indices, top.top_acts)
        y = coder(x).sae_out
    assert_same(config, x, tensors, formula(config, tensors, x), (codes, y))
    coder.save_to_disk(tmp_path / "theirs")
    assert_weights(read_sparsify(tmp_path / "theirs"), config, tensors)
