"""sae-kernels plan: the example of its page, what it says of its own certainty, what it refuses."""

from __future__ import annotations

import json

import pytest

from sae_kernels.bench.plan import calibration

WIDE = ["--d-in", "16384", "--n-latents", "16M", "--k", "128", "--tokens", "40G"]
EXAMPLE = ["plan", *WIDE, "--gpus", "512", "--device", "h200"]
ONE = ["plan", "--d-in", "768", "--n-latents", "24K", "--k", "32", "--tokens", "1G"]


@pytest.fixture(autouse=True)
def nothing_stored(monkeypatch):
    monkeypatch.setattr(calibration, "stored", lambda: [])


def test_the_example_names_a_layout_and_what_rules(run):
    ran = run(*EXAMPLE)
    assert ran.code == 0
    assert "16,777,216 latents" in ran.out
    assert "40,000,000,000 tokens in 305,176 steps of 131,072" in ran.out
    assert "512 x h200, not calibrated: no stored result for h200" in ran.out
    rows = {line.split("  ")[0]: line for line in ran.out.splitlines()}
    assert rows["token-sharded"].endswith("does not fit in memory")
    assert rows["latent-sharded"].endswith("communication")
    assert "fastest that fits: 64 x 8 (--latents-over 64 --tokens-over 8)" in rows
    assert (
        "train takes 256 x 2 unless told, which sends the fewest bytes of partial sums" in ran.out
    )


def test_its_json_adds_up(run):
    head, *found = run(*EXAMPLE, "--json").records()
    assert head["event"] == "plan"
    assert (head["n_latents"], head["tokens"], head["batch"]) == (2**24, 40 * 10**9, 131072)
    assert set(head["origins"].values()) == {"nominal"}
    assert [p["shards"] for p in found] == [2**i for i in range(10)]
    for p in found:
        assert p["shards"] * p["replicas"] == 512
        assert sum(p["parts_seconds"].values()) == pytest.approx(p["step_seconds"])
        assert sum(p["memory"].values()) == pytest.approx(p["memory_bytes"])
        assert sum(p["sent"].values()) == pytest.approx(p["sent_bytes"])
        assert p["run_seconds"] == pytest.approx(head["steps"] * p["step_seconds"])
    (best,) = (p for p in found if p["fastest"])
    assert best["step_seconds"] == min(p["step_seconds"] for p in found if p["fits"])


def test_settings_of_training_count(run):
    def only(*settings):
        _, found = run(*ONE, "--device", "h200", "--json", *settings).records()
        return found

    plain, small = only(), only("--master-weights", "split", "--moment-dtype", "bfloat16")
    weights = 24 * 1024 * 768
    assert plain["memory"]["weights and states"] - small["memory"]["weights and states"] == (
        weights * 2 * (14 - 8)
    )
    assert small["step_seconds"] < plain["step_seconds"]
    assert (
        only("--compute", "float32")["parts_seconds"]["product"]
        > 10 * (plain["parts_seconds"]["product"])
    )
    assert only("--batch", "4K")["tokens"] == 4096


def test_where_nothing_fits_it_says_what_to_do(run):
    out = run("plan", *WIDE, "--device", "a100").out
    assert "no layout fits in memory: take more GPUs" in out


def test_results_of_a_gpu_calibrate_it(run, tmp_path):
    path = tmp_path / "gpu.jsonl"
    times = dict.fromkeys(("median_ms", "p20_ms", "p80_ms"), 0.125)
    copy = {"case": "step", "provider": "copy", "dtype": "int8", "status": "measured", **times}
    lines = ({"provenance": {"device": "NVIDIA H200"}}, copy)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    head, _ = run(*ONE, "--device", "h200", "--calibration", path, "--json").records()
    assert head["rates"]["moved"] == pytest.approx(2 * 2**28 / 0.125e-3)
    assert head["origins"]["moved"] == "measured"
    out = run(*ONE, "--device", "h200", "--calibration", path).out
    assert "calibrated by rates in gpu.jsonl (measured: moved; nominal: " in out
    assert "expected results of a100" in (
        run(*ONE, "--device", "a100", "--calibration", path).refusal()
    )


def test_this_machine_can_be_planned_for(run):
    head, found = run(*ONE, "--json").records()
    assert head["device"] == "cpu"
    assert found["layout"] == "one device"
    assert found["sent_bytes"] == 0


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([*ONE, "--k", "many"], "--k: expected a whole number"),
        ([*ONE, "--k", "32K"], "k: expected 1 <= k <= n_latents = 24576"),
        ([*ONE, "--device", "h20"], "did you mean 'h200'"),
        ([*ONE, "--gpus", "2"], "--gpus: expected 1 with --device cpu"),
        ([*ONE, "--gpus", "8", "--device", "h200", "--batch", "4"], "--batch: expected"),
        ([*ONE, "--master-weights", "splitt"], "master_weights: expected one of float32, split"),
        (
            [*ONE, "--master-weights", "split", "--compute", "float32"],
            "with master_weights 'split'",
        ),
        ([*ONE, "--calibration", "nowhere.jsonl"], "nowhere.jsonl"),
        (["plan", "--d-in", "768"], "--n-latents"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(run, arguments, expected):
    assert expected in run(*arguments).refusal()
