"""The page about GPUs and its bars, from results that were made up."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks import emulated
from benchmarks.gpu_check import page
from benchmarks.gpu_check.__main__ import summary
from benchmarks.gpu_check.bars import Bar

if TYPE_CHECKING:
    from pathlib import Path

Record = dict[str, Any]
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
TESTS = {
    "kind": "tests",
    "task": "primitives/test_decode.py",
    "kernel": "decode",
    "backend": "triton",
    "skipped": 0,
}
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
    more = TESTS | {"task": "primitives/test_decode_forms.py", "passed": 4, "failed": 0}
    new = (TESTS | {"passed": 3, "failed": 1}, more, STEP | {"of_floor": 1.75})
    results(tmp_path, "new", {}, *new)
    old = {"time": "2029-01-01T00:00:00Z", "commit": "0000000"}
    results(tmp_path, "old", old, TESTS | {"passed": 5, "failed": 0}, STEP | {"of_floor": 1.25})
    text = page.generated(tmp_path)
    where = "NVIDIA H200 | abc1234 | 2030-01-02"
    assert row(text, "| decode | triton") == f"| decode | triton | {where} | 7 | 1 | - |  |"
    assert page.NEVER in row(text, "| FusedStep | automatic")
    bar = row(text, "| FusedStep at gpu-small, as a CUDA graph: time over its floor")
    assert bar.endswith(f"| at most 1.5 | 1.75 (missed) | {where} |")
    assert "| open |" in row(text, "| FusedStep at gpu-mid, as a CUDA graph: time over its floor")
    assert text.index("### gpu-new") < text.index("### gpu-old")
    head = "by hand\n"
    assert page.written(head + page.MARK + "outdated", tmp_path) == head + text


def test_the_page_says_what_passed_in_the_emulator(tmp_path: Path) -> None:
    for architecture, dirty, failed in (("sm_80", False, 0), ("sm_90", True, 2)):
        first = {"provenance": {"commit": "def5678"}, "architecture": architecture}
        ran = {"backend": "triton", "commit": "abc1234", "dirty": dirty}
        decode = ran | {"kernel": "decode", "passed": 7, "failed": failed, "skipped": 1}
        none = ran | {"kernel": "auxk", "passed": 0, "failed": 0, "skipped": 3}
        lines = [json.dumps(line) for line in (first, decode, none)]
        (tmp_path / f"emulated-{architecture}.jsonl").write_text("\n".join(lines))
    text = page.generated(tmp_path)
    assert row(text, "| decode | triton").endswith(
        f"| {page.NEVER} | | | | | | sm_80 at abc1234: 7 passed, 0 failed; "
        "sm_90 at abc1234 with changes: 7 passed, 2 failed |"
    )
    assert row(text, "| auxk | triton").endswith("| | |  |")


def test_emulated_runs_of_some_tests_keep_what_is_known_of_other_kernels() -> None:
    known, ran = ("auxk", "triton"), ("decode", "triton")
    old = emulated.merged("sm_80", {kernel: Counter(passed=5) for kernel in (known, ran)}, "")
    first, *lines = old.splitlines()
    earlier = [json.dumps(json.loads(line) | {"commit": "abc1234"}) for line in lines]
    new = emulated.merged("sm_80", {ran: Counter(passed=7)}, "\n".join([first, *earlier]))
    found = {line["kernel"]: line for line in map(json.loads, new.splitlines()[1:])}
    assert {kernel: line["passed"] for kernel, line in found.items()} == {"auxk": 5, "decode": 7}
    assert found["auxk"]["commit"] == "abc1234" != found["decode"]["commit"]
    assert "auxk" not in emulated.merged("sm_80", {ran: Counter(passed=7)}, "")


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


def test_the_page_refuses_a_dry_run(tmp_path: Path) -> None:
    results(tmp_path, "a", {"dry": True}, STEP)
    with pytest.raises(ValueError, match=r"gpu-a\.jsonl: expected .* dry run"):
        page.generated(tmp_path)
    results(tmp_path, "a", {"dry": False}, STEP | {"dry": True})
    with pytest.raises(ValueError, match="dry run"):
        page.generated(tmp_path)


def test_the_summary_says_what_failed_or_lacked_time_and_which_bars_are_open() -> None:
    done = {"kind": "done", "task": "rates", "outcome": "failed", "seconds": 1.0, "why": "a\nb"}
    late = {"kind": "done", "task": "hot", "outcome": "no time", "seconds": 0.0, "why": "2 s left"}
    kernels = {"kind": "kernels", "cached": 7, "compiled": ["_decode_kernel"]}
    text = summary([done, late, kernels, STEP | {"of_floor": 1.75}], dry=False)
    assert "1 failed, 1 no time" in text
    assert "failed   rates: b" in text
    assert "no time  hot: 2 s left" in text
    assert "found in the cache 7, compiled by the tasks 1" in text
    small = "FusedStep at gpu-small, as a CUDA graph: time over its floor"
    assert f"1.75 MISSED    <= 1.5  {small}" in text
    assert f"open           <= 1.5  {small.replace('small', 'mid')}" in text
