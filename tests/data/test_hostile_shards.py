"""Damaged and forged data sets: an error that names the file, soon, and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sae_kernels.data import ShardDataset, ShuffledBatches
from sae_kernels.errors import DataError
from tests.data import hostile_shards

MEMORY = 256 << 20  # bytes of address space beyond what the process has once it is warm


@pytest.fixture(scope="module")
def outcomes() -> dict[str, tuple[str, float]]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.data.hostile_shards", str(MEMORY)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, tuple[str, float]] = json.loads(done.stdout)
    return result


@pytest.mark.full
@pytest.mark.parametrize("name", hostile_shards.CASES)
def test_forged_ones_are_refused(name: str, outcomes: dict[str, tuple[str, float]]) -> None:
    result, seconds = outcomes[name]
    assert result.startswith("DataError: ")
    assert "index.json" in result or "shard_0000" in result
    assert len(result) < 2000
    assert seconds < 1


@pytest.mark.full
def test_flipped_bits_are_found_or_change_nothing(outcomes: dict[str, tuple[str, float]]) -> None:
    flips = {name: result for name, result in outcomes.items() if name.startswith("flip")}
    assert len(flips) == hostile_shards.FLIPS
    for name, (result, seconds) in flips.items():
        assert result == "equal" or result.startswith("DataError: "), name
        assert "shard" not in name or result != "equal", "SHA-256 covers every bit of a shard"
        assert seconds < 1


def test_flips_of_a_payload_are_found_when_they_are_read(tmp_path: Path) -> None:
    hostile_shards.write(tmp_path)
    path = tmp_path / "shard_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    data = ShardDataset(tmp_path, check_on_read=True)
    data.rows(0, 30)  # the other shard is whole
    for _ in range(2):
        with pytest.raises(DataError, match=r"shard_00001\.safetensors changed since written"):
            data.rows(29, 31)
    with pytest.raises(DataError, match=r"shard_00001\.safetensors"):
        list(ShuffledBatches(data, 10, epochs=1))
    ShardDataset(tmp_path).rows(0, 50)  # nobody asked


def test_a_shard_that_changes_after_opening_is_refused(tmp_path: Path) -> None:
    hostile_shards.write(tmp_path)
    data = ShardDataset(tmp_path)
    path = hostile_shards.shard(tmp_path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"shard_00000\.safetensors: expected .* bytes"):
        data.rows(0, 10)
    path.unlink()
    with pytest.raises(DataError, match=r"shard_00000\.safetensors is missing"):
        data.rows(0, 10)


def test_nothing_is_executed(tmp_path: Path) -> None:
    class Malice:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "executed",)

    folder = tmp_path / "data"
    hostile_shards.write(folder)
    torch.save(Malice(), hostile_shards.shard(folder))
    size = hostile_shards.shard(folder).stat().st_size
    hostile_shards.shards_are(bytes=size)(folder)
    with pytest.raises(DataError, match="no safetensors file"):
        ShardDataset(folder)
    assert not (tmp_path / "executed").exists()
