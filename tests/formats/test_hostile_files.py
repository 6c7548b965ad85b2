"""Damaged files and files made to harm: one clear error each, soon, and in little memory.

`hostile` holds the corpus; a process of its own reads it under a limit of memory.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hostile import FLIPS, FORMATS
from hostile_pickles import pickled

from sae_kernels.errors import DataError
from sae_kernels.formats import read_gemma_scope
from sae_kernels.io.state_dicts import stored_state_dict

SECONDS, GROWTH = 1.0, 48  # of processor time, and MiB: some of the files claim gigabytes


pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs limits of memory, and pipes")


def _run(flips: int, timeout: float) -> list[dict[str, Any]]:
    """In memory where that is a folder: thousands of small files wait long for a disk."""
    script = Path(__file__).with_name("hostile_run.py")
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=memory) as place:
        done = subprocess.run(
            [sys.executable, str(script), place, str(flips)],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (done.returncode, lines[-1:], done.stderr[-2000:])
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    return _run(FLIPS, 300)


def _check(results: list[dict[str, Any]]) -> None:
    wrong = [r for r in results if r["came"] not in ("read", "refused")]
    assert not wrong, wrong[:20]
    slow = [r for r in results if r["seconds"] > SECONDS]
    assert not slow, slow
    large = [r for r in results if r["grown"] > GROWTH]
    assert not large, large


@pytest.mark.full
def test_every_case_is_read_or_refused_soon_and_in_little_memory(results: Any) -> None:
    _check(results)


@pytest.mark.full
def test_what_is_no_sae_is_refused(results: Any) -> None:
    read = [r["case"] for r in results if r["must_fail"] and r["came"] == "read"]
    assert not read, read


@pytest.mark.full
def test_messages_are_one_short_line_and_name_the_file(results: Any) -> None:
    for result in results:
        if result["came"] == "refused":
            message = result["message"]
            assert message.isprintable(), result
            assert "folder" in message, result
            assert len(message) < 1200, result


@pytest.mark.full
def test_no_refusal_is_a_want_of_memory(results: Any) -> None:
    """The limit on the address space must not be what refuses."""
    for result in results:
        message = result["message"].lower()
        assert "memory" not in message, result
        assert "alloc" not in message, result


@pytest.mark.full
def test_the_corpus_reaches_every_format(results: Any) -> None:
    counts = Counter((r["case"].split(": ")[0], r["came"]) for r in results)
    for format in FORMATS:
        assert counts[format, "refused"] > 100, counts  # of some 60 flips and every structural case
        assert counts[format, "read"] > 1, counts


@pytest.mark.parametrize("old", [False, True])
def test_every_hostile_pickle_is_refused_for_itself(tmp_path: Path, old: bool) -> None:
    """Not for the tensors that it lacks: the same file with an honest pickle is read."""
    path = tmp_path / "ae.pt"
    for name, content in pickled(old).items():
        path.write_bytes(content)
        if name == "honest":
            stored = stored_state_dict(path)
            assert stored.sizes == {"bias": (4,)}
            assert stored.load()["bias"].tolist() == [0, 0, 0, 0]
        else:
            with pytest.raises(DataError):
                stored_state_dict(path).load()


def test_weights_that_shrink_a_hundred_times_are_read(tmp_path: Path) -> None:
    """A file may claim 64 times its length and 64 MiB: a new SAE may well be all zeros."""
    arrays = {"W_enc": np.zeros((64, 4096), "f4"), "W_dec": np.zeros((4096, 64), "f4")}
    arrays |= {"b_enc": np.zeros(4096, "f4"), "b_dec": np.zeros(64, "f4")}
    path = tmp_path / "params.npz"
    np.savez_compressed(path, threshold=np.ones(4096, "f4"), **arrays)
    assert path.stat().st_size * 100 < sum(array.nbytes for array in arrays.values())
    assert read_gemma_scope(path).config.n_latents == 4096


@pytest.mark.slow
def test_many_more_flips() -> None:
    _check(_run(20_000, 3600))
