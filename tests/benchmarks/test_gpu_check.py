"""The one command for a GPU machine: here it runs emulated, with faults planted, and is killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import calls
from benchmarks.calls import GPU_BACKENDS
from benchmarks.gpu_check import correctness, dry_run, floors, oracles, sanitizer, tasks
from benchmarks.gpu_check.bars import BARS
from benchmarks.gpu_check.bench import Bench
from benchmarks.gpu_check.journal import Journal, done
from benchmarks.gpu_check.processes import Place
from benchmarks.gpu_check.stages import STAGES
from sae_kernels import primitives
from sae_kernels.bench import timing
from sae_kernels.bench.cases import Shape
from sae_kernels.bench.work import Rates

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
PLANTED = Path(__file__).parent / "planted"
Record = dict[str, Any]
emulated = pytest.mark.skipif(
    dry_run.unavailable() is not None, reason=f"a dry run is emulated: {dry_run.unavailable()}"
)
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")


def command(out: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--out", str(out), *options]


def records(out: Path) -> list[Record]:
    """Whole records of a run so far, without its provenance."""
    path = out / "gpu_check.jsonl"
    lines = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def ends(found: list[Record]) -> dict[str, Record]:
    """The last record of each task; a task that ended twice would not be one."""
    last = [record for record in found if record["kind"] == "done"]
    assert len({record["task"] for record in last}) == len(last)
    return {record["task"]: record for record in last}


@pytest.mark.full
@emulated
def test_a_hang_a_crash_and_a_kill_cost_no_more_than_themselves(tmp_path: Path) -> None:
    # Named out of order: the order is that of the stages.
    only = ["--tasks", "gluon", "pick_dead", "code_grad", "row_sqnorm", "decode_residual"]
    run = command(tmp_path, "--budget", "500", "--stages", "oracles", "gluon", "tests", *only)
    planted = os.pathsep.join([str(PLANTED), str(ROOT)])
    surroundings = {"cwd": ROOT, "env": {**os.environ, "PYTHONPATH": planted}}
    with subprocess.Popen(run, stdout=subprocess.DEVNULL, **surroundings) as first:
        while not any(record["kind"] == "done" for record in records(tmp_path)):
            assert first.poll() is None
            time.sleep(0.05)
        first.kill()
    early = ends(records(tmp_path))
    with (tmp_path / "gpu_check.jsonl").open("a") as file:
        file.write('{"kind": "don')  # what was being written
    second = subprocess.run(
        [*run, "--resume"], capture_output=True, text=True, timeout=500, **surroundings
    )
    assert second.returncode == 1, second.stdout + second.stderr
    assert f"{len(early)} tasks were finished before" in second.stdout
    found = records(tmp_path)
    last = ends(found)
    assert {task: last[task] for task in early} == early
    assert {task: record["outcome"] for task, record in last.items()} == {
        "oracle code_grad triton": "failed",
        "oracle decode_residual triton": "failed",
        "oracle pick_dead triton": "passed",
        "oracle row_sqnorm triton": "failed",
        "oracle select_topk gluon": "passed",
        "primitives/test_pick_dead.py": "passed",
    }
    assert list(last)[-2:] == ["oracle select_topk gluon", "primitives/test_pick_dead.py"]
    why = {record["task"]: record["why"] for record in found if record["kind"] == "failed"}
    assert "killed after 5 s" in why["oracle decode_residual triton"]
    assert f"ended with {-signal.SIGABRT}" in why["oracle row_sqnorm triton"]
    wrong = next(r for r in found if r["kind"] == "oracle" and not r["ok"])
    assert wrong["kernel"] == "code_grad"
    assert "an error of 1, expected at most" in wrong["why"]
    counted = next(record for record in found if record["kind"] == "tests")
    assert (counted["kernel"], counted["backend"]) == ("pick_dead", "triton")
    assert counted["passed"] > 0 == counted["failed"]
    assert all(record["dry"] for record in found)


@pytest.mark.slow
@emulated
def test_a_whole_dry_run_passes_and_measures_what_every_bar_is_about(tmp_path: Path) -> None:
    run = subprocess.run(
        command(tmp_path, "--budget", "3000"), cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.rstrip().endswith("dry run: nothing was measured")
    found = records(tmp_path)
    last = ends(found)
    assert set(tasks.TASKS) <= last.keys()
    missing = {task for task, record in last.items() if record["outcome"] != "passed"}
    watched = {" ".join(each) for each in sanitizer.kernels()}
    assert missing == {"build", "bench", "gpu/test_gpu_select_topk.py", *watched}
    checked = {r["kernel"] for r in found if r["kind"] == "check"}
    assert checked == {*primitives.NAMES, "FusedStep"}
    cases = {record.get("case", record.get("what")) for record in found}
    for bar in BARS:
        assert bar.case in cases, bar
        memory = bar.field in ("extra_mib", "peak_gb")
        elsewhere = bar.provider == "eai-sparsify" or memory
        assert elsewhere or bar.value(found) is not None, bar


@pytest.mark.full
@no_gpu
def test_without_a_gpu_only_a_dry_run_is_made(tmp_path: Path) -> None:
    run = [part for part in command(tmp_path) if part != "--dry-run"]
    ended = subprocess.run(run, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1
    assert "expected a GPU that torch can use, found none; --dry-run" in ended.stderr


def test_the_page_has_every_stage_in_order() -> None:
    _, _, table = (ROOT / "docs" / "gpu.md").read_text().partition("| stage | what it does |")
    rows = [line.split("|")[1].strip() for line in table.partition("\n\n")[0].splitlines()[2:]]
    assert ", ".join(rows).split(", ") == list(STAGES)


def test_every_kernel_has_an_oracle_and_gluon_comes_after_the_others() -> None:
    names = [f"oracle {primitive} {backend}" for primitive, backend in calls.kernels()]
    assert [*tasks.ORACLES, *tasks.GLUON] == sorted(names, key=lambda name: "gluon" in name)
    assert all(task.limit_s == 20 for task in (tasks.ORACLES | tasks.GLUON).values())
    assert {each[1] for each in sanitizer.kernels()[:3]} == {"select_topk"}


def test_without_time_nothing_is_begun_and_nothing_counts_as_finished(tmp_path: Path) -> None:
    place = Place(tmp_path, True, time.monotonic())
    for name, stage in STAGES.items():
        found = list(stage(place)) if name not in ("build", "cache") else []
        assert {r["outcome"] for r in found} <= {"no time", "not available"}, name
    assert not (tmp_path / "logs").exists()


PROVENANCE = {"commit": "abc", "device": "a GPU", "dry": False}


def test_a_resumed_run_keeps_the_records_of_finished_tasks_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path, PROVENANCE, resume=False)
    for task, outcome in (("a", "passed"), ("b", "failed"), ("c", "no time")):
        journal.write({"kind": "fact", "task": task})
        journal.write(done(task, outcome, 1.0))
    journal.write({"kind": "fact", "task": "d"})
    again = Journal(tmp_path, PROVENANCE | {"time": "later"}, resume=True)
    assert again.finished() == {"a", "b"}
    assert [record["task"] for record in again.records] == ["a", "a", "b", "b"]
    assert records(tmp_path) == again.records
    with pytest.raises(ValueError, match="pass --resume"):
        Journal(tmp_path, PROVENANCE, resume=False)
    with pytest.raises(ValueError, match="began with commit abc, and this is def"):
        Journal(tmp_path, PROVENANCE | {"commit": "def"}, resume=True)


@pytest.mark.parametrize(
    ("last", "outcome", "why"),
    [
        ("exit 0", "passed", ""),
        ("echo 1 error; exit 86", "failed", "1 error"),
        ("sleep 60", "failed", "stopped after"),
    ],
)
def test_what_the_sanitizer_says_is_noted(
    last: str, outcome: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A program of its name that says what it was asked, as there is none without a GPU.
    program = tmp_path / "compute-sanitizer"
    program.write_text(f"#!/bin/sh\necho $*\n{last}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(sanitizer, "_LIMIT_S", 1)
    place = Place(tmp_path, False, time.monotonic() + 100, only=("memcheck select_topk triton",))
    found, end = sanitizer.first(place)
    assert (end["outcome"], found["kernel"], found["backend"]) == (outcome, "select_topk", "triton")
    assert why in found["why"]
    asked = place.log("memcheck select_topk triton").read_text()
    assert asked.startswith("--tool memcheck --error-exitcode 86 ")
    assert "benchmarks.gpu_check.oracles select_topk triton" in asked
    late = Place(tmp_path, False, time.monotonic() + 1)
    assert {record["outcome"] for record in sanitizer.first(late)} == {"no time"}


def test_a_run_on_another_machine_is_prepared_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path, PROVENANCE, resume=False)
    for task in ("build", "cache", "rates"):
        journal.write(done(task, "passed", 1.0))
    assert Journal(tmp_path, PROVENANCE, resume=True).finished() == {"rates"}


MODULE = """
import os
def test_passes(): pass
def test_ends_its_process(): os.abort()
def test_loses_the_context(): raise RuntimeError("CUDA error: an illegal memory access")
def test_never_ends():
    while True: pass
