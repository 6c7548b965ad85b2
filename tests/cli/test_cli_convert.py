"""``convert``: every format that is read into every one that is written, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels import formats, nn

if TYPE_CHECKING:
    from pathlib import Path

D, F, K = 6, 16, 3


def _sae(config: nn.SAEConfig) -> nn.SparseAutoencoder:
    sae = nn.build(config, seed=1).eval()
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            parameter.copy_(
                torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2))
            )
    return sae


@pytest.fixture
def native(tmp_path: Path) -> Path:
    _sae(nn.TopKConfig(D, F, k=K)).save_pretrained(tmp_path / "native")
    return tmp_path / "native"


def _x_hat(folder: Path) -> torch.Tensor:
    """What the SAE in a folder of any format makes of some tokens."""
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(3))
    if formats.detect(folder) == "native":
        return nn.SparseAutoencoder.from_pretrained(folder)(x).x_hat
    config, tensors, _ = formats.read(folder)
    return nn.from_weights(config, tensors)(x).x_hat


def test_a_round_of_all_formats_keeps_the_function(run, native, tmp_path):
    folder = native
    tools = ("saelens", "sparsify", "dictionary_learning")
    for to in (*tools, "native", *reversed(tools), "native"):
        out = tmp_path / f"{folder.name}-{to}"
        ran = run("convert", folder, out, "--to", to)
        assert ran.code == 0, ran.err
        assert ran.out == f"topk, 6 to 16 latents in float32: {out} ({to}, from {_kind(folder)})\n"
        assert formats.detect(out) == to
        assert torch.equal(_x_hat(out), _x_hat(native))
        folder = out


def _kind(folder: Path) -> str:
    return folder.name.split("-")[-1]


@pytest.mark.parametrize(
    "config",
    [
        nn.JumpReLUConfig(D, F, log_threshold=False),
        nn.GatedConfig(D, F),
        nn.ReLUConfig(D, F, d_out=9, skip=True, subtract_b_dec=False),
    ],
    ids=lambda config: config.architecture,
)
def test_saelens_holds_the_other_architectures(run, tmp_path, config):
    _sae(config).save_pretrained(tmp_path / "a")
    assert run("convert", tmp_path / "a", tmp_path / "b", "--to", "saelens").code == 0
    assert run("convert", tmp_path / "b", tmp_path / "c", "--to", "native").code == 0
    assert torch.equal(_x_hat(tmp_path / "c"), _x_hat(tmp_path / "a"))


def test_json(run, native, tmp_path):
    ran = run("convert", native, tmp_path / "out", "--to", "sparsify", "--json")
    assert ran.records() == [
        {
            "from": "native",
            "to": "sparsify",
            "architecture": "topk",
            "d_in": D,
            "n_latents": F,
            "dtype": "float32",
            "folder": str(tmp_path / "out"),
        }
    ]


def test_metadata_goes_along(run, native, tmp_path):
    config, tensors = nn.TopKConfig(D, F, k=K), _sae(nn.TopKConfig(D, F, k=K)).state_dict()
    place = {"activations": {"hook_name": "blocks.1.hook_mlp_out"}}
    formats.write_saelens(tmp_path / "a", config, tensors, place)
    ran = run("convert", tmp_path / "a", tmp_path / "b", "--to", "saelens")
    assert (ran.code, ran.err) == (0, "")
    assert formats.read(tmp_path / "b").metadata["activations"] == place["activations"]


def test_from_settles_what_the_files_leave_open(run, native, tmp_path):
    formats.write_sparsify(
        native, nn.TopKConfig(D, F, k=2), _sae(nn.TopKConfig(D, F, k=2)).state_dict()
    )
    assert (
        "those of native and sparsify"
        in run("convert", native, tmp_path / "x", "--to", "saelens").refusal()
    )
    arguments: list[Any] = ["convert", native, tmp_path / "x", "--to", "saelens"]
    assert run(*arguments, "--from", "sparsify").code == 0
    assert formats.read(tmp_path / "x").config.k == 2


def test_overwrite_replaces_a_folder_of_the_same_format(run, native, tmp_path):
    out = tmp_path / "out"
    arguments = ["convert", native, out, "--to", "saelens"]
    assert run(*arguments).code == 0
    assert "expected a new or an empty folder" in run(*arguments).refusal()
    assert run(*arguments, "--overwrite").code == 0
    other = run("convert", native, out, "--to", "sparsify", "--overwrite").refusal()
    assert "expected no SAE of another format, got saelens" in other
    assert sorted(path.name for path in out.iterdir()) == ["cfg.json", "sae_weights.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--to", "sae_lens"], "--to: got 'sae_lens'; did you mean 'saelens'?"),
        (["--to", "gemma_scope"], "--to: got 'gemma_scope'; known are native, saelens, sparsify"),
        (
            ["--to", "saelens", "--from", "x"],
            "--from: got 'x'; known are native, saelens, sparsify",
        ),
    ],
)
def test_formats_that_are_not_there(run, native, tmp_path, arguments, part):
    assert part in run("convert", native, tmp_path / "out", *arguments).refusal()
    assert not (tmp_path / "out").exists()


def test_sources_that_are_not_there(run, tmp_path):
    out = tmp_path / "out"
    missing = run("convert", tmp_path / "no", out, "--to", "native").refusal()
    assert "expected a folder with a saved SAE" in missing
    (tmp_path / "empty").mkdir()
    empty = run("convert", tmp_path / "empty", out, "--to", "native").refusal()
    assert "expected the files of a saved SAE" in empty
    assert not out.exists()


def test_an_sae_without_an_encoder_of_its_own(run, tmp_path):
    nn.MatchingPursuitSAE(D, F, k=3).save_pretrained(tmp_path / "a")
    ran = run("convert", tmp_path / "a", tmp_path / "b", "--to", "saelens", "--hook-name", "x")
    assert ran.code == 0
    assert formats.read(tmp_path / "b").config.k == 3


def test_an_sae_that_the_format_lacks(run, tmp_path):
    _sae(nn.GatedConfig(D, F)).save_pretrained(tmp_path / "a")
    ran = run("convert", tmp_path / "a", tmp_path / "b", "--to", "sparsify")
    assert "expected a TopK SAE, got GatedConfig" in ran.refusal()
    assert not (tmp_path / "b").exists()


# -- names, layers and scales ----------------------------------------------------------------------

HOOKS = {"hook_name": "blocks.{}.mlp.hook_in", "hook_name_out": "blocks.{}.hook_mlp_out"}


def test_saelens_s_silence_is_a_warning_that_names_the_flag(run, native, tmp_path):
    ran = run("convert", native, tmp_path / "a", "--to", "saelens")
    assert ran.code == 0
    assert ran.err == (
        "sae-kernels: warning: SAELens: hook_name not known: it would run the model without this "
        "SAE and say so in its log alone; name it with --hook-name, as blocks.6.hook_resid_post\n"
    )
    named = ("--hook-name", "blocks.1.hook_resid_pre", "--model-name", "gpt2")
    ran = run("convert", tmp_path / "a", tmp_path / "b", "--to", "saelens", *named)
    assert (ran.code, ran.err) == (0, "")
    metadata = formats.read(tmp_path / "b").metadata
    assert metadata["activations"] == {"model": "gpt2", "hook_name": "blocks.1.hook_resid_pre"}
    # It also repairs one of ours, and stays through the next one.
    assert run("convert", tmp_path / "b", tmp_path / "c", "--to", "native").code == 0
    assert formats.read(tmp_path / "c").metadata["activations"] == metadata["activations"]


def _transcoders(folder: Path, n: int) -> list[Path]:
    config = nn.ReLUConfig(D, F, d_out=D, subtract_b_dec=False)
    for i in range(n):
        sae = nn.build(config, seed=i)
        sae.metadata = {"activations": {"model": "gpt2", "layer": f"h.{i}.mlp"}}
        sae.save_pretrained(folder / f"h.{i}.mlp")
    return [folder / f"h.{i}.mlp" for i in range(n)]


def test_several_transcoders_make_a_set(run, tmp_path):
    saes = _transcoders(tmp_path / "saes", 3)
    flags = ("--hook-name", HOOKS["hook_name"], "--hook-name-out", HOOKS["hook_name_out"])
    flags = tuple(flag.replace("{}", "{layer}") for flag in flags)
    ran = run("convert", *saes, tmp_path / "set", "--to", "circuit_tracer", *flags)
    assert ran.code == 0, ran.err
    assert ran.out.count(f"relu, 6 to 16 latents in float32: {tmp_path / 'set'}") == 3
    for i, folder in enumerate(saes):
        out = tmp_path / f"back-{i}"
        assert run("convert", tmp_path / "set", out, "--to", "native", "--layer", i).code == 0
        assert torch.equal(_x_hat(out), _x_hat(folder))
        place = formats.read(out).metadata["activations"]
        assert place["hook_name"] == HOOKS["hook_name"].format(i)
    said = run("convert", tmp_path / "set", tmp_path / "x", "--to", "native").refusal()
    assert "got a folder with 3 of them: layer_0.safetensors (relu, 6 to 16)" in said
    assert not (tmp_path / "x").exists()


def test_several_are_a_set_alone(run, native, tmp_path):
    said = run("convert", native, native, tmp_path / "x", "--to", "saelens").refusal()
    assert "SRC: expected one with --to saelens, got 2" in said
    flags = ("--hook-name", "blocks.{layer}.hook_resid_mid")
    said = run("convert", native, tmp_path / "x", "--to", "saelens", *flags).refusal()
    assert "expected a file that says its layer" in said
    assert not (tmp_path / "x").exists()


def test_a_factor_that_the_folder_lacks(run, native, tmp_path):
    formats.write_saelens(
        tmp_path / "a", nn.TopKConfig(D, F, k=K), _sae(nn.TopKConfig(D, F, k=K)).state_dict()
    )
    cfg = json.loads((tmp_path / "a" / "cfg.json").read_text())
    cfg["normalize_activations"] = "expected_average_only_in"
    (tmp_path / "a" / "cfg.json").write_text(json.dumps(cfg))
    said = run("convert", tmp_path / "a", tmp_path / "x", "--to", "native").refusal()
    assert "--activation-scale" in said
    for to in ("native", "sparsify"):
        out = tmp_path / f"as-{to}"
        ran = run("convert", tmp_path / "a", out, "--to", to, "--activation-scale", 4)
        assert ran.code == 0, ran.err
    assert torch.equal(_x_hat(tmp_path / "as-native"), _x_hat(tmp_path / "as-sparsify"))
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(3))
    expected = nn.SparseAutoencoder.from_pretrained(native)(x * 4).x_hat / 4
    torch.testing.assert_close(_x_hat(tmp_path / "as-native"), expected)
    said = run("convert", native, tmp_path / "x", "--to", "sparsify", "--activation-scale", 4)
    assert "activation_scale: expected none for the format native" in said.refusal()
