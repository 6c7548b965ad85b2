"""The one command for a GPU machine: here it makes a dry run, and its parts are held to account."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import calls
from benchmarks.calls import GPU_BACKENDS
from benchmarks.gpu_check import correctness, floors, measure, page
from benchmarks.gpu_check.__main__ import STAGES, summary, verdict
from benchmarks.gpu_check.bars import BARS, Bar
from sae_kernels import primitives
from sae_kernels.bench import timing
from sae_kernels.bench.cases import Shape
from sae_kernels.bench.work import Rates

ROOT = Path(__file__).parents[2]
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
Record = dict[str, Any]


@pytest.fixture(scope="module")
def dry(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[Record], float]:
    """A dry run's output, its lines and the seconds of work in it, whatever else is running."""
    folder = tmp_path_factory.mktemp("dry")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry", "--out", str(folder)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "--minutes", "5"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["bench.jsonl", "gpu_check.jsonl"]
    lines = [json.loads(line) for line in (folder / "gpu_check.jsonl").read_text().splitlines()]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, lines, seconds


@pytest.mark.full
def test_a_dry_run_goes_through_every_stage_and_says_what_it_is(dry) -> None:
    output, (first, *records), seconds = dry
    assert seconds < 90
    assert output.startswith("DRY RUN (asked for)")
    assert output.rstrip().endswith("dry run: nothing was measured")
    assert first["provenance"]["dry"] is True
    assert "device" not in first["provenance"]
    assert {"commit", "torch", "command", "time"} <= first["provenance"].keys()
    assert all(record["dry"] is True for record in records)
    stages = {r["what"]: r["outcome"] for r in records if r["kind"] == "stage"}
    assert stages == dict.fromkeys(STAGES, "passed") | {"build": "skipped", "sanitizer": "skipped"}
    skipped = next(r for r in records if r["kind"] == "not available")
    assert (skipped["what"], skipped["why"]) == ("compute-sanitizer", "no GPU here")


@pytest.mark.full
def test_a_dry_run_tests_a_triton_kernel_for_real(dry) -> None:
    _, (_, *records), _ = dry
    tests = {(r["kernel"], r["backend"]): r for r in records if r["kind"] == "tests"}
    assert tests["decode", "triton"]["passed"] > 0
    assert tests["decode", "triton"]["failed"] == 0
    if not torch.cuda.is_available():
        assert tests["FusedStep", "automatic"]["passed"] == 0
        assert tests["FusedStep", "automatic"]["skipped"] > 0


@pytest.mark.full
def test_every_group_of_measurements_ran(dry) -> None:
    _, (_, *records), _ = dry
    assert {r["group"] for r in records if "group" in r} == set(measure.GROUPS)
    ran = {r["group"] for r in records if r["kind"] in ("time", "rate", "check")}
    assert ran == set(measure.GROUPS)
    checked = {r["kernel"] for r in records if r["kind"] == "check"}
    assert checked == {*primitives.NAMES, "FusedStep"}


@pytest.mark.full
def test_the_fused_products_are_watched_in_tritons_interpreter() -> None:
    command = [sys.executable, "-m", "benchmarks.gpu_check.measure", "epilogue-gpu-small", "--dry"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )
    records = [json.loads(line) for line in done.stdout.splitlines()]
    timed = {r["provider"] for r in records if r["kind"] == "time"}
    assert timed == {"product alone", "triton, nothing passes", "triton, the k best pass"}
    mean, most, over = (r["value"] for r in records if r["kind"] == "fact")
    # k = 8: a list holds that many once a pass was cut back, and more before.
    assert 8 <= mean <= most
    assert over == 0


@pytest.mark.full
def test_every_bar_has_a_measurement_behind_it(dry) -> None:
    # On the CPU no GPU backend runs and torch counts no memory: there the case must be measured.
    _, (_, *records), _ = dry
    cases = {r.get("case", r.get("what")) for r in records}
    for bar in BARS:
        assert bar.case in cases, bar
        memory = bar.field in ("extra_mib", "peak_gb")
        on_gpus_only = bar.provider in (*GPU_BACKENDS, "eai-sparsify") or memory
        assert on_gpus_only or bar.value(records) is not None, bar


