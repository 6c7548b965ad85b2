"""``analyze``: SAEs side by side, what it writes and where, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch

from sae_kernels.data import ShardWriter
from sae_kernels.nn import SwitchConfig, SwitchSAE, TopKConfig, TopKSAE

pytest.importorskip("matplotlib")

D_IN = 8  # of the data fixture


@pytest.fixture
def switch(tmp_path):
    folder = tmp_path / "routed" / "sae"
    sae = SwitchSAE(SwitchConfig(D_IN, 32, k=4, n_experts=4))
    with torch.no_grad():
        sae.W_dec[30], sae.W_dec[9] = sae.W_dec[1], 0
    sae.save_pretrained(folder)
    return folder


def test_two_side_by_side(run, saved, switch, data, tmp_path):
    out = tmp_path / "out"
    ran = run("analyze", saved, switch, "--data", data, "--out", out)
    assert ran.code == 0, ran
    lines = ran.out.splitlines()
    assert lines[0].split() == ["saved", "routed"]
    assert "nan" not in ran.out
    assert "experts of routed" in lines
    assert lines[-1] == str(out)
    assert {path.name for path in out.iterdir()} == {
        "analysis.json", "neighbours.png", "duplicates.png", "experts.png", "frontiers.png",
    }  # fmt: skip
    values = json.loads((out / "analysis.json").read_text(), parse_constant=pytest.fail)
    assert values["paths"] == [str(saved), str(switch)]
    assert [each["name"] for each in values["saes"]] == ["saved", "routed"]


@pytest.mark.full
def test_json_lines_are_those_of_the_file(run, saved, switch, data, tmp_path):
    out = tmp_path / "out"
    ran = run("analyze", saved, switch, "--data", data, "--out", out, "--json")
    assert ran.err == ""
    records = ran.records()
    kept = json.loads((out / "analysis.json").read_text())["saes"]
    assert records == [{**each, "folder": str(out)} for each in kept]
    assert sum(records[1]["experts"]["by_expert"]["n_tokens"]) == 600
    assert records[1]["duplicates"]["n_groups_across"] == 1
    assert records[1]["duplicates"]["n_distinct"] == 32 - 2


def test_weights_alone(run, switch, tmp_path):
    (record,) = run("analyze", switch, "--json").records()
    assert "evaluation" not in record
    assert record["folder"] is None
    (encoder,) = run("analyze", switch, "--json", "--encoder", "--threshold", 0.5).records()
    assert (encoder["rows"], encoder["duplicates"]["threshold"]) == ("encoder", 0.5)
    assert encoder["n_zero"] == 0


def test_names_that_clash_are_given_in_full(run, tmp_path, saved):
    other = tmp_path / "other" / "saved"
    TopKSAE(TopKConfig(D_IN, 16, 4)).save_pretrained(other)
    records = run("analyze", saved, other, "--json").records()
    assert [record["name"] for record in records] == [str(saved), str(other)]
    assert f"expected each SAE once, got {saved} twice" in run("analyze", saved, saved).refusal()


def test_a_folder_that_holds_files(run, saved, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("mine")
    assert "--overwrite" in run("analyze", saved, "--out", tmp_path / "out").refusal()
    assert run("analyze", saved, "--out", tmp_path / "out", "--overwrite").code == 0
    assert (tmp_path / "out" / "kept").read_text() == "mine"


def test_data_that_do_not_fit(run, saved, tmp_path):
    with ShardWriter(tmp_path / "wide", D_IN + 1) as writer:
        writer.write(torch.randn(10, D_IN + 1))
    with ShardWriter(tmp_path / "empty", D_IN):
        pass
    message = run(
        "analyze", saved, "--data", tmp_path / "wide", "--out", tmp_path / "out"
    ).refusal()
    assert not (tmp_path / "out").exists()
    assert "saved: expected activations as wide as the SAE's d_in 8, got 9" in message
    message = run("analyze", saved, "--data", tmp_path / "empty").refusal()
    assert "at least one row" in message


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--data", "nowhere"], "nowhere is not a data set"),
        (["--verify"], "--verify: expected --data too"),
        (["--clusters"], "--clusters: expected --data too"),
        (["--target", "x"], "--target: expected --data too"),
        (["--threshold", "1"], "--threshold: expected a cosine"),
        (["--out", "{file}"], "expected a folder or nothing, got a file"),
        (["--out", "{file}/below"], "{file}"),
    ],
)
def test_options_that_do_not_fit(run, saved, tmp_path, options, expected):
    file = tmp_path / "file"
    file.touch()
    ran = run("analyze", saved, *(option.format(file=file) for option in options))
    assert expected.format(file=file) in ran.refusal()


def test_what_is_no_sae(run, saved, data, tmp_path):
    assert "nowhere: expected a folder with a saved SAE" in run("analyze", "nowhere").refusal()
    assert str(data) in run("analyze", saved, data).refusal()
    assert "SAE" in run("analyze").err
