"""``sae-kernels bench`` as its user sees it."""

from __future__ import annotations

import json

import pytest
import torch

from sae_kernels.bench import cases, environments, results
from sae_kernels.data import ShardWriter

TINY = ["--preset", "tiny", "--only", "step", "--rounds", "3", "--threads", "1"]


@pytest.mark.full
def test_a_run_is_written_shown_drawn_and_compared(run, tmp_path):
    out, plot = tmp_path / "one.jsonl", tmp_path / "report"
    (first, *records) = run("bench", *TINY, "--against", "dense", "--out", out, "--json").records()
    assert first["provenance"]["threads"] == 1
    assert first["provenance"]["libraries"]["dense float32"]["torch"] == torch.__version__
    assert str(tmp_path) not in first["provenance"]["command"]
    read = results.read(out)
    assert read.records == records
    assert {(r["provider"], r["dtype"]) for r in records if r["status"] == "measured"} >= {
        ("ours", "float32"),
        ("ours", "bfloat16"),
        ("dense", "float32"),
        ("dense", "bfloat16"),
    }
    shown = run("bench", *TINY, "--against", "", "--compare", out, "--plot", plot)
    assert shown.code == 0
    assert records[0]["case"] in shown.out
    assert "dense" in shown.out  # only in the stored run, and said so
    assert (plot / "index.html").read_text().count(records[0]["case"]) > 0


def test_list_names_every_case_of_a_preset(run):
    found = run("bench", "--list", "--preset", "crossover", "--json").records()
    assert [record["case"] for record in found] == [c.name for c in cases.PRESETS["crossover"]]
    assert found[-1]["case"] in run("bench", "--list").out


def test_a_dry_run_says_who_cannot_and_why(run, monkeypatch, tmp_path):
    monkeypatch.setenv("SAE_KERNELS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(environments, "find_spec", lambda name: None)
    found = run("bench", *TINY, "--against", "all", "--dry-run", "--json").records()
    unable = {record["provider"]: record["unable"] for record in found}
    assert unable["ours"] is None
    assert "--setup-peers sae_lens" in unable["sae_lens"]
    assert "cuda" in unable["cusparse"]
    assert unable.keys() == {"product", "copy", "dense_compile", "ours"} | {
        name for name in unable if name.startswith(("ours-", "dense", "cusparse"))
    } | set(environments.PEERS)


@pytest.mark.full
def test_stored_activations_take_the_place_of_random_ones(run, tmp_path):
    with ShardWriter(tmp_path / "acts", 24, rows_per_shard=256) as writer:
        writer.write(torch.randn(300, 24, generator=torch.Generator().manual_seed(0)))
    few = ["--preset", "tiny", "--only", "encode", "--against", "", "--rounds", "3"]
    (_, *records) = run("bench", *few, "--data", tmp_path / "acts", "--json").records()
    assert records[0]["case"] == "encode-topk-256x24x512x8-real"
    assert records[0]["status"] == "measured"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "enormous"], "--preset: expected one of tiny"),
        (["--only", "("], "--only: expected a regular expression"),
        (["--only", "no such case"], "expected a part of the name of a case such as step-"),
        (["--against", "sae_lenz"], "sae_lens"),
        (["--device", "tpu"], "--device: expected cpu or cuda"),
        (["--rounds", "0"], "--rounds"),
        (["--budget", "0"], "--budget"),
        (["--data", "nowhere"], "nowhere"),
        (["--compare", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--out", "nowhere/x.jsonl"], "nowhere"),
        (["--setup-peers", "flashsae"], "flashsae"),
    ],
)
def test_what_does_not_fit_is_one_line(run, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert words in run("bench", *arguments).refusal()


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing where no GPU is")
def test_a_gpu_that_is_not_there_is_said_to_be_missing(run):
    assert "GPU" in run("bench", "--device", "cuda").refusal()


def test_what_is_there_stays(run, tmp_path):
    out = tmp_path / "results.jsonl"
    out.write_text(json.dumps({"mine": 1}))
    assert "--overwrite" in run("bench", *TINY, "--out", out).refusal()
    assert json.loads(out.read_text()) == {"mine": 1}
