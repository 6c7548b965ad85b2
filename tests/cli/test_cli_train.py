"""``train`` and ``eval``: settings from flags and files, results, and input that does not fit."""

from __future__ import annotations

import dataclasses
import json
import struct

import pytest
from safetensors.torch import load_file, save_file

from sae_kernels.config import OptimizerConfig, TrainConfig
from sae_kernels.config.base import declared
from sae_kernels.config.toml import read_tables
from sae_kernels.data import ShardDataset
from sae_kernels.nn import TopKConfig, TopKObjective, TopKSAE
from sae_kernels.training import evaluate
from sae_kernels.training.run_config import NESTED_TABLES, setting_classes

D_IN, TOKENS = 8, 600  # of the data fixture
QUICK = ["--steps", 4, "--batch-size", 64, "--n-latents", 32, "--k", 4, "--log-every", 2]
TABLES = ("sae", "objective", "optimizer", "train", "output")
# An architecture that a test has registered since has flags in the next process only.
OWN = [c for t in TABLES for c in setting_classes()[t] if c.__module__.startswith("sae_kernels.")]
NAMES = {field.name for cls in OWN for field in dataclasses.fields(cls)} - set(NESTED_TABLES)
FLAGS = {"--" + name.replace("_", "-") for name in NAMES}


def test_train_then_eval(run, data, tmp_path):
    out = tmp_path / "run"
    ran = run("train", data, "--out", out, *QUICK, "--json", "--verify")
    *lines, result = ran.records()
    assert ran.code == 0
    assert ran.err == ""
    assert [line["step"] for line in lines] == [2, 4]
    assert {line["event"] for line in lines} == {"metrics"}
    assert result["event"] == "result"
    assert result.keys() >= {"fvu", "l0", "loss", "dead_fraction", "skipped", "seconds", "sae"}
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert written == [{k: v for k, v in line.items() if k != "event"} for line in lines]

    (measured,) = run("eval", result["sae"], data, "--json").records()
    expected = evaluate(TopKSAE.from_pretrained(out / "sae"), ShardDataset(data)).scalars()
    assert measured == {**expected, "n_latents": 32, "n_dead": 0, "n_dense": measured["n_dense"]}
    text = run("eval", out / "sae", data).out
    assert f"{TOKENS}" in text
    assert "0 of 32 fired on none of these tokens" in text


def test_train_in_words(run, data, tmp_path):
    ran = run("train", data, "--out", tmp_path / "run", *QUICK)
    assert ran.code == 0
    assert "dead_fraction" in ran.out
    assert ran.err.startswith("train\n")
    assert "\x1b" not in ran.out + ran.err


def test_every_setting_has_a_flag_with_its_description(run):
    text = run("train", "--help").out
    assert all(f"{flag} " in text for flag in FLAGS)
    words = " ".join(text.split())
    for cls in (TopKConfig, TopKObjective, OptimizerConfig, TrainConfig):
        for name, declaration in declared(cls).items():
            if name not in NESTED_TABLES:
                # The first words: a table may have them from another architecture, and longer.
                start = " ".join(declaration.words.split()[:3])
                assert start[0].upper() + start[1:] in words, name


def test_flags_come_before_the_file_and_the_file_before_the_defaults(run, data, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        "[sae]\nk = 2\nn_latents = 24\nrank_by_decoder_norm = true\n"
        '[train]\nsteps = 2\nlr = 1e-3\nbatch_size = 32\n[optimizer]\nadam = "lazy"\n'
    )
    out = tmp_path / "run"
    flags = ["--k", 3, "--lr", 0.5, "--no-rank-by-decoder-norm"]
    assert run("train", data, "--out", out, "--config", config, *flags, "--json").code == 0
    used = read_tables(out / "run.toml")
    assert used["sae"]["k"] == 3
    assert used["sae"]["n_latents"] == 24
    assert used["sae"]["rank_by_decoder_norm"] is False
    assert used["train"]["lr"] == 0.5
    assert used["optimizer"]["adam"] == "lazy"
    assert used["optimizer"]["beta1"] == OptimizerConfig().beta1


def test_without_a_word_about_it_the_shape_follows_the_data(run, data, tmp_path):
    run("train", data, "--out", tmp_path / "run", "--steps", 1, "--batch-size", 8, "--k", 2)
    used = read_tables(tmp_path / "run" / "run.toml")["sae"]
    assert (used["d_in"], used["n_latents"]) == (D_IN, 8 * D_IN)


