"""``report``: the page of a run, by its options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from sae_kernels.config import TrainConfig
from sae_kernels.data import ShardDataset, ShardWriter
from sae_kernels.nn import TopKConfig
from sae_kernels.training import train

pytest.importorskip("matplotlib")


@pytest.fixture
def trained(data, tmp_path):
    source = ShardDataset(data)
    table = {"folders": [str(data)]}
    config = TrainConfig(steps=4, batch_size=64, log_every=2)
    train(TopKConfig(source.d_in, 32, 4), source, config, folder=tmp_path / "run", data=table)
    return tmp_path / "run"


def test_the_page_goes_to_the_run_or_where_it_is_wanted(run, trained, tmp_path):
    ran = run("report", trained)
    assert ran.code == 0
    assert ran.out.splitlines()[0] == str(trained / "report.html")
    assert "that it was trained on" in ran.out
    ran = run("report", trained, "--out", tmp_path / "page", "--max-tokens", 50, "--json")
    (record,) = ran.records()
    assert ran.err == ""
    assert record["report"] == str(tmp_path / "page" / "report.html")
    assert record["measured_on"] == "training"
    assert "Measured on 50 tokens" in (tmp_path / "page" / "report.html").read_text()


@pytest.mark.full
def test_the_command_on_the_page_repeats_the_run(run, trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("report", trained)
    (command,) = re.findall(r"<code>sae-kernels (.*)</code>", (trained / "report.html").read_text())
    assert run(*shlex.split(command)).code == 0
    weights = [
        (folder / "sae" / "sae.safetensors").read_bytes() for folder in (trained, Path("again"))
    ]
    assert weights[0] == weights[1]


@pytest.mark.full
def test_other_data_are_measured_instead(run, trained, tmp_path):
    with ShardWriter(tmp_path / "new", 8) as writer:
        writer.write(torch.randn(100, 8))
    (record,) = run("report", trained, "--data", tmp_path / "new", "--json").records()
    assert record["measured_on"] == "evaluation"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--target", "x"], "target: expected the data"),
        (["--data", "nowhere"], "nowhere is not a data set"),
        (["--max-tokens", 0], "'--max-tokens'"),
    ],
)
def test_options_that_do_not_fit(run, trained, options, expected):
    assert expected in run("report", trained, *options).err
    assert not (trained / "report.html").exists()


def test_what_is_no_run(run, data):
    assert "expected the folder of a run, it has no run.toml" in run("report", data).err


def test_the_browser_of_latents_needs_tokens_and_a_tokenizer(run, trained):
    refused = run("report", trained, "--browser")
    assert refused.code == 2
    assert "expected activations with their tokens" in refused.err
    assert not (trained / "report.html").exists()
