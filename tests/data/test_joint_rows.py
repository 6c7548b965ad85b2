"""Several sources read together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.data import JointRows, ShardDataset, ShardWriter, ShuffledBatches, TensorRows
from sae_kernels.errors import DataError
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor


def _shards(folder: Path, x: Tensor, tokens: Tensor | None = None) -> ShardDataset:
    with ShardWriter(folder, x.shape[1], rows_per_shard=7, dtype=x.dtype) as writer:
        documents = None if tokens is None else torch.arange(len(x)) // 5
        writer.write(x, tokens, documents)
    return ShardDataset(folder)


def test_rows_stand_side_by_side(tmp_path: Path) -> None:
    parts = [torch.randn(20, width) for width in (3, 1, 4)]
    ids = torch.arange(20)
    sources = [_shards(tmp_path / "a", parts[0], ids), TensorRows(parts[1]), parts[2]]
    joint = JointRows(sources)
    assert (joint.n_tokens, joint.d_in, joint.dtype) == (20, 8, torch.float32)
    for start, stop in ((0, 20), (5, 9), (6, 15), (19, 20), (4, 4)):
        rows = joint.rows(start, stop)
        assert_bitwise("rows", rows.activations, torch.cat(parts, dim=1)[start:stop])
        assert rows.tokens is not None
        assert rows.tokens.tolist() == ids[start:stop].tolist()
        assert rows.documents is not None
        assert rows.documents.tolist() == (ids[start:stop] // 5).tolist()


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ((torch.bfloat16, torch.bfloat16), torch.bfloat16),
        ((torch.bfloat16, torch.float32), torch.float32),
        ((torch.float16, torch.bfloat16), torch.float32),  # neither holds the other
        ((torch.float32, torch.float64), torch.float64),
    ],
)
def test_the_dtype_holds_all_of_them(
    dtypes: tuple[torch.dtype, torch.dtype], expected: torch.dtype
) -> None:
    parts = [torch.randn(6, 2).to(dtype) for dtype in dtypes]
    joint = JointRows(parts)
    assert joint.dtype == expected
    rows = joint.rows(0, 6).activations
    for i, part in enumerate(parts):
        assert_bitwise("part", rows[:, 2 * i : 2 * i + 2].contiguous(), part.to(expected))


def test_batches_of_them_are_rows_of_them() -> None:
    left = torch.arange(40.0)[:, None]
    batches = list(ShuffledBatches(JointRows([left, -left, 2 * left]), 8, epochs=1))
    rows = torch.cat(batches)
    assert sorted(rows[:, 0].tolist()) == left.flatten().tolist()
    assert_bitwise("the same token", rows[:, 1], -rows[:, 0])
    assert_bitwise("the same token", rows[:, 2], 2 * rows[:, 0])


def test_sources_of_different_lengths_are_refused() -> None:
    with pytest.raises(ValueError) as error:
        JointRows([torch.zeros(4, 2), torch.zeros(5, 2), torch.zeros(4, 1)])
    assert str(error.value) == (
        "sources: expected the same tokens in each, got [4, 5, 4] rows; harvest all of them from "
        "the same text"
    )
    with pytest.raises(ValueError, match="sources: expected at least one, got none"):
        JointRows([])
    with pytest.raises(ValueError, match="expected floating point activations"):
        JointRows([torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64)])


def test_different_tokens_are_found_while_reading(tmp_path: Path) -> None:
    ids, x = torch.arange(20), torch.randn(20, 2)
    other = ids.clone()
    other[13] = 99
    joint = JointRows([_shards(tmp_path / "a", x, ids), _shards(tmp_path / "b", x, other)])
    joint.rows(0, 13)
    with pytest.raises(DataError) as error:
        joint.rows(10, 20)
    assert str(error.value) == (
        f"row 13: expected the same token in all sources, got 13 ({tmp_path}/a/shard_00001."
        f"safetensors, row 6) and 99 ({tmp_path}/b/shard_00001.safetensors, row 6); harvest all of "
        "them from the same text"
    )
    # Who has no tokens cannot be asked.
    JointRows([_shards(tmp_path / "c", x, ids), x]).rows(0, 20)


def test_one_source_is_itself() -> None:
    x = torch.randn(5, 3)
    assert_bitwise("rows", JointRows([x]).rows(1, 4).activations, x[1:4])
