"""Kernels compiled ahead of a loan: packed here, found there, and refused where they do not fit."""

from __future__ import annotations

import json
import zipfile
from typing import TYPE_CHECKING

import pytest

from benchmarks.gpu_check import build, dry_run, warm
from benchmarks.gpu_check.processes import Place

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        dry_run.unavailable() is not None, reason=f"nothing to link with: {dry_run.unavailable()}"
    ),
]
TASK = "oracle pick_dead triton"


def test_a_packed_cache_is_found_in_another_folder(tmp_path: Path) -> None:
    here, there, file = tmp_path / "here", tmp_path / "there", tmp_path / "warm.zip"
    (first,) = warm.compile_all([TASK], here, 500)
    assert (first["why"], first["found"]) == ("", 0)
    assert first["compiled"] > 0
    facts = warm.pack(here, file)
    here.rename(tmp_path / "gone")
    assert warm.mismatches(file) == []
    n = warm.unpack(file, there)
    assert n == facts["kernels"] == first["compiled"]
    assert list(there.rglob("*.cubin"))
    assert list(there.rglob("*.so")), "the launchers travel along"
    (second,) = warm.compile_all([TASK], there, 500)
    assert (second["found"], second["compiled"]) == (n, 0)


@pytest.mark.parametrize("what", list(warm.made_with()))
def test_a_cache_of_another_machine_is_named_and_not_unpacked(what: str, tmp_path: Path) -> None:
    file = tmp_path / "warm.zip"
    with zipfile.ZipFile(file, "w") as archive:
        facts = {"made with": warm.made_with() | {what: "another"}}
        archive.writestr("made_with.json", json.dumps(facts))
    place = Place(tmp_path / "run", True, 1e9, warm=file)
    first, last = build.cache(place)
    assert first["unpacked"] == 0
    assert first["why"] == f"{what}: the cache is of another, here is {warm.made_with()[what]}"
    assert not (place.folder / "triton").exists()
    assert last["outcome"] == "passed"


@pytest.mark.slow
def test_kernels_of_tests_are_compiled_by_running_them_emulated(tmp_path: Path) -> None:
    warm.compile_tests(tmp_path, "tests/primitives/test_pick_dead.py", "-n", "0")
    compiled = list(tmp_path.rglob("*.cubin"))
    assert {path.stem for path in compiled} == {
        "_pick_dead",
        "_sort_chunks",
        "_divide",
        "_write_chunks",
    }
    assert list(tmp_path.rglob("*.so"))


def test_compiling_that_takes_too_long_is_left_to_the_tasks(tmp_path: Path) -> None:
    (record,) = warm.compile_all([TASK], tmp_path / "cache", 0.5)
    assert record["kind"] == "failed"
    assert "not done after" in record["why"]
