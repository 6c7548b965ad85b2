"""``train --arch``: every architecture from the command line, and what does not go together."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from sae_kernels.config.toml import read_tables
from sae_kernels.data import ShardWriter
from sae_kernels.nn import (
    JumpReLUObjective,
    SparseAutoencoder,
    TopKObjective,
    nested_groups,
    presets,
)
from sae_kernels.training.run_config import NESTED_TABLES, setting_classes

D_IN, TOKENS = 8, 600  # of the data fixture
PRESETS = presets()
QUICK = ["--steps", 4, "--batch-size", 64, "--n-latents", 32, "--log-every", 2]


def _write(folder, width, seed, rows=TOKENS):
    with ShardWriter(folder, width, rows_per_shard=250) as writer:
        writer.write(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)))
    return folder


@pytest.fixture
def second(tmp_path):
    """Another layer of the same tokens."""
    return _write(tmp_path / "second", D_IN, 1)


@pytest.fixture
def outputs(tmp_path):
    """What a transcoder is to reconstruct, of another width."""
    return _write(tmp_path / "outputs", 5, 2)


def _flags(name):
    k = ["--k", 4] if hasattr(PRESETS[name].sae.config_class, "k") else []
    return ["--arch", name, *k, *QUICK]


def _settings(folder):
    return read_tables(folder / "run.toml")


@pytest.mark.parametrize("name", PRESETS)
def test_every_architecture_trains(run, data, second, outputs, tmp_path, name):
    out = tmp_path / "run"
    kind = PRESETS[name].preset.data
    inputs = [data, second] if kind in ("layers", "targets") else [data]
    target = ["--target", outputs] * len(inputs) if kind in ("target", "targets") else []
    ran = run("train", *inputs, *target, "--out", out, *_flags(name), "--json", "--verify")
    assert ran.code == 0, ran.err
    *lines, result = ran.records()
    assert [line["step"] for line in lines] == [2, 4]
    assert result["steps"] == 4
    sae = SparseAutoencoder.from_pretrained(result["sae"])
    kind, preset = PRESETS[name]
    assert type(sae) is kind
    config = sae.config
    assert (config.d_in, config.n_latents) == (D_IN, 32)
    assert config.n_layers == len(inputs)
    assert config.d_out == (5 if target else None)
    for table in ("objective", "optimizer"):
        used = _settings(out)[table]
        assert all(used[key] == value for key, value in getattr(preset, table).items())
    for key, value in preset.sae.items():
        assert getattr(config, key) == (nested_groups(32) if key == "groups" else value)


def test_without_a_name_it_is_topk(run, data, tmp_path):
    assert run("train", data, "--out", tmp_path / "run", *QUICK, "--k", 4).code == 0
    sae = SparseAutoencoder.from_pretrained(tmp_path / "run" / "sae")
    assert sae.config.architecture == "topk"


def test_the_file_names_the_architecture_and_the_flag_comes_first(run, data, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        'arch = "jumprelu"\n[sae]\nbandwidth = 0.25\n[objective]\nsparsity = "l0"\n'
        "sparsity_coefficient = 0.5\n[train]\nsteps = 2\nbatch_size = 32\n"
    )
    out = tmp_path / "run"
    assert run("train", data, "--out", out, "--config", config).code == 0
    sae = SparseAutoencoder.from_pretrained(out / "sae")
    assert sae.config.architecture == "jumprelu"
    assert sae.config.bandwidth == 0.25
    used = _settings(out)["objective"]
    assert (used["sparsity"], used["sparsity_coefficient"]) == ("l0", 0.5)
    # What the file does not say is the architecture's own, and not what TopK has.
    assert used["auxk_alpha"] == JumpReLUObjective.auxk_alpha != TopKObjective.auxk_alpha
    ran = run("train", data, "--out", tmp_path / "other", "--config", config, "--arch", "relu")
    assert "bandwidth: no setting of architecture 'relu'" in ran.refusal()


def test_flags_come_before_what_the_architecture_brings(run, data, tmp_path):
    out = tmp_path / "run"
    flags = ["--arch", "relu", "--sparsity-coefficient", 0.25, "--loss", "fvu", *QUICK]
    assert run("train", data, "--out", out, *flags).code == 0
    used = _settings(out)["objective"]
    assert (used["sparsity"], used["sparsity_coefficient"], used["loss"]) == ("l1", 0.25, "fvu")


def test_groups_from_a_flag_and_from_a_file(run, data, tmp_path):
    flags = ["--arch", "matryoshka", "--k", 4, *QUICK]
    out = tmp_path / "flag"
    assert run("train", data, "--out", out, *flags, "--groups", "4,4,24").code == 0
    assert _settings(out)["sae"]["groups"] == [4, 4, 24]
    config = tmp_path / "config.toml"
    config.write_text("[sae]\ngroups = [16, 16]\n")
    out = tmp_path / "file"
    assert run("train", data, "--out", out, *flags, "--config", config).code == 0
    assert _settings(out)["sae"]["groups"] == [16, 16]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--arch", "topkk"], "got 'topkk'; did you mean 'topk'?"),
        (["--arch", "jump_relu"], "got 'jump_relu'; did you mean 'jumprelu'?"),
        (["--arch", "zzz"], "arch: expected a preset, got 'zzz'; known are topk, abstopk, "),
        (
            ["--arch", "relu", "--k", 4],
            "k: no setting of architecture 'relu', which has d_in, n_latents, ",
        ),
        (["--arch", "topk", "--bandwidth", 0.1], "bandwidth: no setting of architecture 'topk'"),
        (["--arch", "gated", "--groups", "16,16"], "groups: no setting of architecture 'gated'"),
        (["--frozen-decoder"], "frozen_decoder: no setting of architecture 'topk'"),
        (
            ["--arch", "relu", "--sparsity", "l0"],
            "sparsity: expected one of none, l1, lp, tanh, got 'l0'",
        ),
        (
            ["--arch", "batchtopk", "--multi-topk"],
            "multi_topk: no setting of the objective",
        ),
        (
            ["--arch", "matryoshka", "--groups", "16,8"],
            "groups: expected positive integers that add up to n_latents = 32, got (16, 8) (24 in "
            "all)",
        ),
        (
            ["--arch", "matryoshka", "--groups", "16;16"],
            "groups: expected a list of integers such as 512,512,1024, got '16;16'",
        ),
        (["--arch", "topk", "--k", 4.5], "k: expected a positive integer, got 4.5"),
        (["--arch", "skip_transcoder"], "--target: expected the activations that the transcoder"),
        (["--d-out", 5, "--no-subtract-b-dec"], "--target: expected the activations that the"),
        (["--n-layers", 2], "n_layers: expected activations of 2 layers of d_in 8 side by side"),
    ],
)
def test_what_does_not_go_together_is_refused(run, data, tmp_path, flags, expected):
    ran = run("train", data, "--out", tmp_path / "run", *QUICK, *flags)
    assert expected in ran.refusal()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", [n for n in PRESETS if "target" not in PRESETS[n].preset.data])
def test_a_target_belongs_to_a_transcoder(run, data, outputs, tmp_path, name):
    ran = run("train", data, "--target", outputs, "--out", tmp_path / "run", *_flags(name))
    assert ran.code == 2
    assert ran.err.count("\n") == 1
    # The width of the target makes it one, whose input is not its output.
    assert "--target" in ran.err or "subtract_b_dec" in ran.err
    assert not (tmp_path / "run").exists()


def test_layers_of_different_widths_are_refused(run, data, outputs, tmp_path):
    ran = run("train", data, outputs, "--out", tmp_path / "run", *_flags("crosscoder"))
    assert "expected layers of one width, got [8, 5]" in ran.refusal()


def test_layers_and_targets_of_different_lengths_are_refused(run, data, tmp_path):
    short = _write(tmp_path / "short", D_IN, 3, rows=TOKENS - 1)
    ran = run("train", data, short, "--out", tmp_path / "run", *_flags("crosscoder"))
    assert "expected the same tokens in each, got [600, 599] rows" in ran.refusal()
    flags = ["--target", short, *_flags("transcoder")]
    ran = run("train", data, "--out", tmp_path / "run", *flags)
    assert "expected the same tokens in each, got [600, 599] rows" in ran.refusal()
    assert not (tmp_path / "run").exists()


def test_damaged_layers_and_targets_are_found_by_verify(run, data, second, tmp_path):
    shard = second / "shard_00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for more, name in (([second], "crosscoder"), (["--target", second], "transcoder")):
        arguments = ["train", data, *more, "--out", tmp_path / "run", *_flags(name), "--verify"]
        assert "shard_00001.safetensors changed" in run(*arguments).refusal()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('arch = "jumprely"\n', "got 'jumprely'; did you mean 'jumprelu'?"),
        ("arch = 3\n", "arch: expected one of topk, "),
        ('[sae]\narch = "relu"\n', "[sae]: unknown key 'arch'"),
        ('archs = "relu"\n', "unknown table 'archs'"),
        ('arch = "relu"\n[sae]\nk = 3\n', "k: no setting of architecture 'relu'"),
        ('arch = "batchtopk"\n[sae]\ngroups = "4"\n', "groups: expected "),
    ],
)
def test_a_file_that_does_not_fit(run, data, tmp_path, text, expected):
    config = tmp_path / "config.toml"
    config.write_text(text)
    ran = run("train", data, "--out", tmp_path / "run", "--config", config, *QUICK)
    assert expected in ran.refusal()


def test_the_help_lists_every_setting_and_every_architecture(run):
    text = run("train", "--help").out
    # Of this package: flags are made when the command line is imported, and another test may have
    # registered a class of its own since.
    of_package = [
        cls for table in setting_classes().values() for cls in table if is_of_package(cls)
    ]
    names = {field.name for cls in of_package for field in dataclasses.fields(cls)}
    for name in names - {"folders", *NESTED_TABLES}:  # the folders are an argument
        assert f"--{name.replace('_', '-')} " in text, name
    words = " ".join(text.split())
    for name, (sae, preset) in PRESETS.items():
        if is_of_package(sae):
            assert f"{name}, {preset.about}" in words


def is_of_package(cls: type) -> bool:
    return cls.__module__.startswith("sae_kernels.")
