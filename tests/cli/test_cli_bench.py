"""``sae-kernels bench`` as its user sees it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from sae_kernels.backends import cpu
from sae_kernels.bench import cases, environments, results
from sae_kernels.data import ShardWriter
from sae_kernels.runs.metrics import read_metrics

TINY = ["--preset", "tiny", "--only", "step", "--rounds", "3", "--threads", "1"]


@pytest.mark.full
def test_a_run_is_written_shown_drawn_and_compared(run, tmp_path):
    out, plot = tmp_path / "one.jsonl", tmp_path / "report"
    lines = run("bench", *TINY, "--against", "dense", "--out", out, "--json").records()
    assert lines[0]["provenance"]["threads"] == 1
    assert str(tmp_path) not in lines[0]["provenance"]["command"]
    records = [line for line in lines if "provenance" not in line]
    read = results.read(out)
    assert read.records == records
    assert read.provenance["threads"] == 1
    assert read.provenance["libraries"]["dense float32"]["torch"] == torch.__version__
    measured = {(r["provider"], r["dtype"]) for r in results.measured(records)}
    assert measured >= {("ours", "float32"), ("ours", "bfloat16"), ("dense", "float32")}
    shown = run("bench", *TINY, "--against", "", "--compare", out, "--plot", plot)
    assert shown.code == 0
    assert records[0]["case"] in shown.out
    assert "dense" in shown.out  # only in the stored run, and said so
    assert (plot / "index.html").read_text().count(records[0]["case"]) > 0


@pytest.mark.full
def test_a_race_is_written_shown_and_drawn(run, tmp_path):
    options = ["--preset", "tiny", "--threads", "1", "--budget", "2", "--against", "dense"]
    places = ["--out", tmp_path / "race.jsonl", "--plot", tmp_path / "report"]
    ran = run("bench", "--race", *options, *places)
    assert ran.code == 0
    assert "seconds to the FVU of the last" in ran.out
    assert (tmp_path / "report" / "race.png").is_file()
    facts, *lines = read_metrics(tmp_path / "race.jsonl")
    assert facts["provenance"]["held_out"] == 4096
    assert {"ours", "dense"} == {line["provider"] for line in lines if "fvu" in line}


NO_UNITS = {  # torch's products and ours as on a CPU with AVX2 alone
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "SAE_KERNELS_CPU_ISA": "avx2",
}


@pytest.mark.skipif("avx2" not in cpu.supported_isas(), reason="needs a CPU with AVX2")
def test_without_bf16_units_torch_is_left_out_in_bf16_and_says_why():
    command = [sys.executable, "-m", "sae_kernels", "bench", *TINY, "--against", "dense"]
    command += ["--dry-run", "--json"]
    environment = {**os.environ, **NO_UNITS}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    reasons = {(r["provider"], r["dtype"]): r["unable"] for r in found}
    for name in ("dense", "product"):
        assert "times as long as its float32 one" in reasons[name, "bfloat16"]
        assert reasons[name, "float32"] is None
    assert reasons["ours", "bfloat16"] is None  # our kernels read bf16 and compute in fp32


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
    } | set(environments.PEERS) | {
        f"{peer}+ours:{level}" for peer in environments.PEERS for level in ("module", "trainer")
    }
    assert "--setup-peers sae_lens installs" in unable["sae_lens+ours:trainer"]


def test_a_peer_with_ours_is_the_peer_alone_and_at_both_levels(run):
    arguments = ("--preset", "tiny", "--dry-run", "--json", "--against")
    found = run("bench", *arguments, "sae_lens,sae_lens+ours").records()
    rows = [(r["provider"], r["dtype"]) for r in found if r["operation"] == "step"]
    assert rows == sorted(set(rows), key=rows.index)  # though named twice
    assert [row for row in rows if row[0].startswith("sae_lens")] == [
        (name, dtype)
        for name in ("sae_lens", "sae_lens+ours:module", "sae_lens+ours:trainer")
        for dtype in ("float32", "bfloat16")
    ]
    other = [r for r in found if r["operation"] != "step" and r["provider"].endswith(":trainer")]
    assert other
    assert all("the same as at level module" in r["unable"] for r in other)


@pytest.mark.full
def test_stored_activations_take_the_place_of_random_ones(run, tmp_path):
    with ShardWriter(tmp_path / "acts", 24, rows_per_shard=256) as writer:
        writer.write(torch.randn(300, 24, generator=torch.Generator().manual_seed(0)))
    few = ["--preset", "tiny", "--only", "encode", "--against", "", "--rounds", "3"]
    lines = run("bench", *few, "--data", tmp_path / "acts", "--json").records()
    record = next(line for line in lines if line.get("provider") == "ours")
    assert record["case"] == "encode-topk-256x24x512x8-real"
    assert record["status"] == "measured"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--preset", "enormous"], "--preset: expected one of tiny"),
        (["--only", "("], "--only: expected a regular expression"),
        (["--only", "no such case"], "expected a part of the name of a case such as step-"),
        (["--against", "sae_lenz"], "sae_lens"),
        (["--against", "sae_lenz+ours"], "did you mean 'sae_lens+ours'?"),
        (["--against", "nobody+ours"], "no provider 'nobody+ours'"),
        (["--against", "dense+ours"], "no provider 'dense+ours'"),
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
