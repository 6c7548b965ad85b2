"""SAELens' format: exact round trips, its own formulas on what we write, and SAELens itself."""

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
    tokens,
)
from saelens_files import CONFIGS, EVERY, FREE, PLACE, RAW_THRESHOLD, their_formula
from safetensors.torch import load_file

from sae_kernels import nn
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
PARAMETERS = pytest.mark.parametrize("config", EVERY.values(), ids=EVERY)


def written(folder: Path, config: SAEConfig) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The files of an SAE as their plain contents."""
    write_saelens(folder, config, exact_tensors(config), PLACE)
    cfg = json.loads((folder / "cfg.json").read_text())
    return cfg, load_file(folder / "sae_weights.safetensors")


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
