"""The order in which stored rows are read: shuffled batches, and how they resume."""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.data import ShardDataset, ShuffledBatches, TensorRows
from tests.data.made_shards import D, named_rows, write

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.data.rows import Rows


def _names(batches: ShuffledBatches) -> list[list[int]]:
    return [batch[:, 0].int().tolist() for batch in batches]


SMALL = {"block_rows": 8, "window_blocks": 3}


@pytest.mark.parametrize("n", [1, 7, 8, 24, 25, 103])
@pytest.mark.parametrize("batch_size", [1, 4, 10, 60, 200])
def test_each_epoch_covers_each_row_once(n: int, batch_size: int) -> None:
    x = named_rows(n)
    batches = ShuffledBatches(x, batch_size, epochs=2, drop_last=False, **SMALL)
    names = []
    for batch in batches:
        assert torch.equal(batch, x[batch[:, 0].long()])
        names.append(batch[:, 0].int().tolist())
    per_epoch = math.ceil(n / batch_size)
    assert batches.position == len(names) == 2 * per_epoch
    epochs = [list(chain(*part)) for part in (names[:per_epoch], names[per_epoch:])]
    for epoch in epochs:
        assert sorted(epoch) == list(range(n))
    if n >= 7:  # also those of one block, whose rows alone can change places
        assert epochs[0] != epochs[1] != list(range(n))


def test_drop_last_gives_full_batches_only() -> None:
    batches = ShuffledBatches(named_rows(103), 10, epochs=2, **SMALL)
    names = _names(batches)
    assert batches.batches_per_epoch == 10
    assert [len(batch) for batch in names] == [10] * 20
    for part in (names[:10], names[10:]):
        assert len(set(chain(*part))) == 100


def test_shards_and_memory_give_the_same_batches(tmp_path: Path) -> None:
    x = write(tmp_path, n=103)
    options: dict[str, Any] = {"seed": 3, "epochs": 2, **SMALL}
    disk = ShuffledBatches(ShardDataset(tmp_path), 10, **options)
    for ours, theirs in zip(disk, ShuffledBatches(x, 10, **options), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("skip", [0, 1, 9, 10, 17, 20, 25])
def test_skip_resumes_exactly(skip: int) -> None:
    x = named_rows(103)
    straight = _names(ShuffledBatches(x, 10, epochs=2, **SMALL))
    assert _names(ShuffledBatches(x, 10, epochs=2, skip=skip, **SMALL)) == straight[skip:]


def test_endless_by_default_and_another_seed_is_another_order() -> None:
    x = named_rows(40)
    one, two = ShuffledBatches(x, 20), ShuffledBatches(x, 20, seed=1)
    first = [next(one)[:, 0].tolist() for _ in range(9)]
    assert first != [next(two)[:, 0].tolist() for _ in range(9)]
    assert one.position == 9


class _Counting:
    """A source that notes what is read."""

    def __init__(self, n: int) -> None:
        self._source = TensorRows(named_rows(n))
        self.n_tokens, self.d_in, self.dtype = n, D, torch.float32
        self.reads: list[tuple[int, int]] = []

    def rows(self, start: int, stop: int) -> Rows:
        self.reads.append((start, stop))
        return self._source.rows(start, stop)


def test_reading_is_by_blocks_and_each_once() -> None:
    source = _Counting(800)
    assert len(list(ShuffledBatches(source, 5, epochs=1, **SMALL))) == 160
    blocks = [read for read in source.reads if read != (0, 1)]
    assert sorted(blocks) == [(i, i + 8) for i in range(0, 800, 8)]


def test_blocks_and_each_window_have_an_order_of_their_own() -> None:
    source = _Counting(48)
    windows = _names(ShuffledBatches(source, 24, epochs=1, **SMALL))
    blocks = [start for start, stop in source.reads if stop - start == 8]
    assert blocks != sorted(blocks)
    places = []
    for window, firsts in zip(windows, (blocks[:3], blocks[3:]), strict=True):
        lying = [first + i for first in firsts for i in range(8)]
        places.append([lying.index(name) for name in window])
    assert sorted(places[0]) == sorted(places[1]) == list(range(24))
    assert places[0] != places[1]


def test_skipping_reads_nothing_that_is_skipped() -> None:
    source = _Counting(800)
    next(ShuffledBatches(source, 5, skip=100, **SMALL))
    assert len(source.reads) <= 1 + 2 * 3


def test_batches_stay_as_they_were_given() -> None:
    x = named_rows(103)
    kept = list(ShuffledBatches(x, 10, epochs=1, **SMALL))
    assert all(torch.equal(batch, x[batch[:, 0].long()]) for batch in kept)
    kept[0].zero_()
    assert x[1:, 0].all()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"batch_size": 11},
        {"batch_size": 1, "skip": -1},
        {"batch_size": 1, "epochs": 0},
        {"batch_size": 1, "block_rows": 0},
    ],
)
def test_batches_refuse(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected"):
        ShuffledBatches(named_rows(10), **options)
    with pytest.raises(ValueError, match=r"\[N, D\]"):
        ShuffledBatches(torch.ones(3), 1)
