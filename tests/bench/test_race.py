"""The race: what is trained, for how long, and how it is judged."""

from __future__ import annotations

import pytest
import torch

from benchmarks import page
from sae_kernels.bench import cases, environments, providers, race
from sae_kernels.bench.output import race as output
from sae_kernels.bench.run import BenchSettings
from sae_kernels.data.rows import TensorRows
from sae_kernels.nn import TopKSAE
from sae_kernels.runs.metrics import MetricLog
from sae_kernels.training import evaluate

TINY = cases.step(cases.Shape(256, 64, 512, 8), "uniform")


def line(name, *points):
    """Records of a trainer: seconds and FVU at its marks; it makes ten steps a second."""
    facts = {**TINY.facts(), "provider": name, "dtype": "float32", "status": "measured"}
    return [facts | {"seconds": s, "fvu": fvu, "steps": 10 * s} for s, fvu in points]


def test_seconds_to_the_fvu_of_the_last_are_interpolated():
    slow, fast = line("dense", (1, 0.8), (4, 0.4)), line("ours", (1, 0.8), (2, 0.2), (4, 0.1))
    failed = [slow[0] | {"provider": "x", "status": "failed", "reason": "it ended"}]
    first, last = race.finishes([*slow, *failed, *fast])
    assert (first.provider, last.provider) == ("ours", "dense")
    assert first.seconds == pytest.approx(2**0.5)  # half of the way from 0.8 to 0.2 by logarithms
    assert (last.seconds, last.fvu, last.steps_per_second) == (4, 0.4, 10)
    assert [row[0] for row in output.table(slow + fast)] == ["trainer", "ours", "dense"]
    assert race.finishes(failed) == []


def test_a_curve_that_rises_on_the_way_counts_from_where_it_first_was_good():
    (first, *_) = race.finishes([*line("a", (1, 0.9), (2, 0.5), (4, 0.7)), *line("b", (4, 0.7))])
    assert first.provider == "a"
    assert 1 < first.seconds < 2


def test_weights_are_judged_as_evaluate_judges_a_module():
    sae = TopKSAE(16, 64, k=4)
    x = torch.randn(3000, 16) + 1
    weights = {n: getattr(sae, n).detach() for n in ("W_enc", "b_enc", "W_dec", "b_dec")}
    fvu = evaluate(sae, TensorRows(x)).fvu
    assert race.judged(weights, x, 4) == pytest.approx(fvu, rel=1e-5)


def test_other_cases_and_too_few_tokens_are_refused():
    settings = BenchSettings(data=TensorRows(torch.randn(4500, 64)))
    with pytest.raises(ValueError, match="expected a training step of a TopK SAE, got encode-"):
        race.race(cases.Case("encode", "inference", TINY.shape), [], settings)
    with pytest.raises(ValueError, match="expected at least 4,608 tokens in --data, got 4,500"):
        race.race(TINY, [], settings)


@pytest.mark.full
def test_trainers_get_the_same_clock_and_learn(tmp_path):
    """Ours and plain torch, a second each, to the table, the picture and the page."""
    who = [p for p in providers.chosen(["dense"], "cpu") if p.dtype == "float32"]
    lines = []
    records = race.race(TINY, who, BenchSettings(threads=1, budget_s=2.0), lines.append)
    assert [one for one in lines if "provenance" not in one] == records
    curves = race.curves(records)
    assert [name for name, _ in curves] == ["ours", "dense"]
    for curve in curves.values():
        steps, seconds = ([r[key] for r in curve] for key in ("steps", "seconds"))
        assert steps == sorted(set(steps))
        assert 1 <= seconds[-1] < 1 + 2 * max(1, seconds[0])  # to the end of a batch
        assert curve[-1]["fvu"] < 0.95 * curve[0]["fvu"]
    with MetricLog(tmp_path / "race-here.jsonl") as log:
        for one in lines:
            log.write(one)
    section = page.race_section(tmp_path / "race-here.jsonl", tmp_path)
    assert "| ours | float32 |" in section
    assert (tmp_path / "race-here.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.full
@pytest.mark.parametrize("peer", environments.PEERS)
def test_a_peer_hands_over_what_it_has_learnt(peer):
    if environments.python_of(peer) is None:
        pytest.skip(f"{peer} is not installed: sae-kernels bench --setup-peers {peer}")
    who = [p for p in providers.GROUPS[peer] if p.dtype == "float32"]
    records = race.race(TINY, who, BenchSettings(threads=1, budget_s=2.0))
    assert {record["status"] for record in records} == {"measured"}
    assert records[-1]["fvu"] < records[0]["fvu"]
