"""Data sets larger than memory, read through a few maps; files of other data sets among them."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import pytest
import torch

from benchmarks.data_path import sparse_data_set
from sae_kernels.data import ShardDataset, ShardWriter, ShuffledBatches
from sae_kernels.errors import DataError
from sae_kernels.testing import assert_bitwise

D = 8


def _mapped(folder: Path) -> set[str]:
    """The shards that the process has mapped."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.rpartition("/")[2] for line in lines if str(folder) in line}


def _rows(n: int) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(0))


def _write(folder: Path, n: int = 50, d_in: int = D, dtype: torch.dtype = torch.float32) -> None:
    with ShardWriter(folder, d_in, rows_per_shard=5, dtype=dtype) as writer:
        writer.write(torch.ones(n, d_in) if d_in != D else _rows(n))


def test_100_gb_open_in_a_second_and_give_rows(tmp_path: Path) -> None:
    sparse_data_set(tmp_path, shards=400, d_in=768, shard_bytes=256 << 20)
    start = time.perf_counter()
    data = ShardDataset(tmp_path)
    assert time.perf_counter() - start < 1
    assert data.n_tokens * data.d_in * 4 == 400 * ((256 << 20) // 3072) * 3072
    last = data.rows(data.n_tokens - 2, data.n_tokens).activations
    assert_bitwise("rows", last, torch.zeros(2, 768))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of maps")
@pytest.mark.parametrize("check", [False, True])
def test_few_shards_are_mapped_at_a_time(tmp_path: Path, check: bool) -> None:
    _write(tmp_path)
    data, x = ShardDataset(tmp_path, check_on_read=check), _rows(50)
    assert _mapped(tmp_path) == set(), "opening maps nothing for good"
    for start in (*range(0, 50, 5), *range(45, -1, -5)):
        assert_bitwise("rows", data.rows(start, start + 5).activations, x[start : start + 5])
        assert len(_mapped(tmp_path)) <= 4
    for batch in ShuffledBatches(data, 7, epochs=2, block_rows=3, window_blocks=2):
        assert batch.shape == (7, D)
        assert len(_mapped(tmp_path)) <= 4
    # A view keeps its own file for as long as it lives.
    view = data.rows(0, 5).activations
    data.rows(5, 50)
    assert_bitwise("view", view, x[:5])
    del data, view
    assert _mapped(tmp_path) == set()


def test_content_is_compared_once(tmp_path: Path) -> None:
    _write(tmp_path)
    data = ShardDataset(tmp_path, check_on_read=True)
    data.rows(0, 5)
    path = tmp_path / "shard_00000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    data.rows(5, 50)  # until the first is no longer mapped
    data.rows(0, 5)
    with pytest.raises(DataError, match="shard_00000"):
        ShardDataset(tmp_path, check_on_read=True).rows(0, 5)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"d_in": 9}, r"'activations': \('F32', \[5, 8\]\).*got.*\[5, 9\]"),
        ({"dtype": torch.bfloat16}, r"'F32'.*got.*'BF16'"),
        ({"dtype": torch.float16, "d_in": 2 * D}, r"'F32', \[5, 8\].*got.*'F16', \[5, 16\]"),
    ],
)
def test_a_shard_of_another_data_set_is_named(
    tmp_path: Path, other: dict[str, object], message: str
) -> None:
    _write(tmp_path / "a")
    _write(tmp_path / "b", **other)  # type: ignore[arg-type]
    name = "shard_00003.safetensors"
    shutil.copy(tmp_path / "b" / name, tmp_path / "a" / name)
    index = tmp_path / "a" / "index.json"
    record = json.loads(index.read_text())
    size = (tmp_path / "a" / name).stat().st_size
    if record["shards"][3]["bytes"] != size:
        with pytest.raises(DataError, match=rf"{name}: expected \d+ bytes, got {size}"):
            ShardDataset(tmp_path / "a")
    record["shards"][3]["bytes"] = size
    index.write_text(json.dumps(record))
    with pytest.raises(DataError, match=f"{name}: expected .*{message}.*; put the shard of this"):
        ShardDataset(tmp_path / "a")
