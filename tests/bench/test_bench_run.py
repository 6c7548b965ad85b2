"""The harness on contestants that are slow, wrong or broken, and interrupted half way."""

from __future__ import annotations

import json
import os
import pkgutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from sae_kernels import primitives
from sae_kernels.bench import results
from sae_kernels.bench.cases import Case, Shape, step
from sae_kernels.bench.contestants.clock import PHASES, phase_of
from sae_kernels.bench.providers import Provider, chosen
from sae_kernels.bench.run import BenchRun, BenchSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

HERE = Path(__file__).parent
CASE = step(Shape(64, 32, 256, 4), "uniform")
SETTINGS = BenchSettings(threads=1, rounds=3)


FAULTS = {
    "latent": "kept latents",
    "value": "code at",
    "reconstruction": "reconstruction at",
    "direction": "training",
    "idle": "training",
    "nan": "finite",
}
OPERATORS = [
    Case(op, mode, CASE.shape, "uniform")
    for op, mode in (
        ("encode", "inference"),
        ("decode", "inference"),
        ("sae", "inference"),
        ("sae", "forward"),
        ("sae", "backward"),
    )
]
STEPS = [step(CASE.shape, "zipf", name) for name in ("topk", "batch_topk", "jumprelu", "relu")]


@pytest.fixture(autouse=True, scope="module")
def planted() -> Iterator[None]:
    """Lets worker processes import the contestants of this folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(HERE), prepend=os.pathsep)
        yield


def provider(module: str, name: str = "planted", **options: Any) -> Provider:
    return Provider(name, "float32", f"planted.{module}", options)


def run(*providers: Provider, settings: BenchSettings = SETTINGS) -> dict[str, results.Record]:
    with BenchRun(providers, settings) as bench:
        return {record["provider"]: record for record in bench.records([CASE])}


@pytest.fixture(scope="module")
def wrong(planted: None) -> dict[str, results.Record]:
    return run(*(provider("wrong", fault, fault=fault) for fault in (*FAULTS, "none")))


@pytest.fixture(scope="module")
def broken(planted: None) -> dict[str, results.Record]:
    """Three that break, each in its way, beside one that does not."""
    who = [provider("failing", how, how=how) for how in ("raises", "dies", "unable")]
    return run(*who, Provider("dense", "float32", "dense", {}))


@pytest.fixture(scope="module")
def everything(planted: None) -> dict[str, list[results.Record]]:
    """Ours and dense torch in every operator and architecture, by case."""
    cases = [*OPERATORS, *STEPS]
    who = chosen(["dense"], "cpu")
    with BenchRun(who, SETTINGS) as bench:
        found = list(bench.records(cases))
    return {
        case.name: [record for record in found if record["case"] == case.name] for case in cases
    }


def test_a_planted_delay_is_measured() -> None:
    found = run(Provider("dense", "float32", "dense", {}), provider("slow"))
    assert found["planted"]["p20_ms"] >= 50  # the sleep alone
    assert found["planted"]["median_ms"] - found["dense"]["median_ms"] > 40


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_result_is_refused_and_has_no_time(
    fault: str, wrong: dict[str, results.Record]
) -> None:
    assert wrong[fault]["status"] == "refused"
    assert FAULTS[fault] in wrong[fault]["reason"]
    assert "median_ms" not in wrong[fault]


def test_the_contestant_without_a_fault_is_accepted(wrong: dict[str, results.Record]) -> None:
    assert wrong["none"]["status"] == "measured"


@pytest.mark.full
@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("raises", "failed", "ArithmeticError: planted failure"),
        ("dies", "failed", "ended with 3"),
        ("unable", "unable", "planted inability"),
    ],
)
def test_one_that_breaks_leaves_the_others_alone(
    how: str, status: str, words: str, broken: dict[str, results.Record]
) -> None:
    assert broken[how]["status"] == status
    assert words in broken[how]["reason"]
    assert broken["dense"]["status"] == "measured"


def test_a_library_that_is_not_there_is_said_to_be_missing() -> None:
    record = run(Provider("missing", "float32", "planted.no_such_module", {}))["missing"]
    assert record["status"] == "unable"
    assert "no_such_module" in record["reason"]


@pytest.mark.full
@pytest.mark.parametrize("case", [*OPERATORS, *STEPS], ids=lambda case: case.name)
def test_everything_passes_the_gate_and_is_timed(
    case: Case, everything: dict[str, list[results.Record]]
) -> None:
    for record in everything[case.name]:
        if record["provider"] == "product" and case.operation == "decode":
            assert record["status"] == "unable"
            continue
        if record["dtype"] == "bfloat16" and "times as long" in (record["reason"] or ""):
            assert record["provider"] != "ours"  # the CPU has no bf16 units
            continue
        assert record["status"] == "measured", record["reason"]
        assert record["p20_ms"] <= record["median_ms"] <= record["p80_ms"]
        assert record["provider"] == "copy" or record["max_error"] <= record["error_budget"]


@pytest.mark.full
def test_ratios_are_of_the_same_dtype_and_of_what_is_shipped(
    everything: dict[str, list[results.Record]],
) -> None:
    records = everything[STEPS[0].name]
    time_of = {(r["provider"], r["dtype"]): r["median_ms"] for r in records}
    (shipped,) = (r for r in records if r["provider"] == "ours" and r["as_shipped"])
    dense = [record for record in records if record["provider"] == "dense"]
    assert len(dense) == 2
    for record in results.measured(dense):
        ours = record["median_ms"] / time_of["ours", record["dtype"]]
        assert record["speedup_of_ours"] == pytest.approx(ours, rel=1e-3)
        default = record["median_ms"] / shipped["median_ms"]
        assert record["speedup_of_ours_default"] == pytest.approx(default, rel=1e-3)


def test_every_operator_of_ours_counts_for_a_phase() -> None:
    names = [module.name for module in pkgutil.iter_modules(primitives.__path__) if module.ispkg]
    assert len(names) >= 8
    assert {phase_of(f"sae_kernels::{name}") for name in names} < set(PHASES)


@pytest.mark.full
def test_an_idle_worker_takes_no_time_of_the_processor() -> None:
    """Its threads sleep after a parallel kernel: under 2 % of a core."""
    two = BenchSettings(threads=2, rounds=3)
    with BenchRun([p for p in chosen([], "cpu") if p.name == "ours"], two) as bench:
        list(bench.records([step(Shape(512, 128, 2048, 16), "uniform")]))
        (worker, *_) = bench._workers.values()
        before = _cpu_seconds(worker.pid)
        time.sleep(1.0)
        assert _cpu_seconds(worker.pid) - before < 0.02


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def test_what_does_not_fit_the_budget_is_skipped_and_said_so() -> None:
    with BenchRun([provider("slow")], BenchSettings(threads=1, budget_s=1e-3)) as bench:
        time.sleep(0.01)
        records = list(bench.records([CASE]))
    assert [record["status"] for record in records] == ["skipped"]
    assert "over" in records[0]["reason"]


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ended_half_way_it_keeps_what_was_measured(number: int, code: int, tmp_path: Path) -> None:
    """In the second case: the first is in the file, and the exit code is that of the signal."""
    out = tmp_path / "results.jsonl"
    shapes = "step-topk-(256x64|512x256|1024)"
    command = [sys.executable, "-m", "sae_kernels", "bench", "--preset", "crossover"]
    command += ["--only", shapes, "--against", "", "--rounds", "2000", "--budget", "27"]
    command += ["--threads", "1", "--out", str(out)]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    lines = 2 + len(chosen([], "cpu"))  # of provenance there are two
    _wait_for(lambda: out.exists() and out.read_text().count("\n") == lines, process)
    time.sleep(1.0)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == code, errors
    read = results.read(out)
    first, *others = read.cases().values()
    assert {r["status"] for r in first} <= {"measured", "unable"}
    assert {r["provider"] for r in results.measured(first)} == {"ours", "product", "copy"}
    assert {r["status"] for records in others for r in records} <= {"measured", "skipped"}
    assert all(json.dumps(record) for record in read.records)


def _wait_for(condition: Any, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < end, "nothing was measured in 90 s"
        time.sleep(0.1)