def test_a_scale_of_the_sae_replaces_the_estimate(run, data, tmp_path):
    out = tmp_path / "run"
    assert run("train", data, "--out", out, *QUICK, "--activation-scale", 2).code == 0
    assert read_tables(out / "run.toml")["sae"]["activation_scale"] == 2
    both = ["--activation-scale", 2, "--normalize-activations", "sqrt_d"]
    ran = run("train", data, "--out", tmp_path / "other", *QUICK, *both)
    assert "or set normalize_activations to none" in ran.refusal()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[train]\nstpes = 3\n", "[train]: unknown key 'stpes'; did you mean 'steps'?"),
        ("[sae]\nzzz = 3\n", "known are d_in, n_latents"),
        ("[trian]\nsteps = 3\n", "unknown table 'trian'; did you mean 'train'?"),
        ("train = 3\n", "expected a table [train], got 3"),
        ('[train]\nsteps = "3"\n', "steps: expected a positive integer, got '3'"),
        ("[sae]\nk = true\n", "k: expected a positive integer, got True"),
        ("[train\n", "expected TOML"),
    ],
)
def test_a_file_of_settings_that_does_not_fit(run, data, tmp_path, text, expected):
    config = tmp_path / "config.toml"
    config.write_text(text)
    ran = run("train", data, "--out", tmp_path / "run", "--config", config)
    assert expected in ran.refusal()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--k", 0], "k: expected a positive integer, got 0"),
        (["--k", 65], "k: expected at most n_latents = 64, got 65"),
        (["--loss", "l1"], "loss: expected one of fvu, mse"),
        (["--lr", "nan"], "lr: expected a positive number"),
        (["--d-in", 9], "d_in: expected 8, the width of the activations"),
        (["--batch-size", 601], "batch_size: expected at most the 600 rows"),
        (["--config", "nowhere.toml"], "nowhere.toml: expected a TOML file, it is not there"),
    ],
)
def test_settings_that_do_not_fit(run, data, tmp_path, flags, expected):
    assert expected in run("train", data, "--out", tmp_path / "run", *flags).refusal()


def test_what_is_there_is_kept_unless_overwriting_is_asked_for(run, data, tmp_path, contents):
    out = tmp_path / "run"
    assert run("train", data, "--out", out, *QUICK).code == 0
    before = contents(out)
    assert "--overwrite" in run("train", data, "--out", out, *QUICK, "--seed", 1).refusal()
    assert contents(out) == before
    assert run("train", data, "--out", out, *QUICK, "--seed", 1, "--overwrite").code == 0
    assert contents(out) != before
    file = tmp_path / "file"
    file.write_text("mine")
    assert "got a file" in run("train", data, "--out", file, "--overwrite").refusal()
    assert file.read_text() == "mine"


def test_damaged_data_is_refused(run, data, saved, tmp_path):
    assert "is not a data set" in run("eval", saved, tmp_path / "nowhere").refusal()
    shard = data / "shard_00001.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for command in (["eval", saved, data], ["train", data, "--out", tmp_path / "run"]):
        assert "shard_00001.safetensors changed" in run(*command, "--verify").refusal()
    shard.write_bytes(whole[:-4])
    assert "the file was cut" in run("train", data, "--out", tmp_path / "run").refusal()
    shard.unlink()
    assert "is missing" in run("eval", saved, data).refusal()
    assert not (tmp_path / "run").exists()


def _write_nan(data):
    """Makes the last number of the data set NaN, which its index does not tell."""
    shard = data / "shard_00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-4] + struct.pack("<f", float("nan")))


def test_nan_in_the_data_is_refused(run, data, tmp_path):
    _write_nan(data)
    assert "got NaN or infinity" in run("train", data, "--out", tmp_path / "run", *QUICK).refusal()


def test_nan_on_the_way_stops_training_and_loses_nothing(run, data, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_kernels.training.fresh.SAMPLE", 16)
    _write_nan(data)
    out = tmp_path / "run"
    flags = ["--steps", 9, "--batch-size", 64, "--k", 4, "--log-every", 1]
    ran = run("train", data, "--out", out, *flags, "--json")
    assert ran.code == 2
    assert "expected a finite loss" in ran.err
    lines = ran.records()
    assert len((out / "metrics.jsonl").read_text().splitlines()) == len(lines) > 0
    assert TopKSAE.from_pretrained(out / "sae").W_enc.isfinite().all()
    ran = run(
        "train", data, "--out", out, *flags, "--on-nonfinite", "skip", "--overwrite", "--json"
    )
    assert ran.records()[-1]["skipped"] == 1


def test_an_sae_that_is_not_there_or_not_finite_is_refused(run, data, saved, tmp_path):
    assert "expected a folder" in run("eval", tmp_path / "nowhere", data).refusal()
    weights = load_file(saved / "sae.safetensors")
    weights["W_enc"][3, 3] = float("nan")
    save_file(weights, saved / "sae.safetensors")
    message = run("eval", saved, data).refusal()
    assert "W_enc holds NaN or infinity" in message
    (saved / "sae.safetensors").write_bytes(b"no tensors")
    assert "cannot be read" in run("eval", saved, data).refusal()


def test_an_sae_of_another_width_is_refused(run, data, tmp_path):
    TopKSAE(TopKConfig(D_IN + 1, 32, 4)).save_pretrained(tmp_path / "other")
    assert "d_in 9, got 8" in run("eval", tmp_path / "other", data).refusal()


def test_names_for_other_tools(run, data, tmp_path):
    """As flags, in TOML, and in run.toml, from which resume reads them."""
    names = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre"}
    toml = tmp_path / "settings.toml"
    toml.write_text('[output]\nmodel_name = "another"\nhook_name = "blocks.3.hook_resid_pre"\n')
    out = tmp_path / "run"
    flags = ["--config", toml, "--model-name", "gpt2"]
    assert run("train", data, "--out", out, *QUICK, *flags).code == 0
    assert TopKSAE.from_pretrained(out / "sae").metadata["activations"] == {
        "model": names["model_name"],
        "hook_name": names["hook_name"],
    }
    assert read_tables(out / "run.toml")["output"].items() >= names.items()