@pytest.mark.full
def test_the_page_refuses_a_dry_run(dry, tmp_path: Path) -> None:
    _, (first, *records), _ = dry
    file = tmp_path / "gpu-machine.jsonl"
    file.write_text("\n".join(map(json.dumps, [first, *records])))
    with pytest.raises(ValueError, match=r"gpu-machine\.jsonl: expected .* dry run"):
        page.generated(tmp_path)
    forged = {"provenance": first["provenance"] | {"dry": False, "device": "a GPU"}}
    file.write_text("\n".join(map(json.dumps, [forged, *records])))
    with pytest.raises(ValueError, match="dry run"):
        page.generated(tmp_path)


FACTS = {
    "device": "NVIDIA H200",
    "commit": "abc1234",
    "dirty": False,
    "time": "2030-01-02T03:04:05Z",
    "command": "python -m benchmarks.gpu_check",
    "cuda": "13.0",
    "torch": "2.11.0",
    "triton": "3.6.0",
    "nvidia_smi": {"driver_version": "1.2"},
}
TESTS = {"kind": "tests", "kernel": "decode", "backend": "triton", "skipped": 0}
STEP = {
    "kind": "time",
    "case": "step gpu-small",
    "provider": "FusedStep",
    "median_ms": 2.0,
    "p20_ms": 1.9,
    "p80_ms": 2.1,
    "ratio": 1.0,
    "base": "FusedStep",
}


