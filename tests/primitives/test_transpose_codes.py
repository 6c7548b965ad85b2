"""transpose_codes on every backend against a sort written out in Python."""

from __future__ import annotations

import pytest
import torch

from sae_kernels.primitives.transpose_codes import transpose_codes
from sae_kernels.testing import assert_bitwise
from tests.primitives.transposing import SHAPES, expected, make

PRIMITIVES = ("transpose_codes",)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))


@shapes
@pytest.mark.parametrize("dropping", ["all", "float32", "float64"])
@pytest.mark.parametrize("own_rows", [False, True], ids=["token-rows", "given-rows"])
def test_against_python(
    shape: tuple[int, int, int], dropping: str, own_rows: bool, backend: str
) -> None:
    indices, values = make(shape)
    kept = None if dropping == "all" else values.to(getattr(torch, dropping))
    row_ids = torch.randint(0, 99, shape[:2], dtype=torch.int32) if own_rows else None
    offsets, entries, rows = transpose_codes(indices, kept, row_ids, shape[2], backend=backend)
    lists = expected(indices, kept, row_ids, shape[2])
    lengths = torch.tensor([len(pairs) for pairs in lists])
    assert offsets.tolist() == [0, *lengths.cumsum(0).tolist()]
    used = int(offsets[-1])
    flat = [pair for pairs in lists for pair in pairs]
    assert list(zip(entries[:used].tolist(), rows[:used].tolist(), strict=True)) == flat
    assert entries.shape == rows.shape == (indices.numel(),)
    # What lies past the last offset is zero even on poisoned memory: it may be used as an index.
    assert not bool(entries[used:].any())
    assert not bool(rows[used:].any())


def test_several_sets_laid_end_to_end(backend: str) -> None:
    indices = torch.tensor([1, 0, 1, 2], dtype=torch.int32)
    row_ids = torch.tensor([0, 1, 0, 1], dtype=torch.int32)
    offsets, entries, rows = transpose_codes(indices, None, row_ids, 3, backend=backend)
    assert offsets.tolist() == [0, 1, 3, 4]
    assert entries.tolist() == [1, 0, 2, 3]
    assert rows.tolist() == [1, 0, 0, 1]


@pytest.mark.parametrize("n_latents", [6, 3000])
def test_repeats_and_thread_counts_are_bitwise_equal(n_latents: int, isa: str) -> None:
    indices, values = make((333, 7, n_latents))
    first = transpose_codes(indices, values, None, n_latents, backend="cpu")
    for repeat in range(20):
        torch.set_num_threads((1, 2, 4)[repeat % 3])
        again = transpose_codes(indices, values, None, n_latents, backend="cpu")
        for name, a, b in zip(("offsets", "entries", "rows"), again, first, strict=True):
            assert_bitwise(f"{name}, repeat {repeat}", a, b)


@pytest.mark.parametrize("wrong", [-1, 7, 2**31 - 1, -(2**31)])
@pytest.mark.parametrize("value", [1.0, 0.0], ids=["kept", "dropped"])
def test_an_index_out_of_range_is_an_error_or_left_out(
    wrong: int, value: float, backend: str
) -> None:
    # Also that of a dropped entry, which keeps its latent: anything else is a corrupted set.
    indices = torch.zeros(9, 4, dtype=torch.int32)
    values = torch.ones(9, 4)
    indices[4, 2], values[4, 2] = wrong, value
    if backend in ("reference", "cpu"):
        with pytest.raises(IndexError, match=rf"expected latent indices in \[0, 7\), got {wrong}"):
            transpose_codes(indices, values, None, 7, backend=backend)
        return
    offsets, entries, rows = transpose_codes(indices, values, None, 7, backend=backend)
    others = [entry for entry in range(36) if entry != 4 * 4 + 2]
    assert offsets.tolist() == [0] + [35] * 7
    assert entries.tolist() == [*others, 0]
    assert rows.tolist() == [*(entry // 4 for entry in others), 0]