def test_comes_last(): pass
"""


@pytest.mark.full
def test_a_test_that_ends_or_stops_its_process_costs_itself_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = tmp_path / "test_planted.py"
    module.write_text(MODULE)
    monkeypatch.setattr(correctness, "modules", lambda dry: [correctness.Module(str(module), {})])
    monkeypatch.setattr(correctness, "_TEST_S", 2)
    found = list(correctness.tests(Place(tmp_path, True, time.monotonic() + 200)))
    assert found[-1]["outcome"] == "failed"
    why = {r["what"].partition("::")[2]: r["why"] for r in found if r["kind"] == "failed"}
    assert why.keys() == {"test_ends_its_process", "test_loses_the_context", "test_never_ends"}
    assert "its process ended" in why["test_ends_its_process"]
    assert "killed after 2 s" in why["test_never_ends"]
    (noted,) = (tmp_path / "logs").glob("*.jsonl")
    lines = map(json.loads, noted.read_text().splitlines())
    passed = [line["test"].partition("::")[2] for line in lines if line["outcome"] == "passed"]
    assert passed == ["test_passes", "test_comes_last"]


def test_what_differs_from_an_oracle_is_said() -> None:
    exact = [torch.tensor([1.0, -2.0]), torch.tensor([3, 4])]
    near = [exact[0] + 2 * oracles.TOLERANCE, exact[1]]
    assert oracles.difference(near, exact) == ""
    assert "an error of" in oracles.difference([exact[0] * 1.1, exact[1]], exact)
    assert "an error of nan" in oracles.difference([exact[0] * torch.nan, exact[1]], exact)
    assert "1 of 2 integers differ" in oracles.difference([exact[0], exact[1].clamp(max=3)], exact)
    assert "expected torch.float32 [2]" in oracles.difference([exact[0].half(), exact[1]], exact)


@pytest.mark.full
@emulated
def test_the_fused_products_are_watched() -> None:
    with dry_run.emulated():
        task = tasks.TASKS["epilogue gpu-small"]
        found = list(task.run(Bench(CPU, dry=True)))
    timed = {record["provider"] for record in found if record["kind"] == "time"}
    passing = ("nothing passes", "the k best pass")
    ours = {f"{backend}, {what}" for backend in ("triton", "gluon") for what in passing}
    assert timed == {"product alone", *ours}
    mean, most, over = [record["value"] for record in found if record["kind"] == "fact"][:3]
    # k = 5: a list holds that many once a pass was cut back, and more before.
    assert 5 <= mean <= most
    assert over == 0


@pytest.mark.full
@emulated
@pytest.mark.parametrize(
    "name",
    [
        "select_topk gpu-small",
        "select_threshold gpu-small",
        "select_batch_topk gpu-small",
        "select_threshold gpu-wide bf16",
    ],
)
def test_a_screen_is_timed_once_its_bits_were_compared(name: str) -> None:
    with dry_run.emulated():
        found = list(tasks.TASKS[f"screen {name}"].run(Bench(CPU, dry=True)))
    checked, *timed = found
    assert (checked["kind"], checked["kernel"], checked["ok"]) == ("check", name.split()[0], True)
    if "batch" not in name:
        passed, *timed = timed
        # Of 320 latents some 5 are kept; lists for so few may be too short for what passes.
        assert 1 < passed["value"] <= 320
    assert {record["provider"] for record in timed} == {"screened", "no screen", "torch"}


@pytest.mark.full
@emulated
def test_a_screen_that_changes_a_bit_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_kernels.primitives.select_topk import triton

    right = triton.run

    def wrong(*arguments: Any, screened: bool) -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = right(*arguments, screened=screened)
        values[3, 2] *= 1 + 2.0**-23 * screened
        return values, indices

    monkeypatch.setattr(triton, "run", wrong)
    with dry_run.emulated():
        checked, *_ = tasks.TASKS["screen select_topk gpu-small"].run(Bench(CPU, dry=True))
    assert (checked["different"], checked["ok"]) == (1, False)


def test_scores_of_the_oracles_are_the_same_in_every_order_of_summation() -> None:
    bench = Bench(CPU)
    x, W, *_ = oracles.arguments(bench, "select_topk", oracles.SHAPES[1])
    flipped = x.float().flip(1) @ W.float().flip(1).T
    assert (x.float() @ W.float().T).equal(flipped)
    assert (x.double() @ W.double().T).equal(flipped.double())


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
    assert both == pytest.approx(2 * uses / 5e12 + 2 * rows)
    wide = small._replace(D=4096)  # 64 MiB of upstream gradients leave the cache
    uses, rows = 2 * 8192 * 32 * 4096, 65536 * 4096 * 2 / 4e12
    both = floors.decode_and_backward(wide, rates)
    assert both == pytest.approx(uses / 5e12 + uses / 4e12 + 2 * rows)


def test_every_part_starts_where_nothing_writes_toml_and_nothing_is_built() -> None:
    # Images for GPUs have torch and Triton, and not every package that files of settings take.
    folder = Path(tasks.__file__).parent
    parts = [f"benchmarks.gpu_check.{path.stem}" for path in sorted(folder.glob("*.py"))]
    imports = ", ".join([*parts, "sae_kernels.cli", "sae_kernels.training"])
    program = (
        "import sys; sys.modules['tomli_w'] = sys.modules['sae_kernels._C'] = None\n"
        f"import {imports}\n"
        "first = benchmarks.gpu_check.__main__.where('abc', dry=True)\n"
        "print(*(first[name] for name in ('torch', 'commit', 'dirty', 'dry')))"
    )
    said = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert said.stdout.split() == [torch.__version__, "abc", "None", "True"], said.stderr