def results(folder: Path, name: str, facts: Record, *records: Record) -> None:
    lines = [{"provenance": FACTS | facts}, *records]
    (folder / f"gpu-{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def row(text: str, start: str) -> str:
    (line,) = (line for line in text.splitlines() if line.startswith(start))
    return line


def test_the_page_says_where_a_kernel_last_ran_and_how_a_bar_stands(tmp_path: Path) -> None:
    results(tmp_path, "new", {}, TESTS | {"passed": 7, "failed": 1}, STEP | {"of_floor": 1.75})
    old = {"time": "2029-01-01T00:00:00Z", "commit": "0000000"}
    results(tmp_path, "old", old, TESTS | {"passed": 5, "failed": 0}, STEP | {"of_floor": 1.25})
    text = page.generated(tmp_path)
    where = "NVIDIA H200 | abc1234 | 2030-01-02"
    assert row(text, "| decode | triton") == f"| decode | triton | {where} | 7 | 1 | - |  |"
    assert page.NEVER in row(text, "| FusedStep | automatic")
    bar = row(text, "| FusedStep at gpu-small: time over its floor")
    assert bar.endswith(f"| at most 1.5 | 1.75 (missed) | {where} |")
    assert "| open |" in row(text, "| FusedStep at gpu-mid: time over its floor")
    assert text.index("### gpu-new") < text.index("### gpu-old")
    head = "by hand\n"
    assert page.written(head + page.MARK + "outdated", tmp_path) == head + text


def test_the_page_says_what_passed_in_the_emulator(tmp_path: Path) -> None:
    for architecture, dirty, failed in (("sm_80", False, 0), ("sm_90", True, 2)):
        first = {"provenance": {"commit": "abc1234", "dirty": dirty}, "architecture": architecture}
        counts = {"backend": "triton", "passed": 7, "failed": failed, "skipped": 1}
        none = {"kernel": "auxk", "backend": "triton", "passed": 0, "failed": 0, "skipped": 3}
        lines = [json.dumps(line) for line in (first, {"kernel": "decode"} | counts, none)]
        (tmp_path / f"emulated-{architecture}.jsonl").write_text("\n".join(lines))
    text = page.generated(tmp_path)
    assert row(text, "| decode | triton").endswith(
        f"| {page.NEVER} | | | | | | sm_80 at abc1234: 7 passed, 0 failed; "
        "sm_90 at abc1234 with changes: 7 passed, 2 failed |"
    )
    assert row(text, "| auxk | triton").endswith("| | |  |")


def test_a_kernel_whose_tests_were_all_skipped_has_not_run(tmp_path: Path) -> None:
    results(tmp_path, "a", {}, TESTS | {"passed": 0, "failed": 0, "skipped": 9})
    assert page.NEVER in row(page.generated(tmp_path), "| decode | triton")


@pytest.mark.parametrize(("field", "remedy"), [("device", "GPU"), ("commit", "--commit")])
def test_results_of_unknown_origin_are_refused(field: str, remedy: str, tmp_path: Path) -> None:
    results(tmp_path, "a", {field: None})
    with pytest.raises(ValueError, match=rf"names no {field}; .*{remedy}"):
        page.generated(tmp_path)


def test_bars_are_met_from_their_own_side() -> None:
    least = Bar("dense", "eai-sparsify", "ratio", 2, "", at_most=False)
    assert [least.met(v) for v in (1.9, 2.0, 2.1)] == [False, True, True]
    assert [least._replace(at_most=True).met(v) for v in (1.9, 2.0, 2.1)] == [True, True, False]
    records = [
        {"case": "dense", "provider": "eai-sparsify-fork", "ratio": 9.0},
        {"case": "dense", "provider": "eai-sparsify 1.3.3", "ratio": 3.0},
    ]
    assert least.value(records) == 3.0
    assert least._replace(case="step").value(records) is None


@pytest.mark.parametrize(
    ("record", "outcome"),
    [
        ({"kind": "failed", "what": "a test", "why": "x"}, "failed"),
        ({"kind": "check", "what": "repeats", "ok": False}, "failed"),
        ({"kind": "sanitized", "what": "memcheck", "finished": True, "ok": False}, "failed"),
        ({"kind": "sanitized", "what": "memcheck", "finished": False, "ok": None}, "incomplete"),
        ({"kind": "run", "what": "a module", "finished": False}, "incomplete"),
        ({"kind": "run", "what": "a module", "finished": True}, "passed"),
    ],
)
def test_one_bad_record_decides_a_stage(record: Record, outcome: str) -> None:
    good = [{"kind": "tests", "passed": 3}, {"kind": "sanitized", "finished": True, "ok": True}]
    assert verdict("tests", [*good, record])[0] == outcome


def test_tests_that_all_were_skipped_have_not_passed() -> None:
    skipped = {"kind": "tests", "kernel": "decode", "backend": "triton", "passed": 0}
    assert verdict("tests", [skipped]) == ("failed", "not one test ran")


def test_the_summary_says_what_was_skipped_and_which_bars_are_open() -> None:
    stage = {"kind": "stage", "what": "sanitizer", "outcome": "skipped", "seconds": 0, "why": "w"}
    text = summary([stage, STEP | {"of_floor": 1.75}], dry=False)
    assert row(text, "sanitizer").split() == ["sanitizer", "skipped", "0.0", "w"]
    assert "1.75 MISSED    <= 1.5  FusedStep at gpu-small: time over its floor" in text
    assert "open           <= 1.5  FusedStep at gpu-mid: time over its floor" in text


@pytest.mark.full
@no_gpu
def test_a_group_that_fails_does_not_stop_the_next() -> None:
    # Not a dry run, so they ask for a GPU: each fails in a process of its own.
    records = list(measure.measurements(["rates", "hot"], False, time.monotonic() + 100))
    assert [(r["kind"], r["group"]) for r in records] == [
        ("failed", "rates"),
        ("failed", "hot"),
    ]
    assert all("CUDA" in r["why"] or "NVIDIA" in r["why"] for r in records)
    assert verdict("measure", records)[0] == "failed"


@pytest.mark.full
def test_measurements_without_time_are_skipped_by_name() -> None:
    records = list(measure.measurements(list(measure.GROUPS), False, time.monotonic()))
    assert [(r["kind"], r["what"]) for r in records] == [("skipped", g) for g in measure.GROUPS]
    assert "s are left" in records[0]["why"]


def test_tests_that_are_stopped_are_incomplete() -> None:
    records = list(correctness.tests(True, 0.2))
    assert {r["finished"] for r in records if r["kind"] == "run"} == {False}
    assert verdict("tests", records)[0] == "incomplete"


def test_readings_are_taken_after_all_runs() -> None:
    events = []

    class Clock:
        def start(self):
            pass

        def stop(self):
            return lambda: events.append("read") or 1.0

    contestants = {name: (lambda n=name: events.append(n)) for name in "ab"}
    times = timing.interleaved(contestants, 2, Clock(), warmup=1)
    assert events == ["a", "b", "b", "a", "a", "b", *["read"] * 4]
    assert times["a"] == timing.Timing(1000.0, 1000.0, 1000.0)


@pytest.mark.parametrize("popularity", ["uniform", "hot", "zipf"])
def test_made_up_codes_are_distinct_latents_of_the_popularity(popularity: str) -> None:
    shape = Shape(2000, 8, 512, 8)
    latents = calls.latents(shape, popularity)
    assert (latents.dtype, latents.shape) == (torch.int32, (2000, 8))
    assert int(latents.min()) >= 0
    assert int(latents.max()) < 512
    assert all(len(set(tokens)) == 8 for tokens in latents.tolist())
    share = latents.flatten().bincount(minlength=512) / 2000
    if popularity == "uniform":  # 8/512 each, give or take five standard deviations
        assert float((share - 8 / 512).abs().max()) < 5 * (8 / 512 / 2000) ** 0.5
    else:
        assert share[0] > 0.99 if popularity == "hot" else share[0] > 0.3
    if popularity == "zipf":
        assert share[:4].sum() > share[256:].sum()


def test_every_kernel_for_gpus_has_arguments_to_be_called_with() -> None:
    assert {primitive for primitive, _ in calls.kernels()} <= set(primitives.NAMES)
    assert {backend for _, backend in calls.kernels()} <= set(GPU_BACKENDS)


def test_floors_are_what_the_formulas_give() -> None:
    # An H200's data sheet in round numbers, worked out by hand.
    rates = Rates(4e12, 5e12, 60 << 20)
    small = Shape(8192, 768, 65536, 32)
    uses = 2 * 8192 * 32 * 768  # 403 MB of rows, of 101 MB of weights
    assert floors.decode(small, rates) == pytest.approx(uses / 5e12)
    few = small._replace(B=64, K=1)
    assert floors.decode(few, rates) == pytest.approx(64 * 2 * 768 / 4e12)
    states = 65536 * 768 * 26 / 4e12
    assert floors.row_update(small, rates) == pytest.approx(states)
    rows = 65536 * 768 * 2 / 4e12
    assert floors.step(small, rates, 1e-3) == pytest.approx(1e-3 + rows + 2 * states)
    both = floors.decode_and_backward(small, rates)
    assert both == pytest.approx(3 * uses / 5e12 + rows)
    wide = small._replace(D=4096)  # 64 MiB of upstream gradients leave the cache
    uses, rows = 2 * 8192 * 32 * 4096, 65536 * 4096 * 2 / 4e12
    both = floors.decode_and_backward(wide, rates)
    assert both == pytest.approx(2 * uses / 5e12 + uses / 4e12 + rows)


def test_every_part_starts_where_nothing_writes_toml() -> None:
    # Images for GPUs have torch and Triton, and not every package that files of settings take.
    folder = Path(measure.__file__).parent
    parts = [f"benchmarks.gpu_check.{path.stem}" for path in sorted(folder.glob("*.py"))]
    imports = ", ".join([*parts, "sae_kernels.cli", "sae_kernels.training"])
    program = f"import sys; sys.modules['tomli_w'] = None; import {imports}"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
