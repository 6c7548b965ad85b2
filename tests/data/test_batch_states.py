"""Where a stream of batches stands, kept as JSON; and reading that is spread evenly."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sae_kernels.data import JointRows, ShardDataset, ShardWriter, ShuffledBatches, TensorRows
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.data.rows import Rows

SMALL: dict[str, Any] = {"block_rows": 8, "window_blocks": 3}


class Streamed:
    """A source that is not in memory as far as anyone knows; notes what is read and when."""

    def __init__(self, n: int, d_in: int = 2) -> None:
        self._rows = TensorRows(torch.arange(float(n * d_in)).view(n, d_in))
        self.n_tokens, self.d_in, self.dtype = n, d_in, torch.float32
        self.reads: list[tuple[int, int]] = []

    def rows(self, start: int, stop: int) -> Rows:
        self.reads.append((start, stop))
        return self._rows.rows(start, stop)

    def all(self) -> Tensor:
        return self._rows.rows(0, self.n_tokens).activations


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("drop_last", [False, True])
def test_a_state_goes_on_exactly_anywhere(resident: bool, drop_last: bool) -> None:
    # 53 rows in windows of 24, 24 and 5: 7 divides none of them, so batches lie across every edge.
    source = Streamed(53)
    data = source.all() if resident else source
    options: dict[str, Any] = {"seed": 5, "epochs": 3, "drop_last": drop_last, **SMALL}
    straight = list(ShuffledBatches(data, 7, **options))
    used = ShuffledBatches(data, 7, **options)
    for position in range(len(straight) + 1):
        going = ShuffledBatches(data, 7, **options)
        for _ in range(position):
            next(going)
        state = json.loads(json.dumps(going.state_dict()))
        assert state["position"] == position
        fresh = ShuffledBatches(data, 7, **options)
        fresh.load_state_dict(state)
        # One that has been used, and stands in a window of its own, as well as a new one.
        used.load_state_dict(state)
        for resumed in (fresh, used):
            rest = list(resumed)
            assert len(rest) == len(straight) - position
            for ours, theirs in zip(rest, straight[position:], strict=True):
                assert_bitwise("batch", ours, theirs)


def test_a_state_of_other_batches_is_refused() -> None:
    x = torch.zeros(60, 2)
    state = ShuffledBatches(x, 7, seed=5).state_dict()
    with pytest.raises(ValueError) as error:
        ShuffledBatches(x[:50], 6, seed=5, drop_last=False).load_state_dict(state)
    assert str(error.value) == (
        "expected the batches that the state is of, got others: batch_size was 7 is 6, n_tokens "
        "was 60 is 50, drop_last was True is False; use the same data and settings, or begin anew"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"d_in": 3},
        {"block_rows": 9},
        {"window_blocks": 17},
        {"later": 1},
        {"position": -1},
        {"position": 1.5},
        {"position": None},
        {"position": True},
    ],
)
def test_every_key_counts(change: dict[str, Any]) -> None:
    batches = ShuffledBatches(torch.zeros(60, 2), 7, seed=5, skip=2)
    state = batches.state_dict()
    for wrong in (state | change, {k: v for k, v in state.items() if k not in change}):
        if wrong != state:
            with pytest.raises(ValueError, match=next(iter(change))):
                batches.load_state_dict(wrong)
    assert batches.position == 2
    with pytest.raises(ValueError, match="n_tokens was None is 60"):
        batches.load_state_dict({})


@pytest.mark.parametrize("batch_size", [4, 8, 11])
def test_reading_keeps_pace_with_what_is_handed_out(batch_size: int) -> None:
    source = Streamed(792)  # whole windows: a short one at the end would leave the next less time
    batches = ShuffledBatches(source, batch_size, **SMALL)
    next(batches)
    # What a batch consumes, and one block as the share of a window is rounded up.
    most = -(-batch_size // 8) + 1
    for _ in range(3 * batches.batches_per_epoch):
        before = len(source.reads)
        next(batches)
        assert len(source.reads) - before <= most


def test_memory_is_two_windows() -> None:
    source = Streamed(800)
    batches = ShuffledBatches(source, 5, **SMALL)
    buffers: set[int] = set()
    for _ in range(500):
        next(batches)
        reader: Any = batches._reader
        held = [f.rows for f in (reader._current, reader._next) if f is not None] + reader._free
        assert {len(rows) for rows in held} == {24}
        buffers |= {rows.data_ptr() for rows in held}
    assert len(buffers) == 2


def test_rows_that_no_batch_needs_are_not_read() -> None:
    # One batch of 60 of the 103 rows: of windows of 24 the third is the last that is needed.
    source = Streamed(103)
    assert len(list(ShuffledBatches(source, 60, epochs=1, **SMALL))) == 1
    assert len(source.reads) == 1 + 3 * 3
    source = Streamed(48)
    assert len(list(ShuffledBatches(source, 4, epochs=1, **SMALL))) == 12
    assert len(source.reads) == 1 + 6, "nothing of a second epoch"


def test_a_failed_read_can_be_tried_again() -> None:
    class Flaky(Streamed):
        fails = False

        def rows(self, start: int, stop: int) -> Rows:
            if self.fails:
                raise OSError("the disk is away")
            return super().rows(start, stop)

    source = Flaky(200)
    straight = list(ShuffledBatches(source, 5, epochs=1, **SMALL))
    batches = ShuffledBatches(source, 5, epochs=1, **SMALL)
    got: list[Tensor] = []
    failures = 0
    while len(got) < len(straight):
        source.fails = not source.fails
        try:
            got.append(next(batches))
        except OSError:
            failures += 1
    assert failures > 10
    for ours, theirs in zip(got, straight, strict=True):
        assert_bitwise("batch", ours, theirs)


def test_a_tensor_is_not_copied() -> None:
    x = torch.arange(4096.0)[:, None]
    batches = ShuffledBatches(x, 64)
    next(batches)
    x.neg_()
    assert (next(batches) <= 0).all()


@pytest.mark.parametrize("resident", [False, True])
def test_a_batch_may_take_the_place_of_the_last(resident: bool) -> None:
    source: Any = Streamed(103)
    if resident:
        source = source.rows(0, 103).activations.clone()
    options = {**SMALL, "drop_last": False, "epochs": 2}
    apart = list(ShuffledBatches(source, 10, **options))
    again = ShuffledBatches(source, 10, **options, reuse=True)
    places = set()
    for expected in apart:
        batch = next(again)
        assert torch.equal(batch, expected)
        places.add((len(batch), batch.data_ptr()))
    assert len({place for n, place in places if n == 10}) <= 2  # the short batch lies elsewhere


def test_other_data_of_the_same_size_are_not_gone_on_with(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b", "again")]
    for folder, seed in zip(folders, (0, 1, 0), strict=True):
        with ShardWriter(folder, 3, rows_per_shard=16) as writer:
            writer.write(torch.randn(40, 3, generator=torch.Generator().manual_seed(seed)))
    first, other, again = (ShardDataset(folder) for folder in folders)
    state = ShuffledBatches(first, 8, skip=2).state_dict()
    ShuffledBatches(again, 8).load_state_dict(state)  # a copy is as good
    for sources in ((first, other), (JointRows([first, first]), JointRows([first, other]))):
        state = ShuffledBatches(sources[0], 8, skip=2).state_dict()
        with pytest.raises(ValueError, match=r"others: data was '.*' is '.*'; use the same data"):
            ShuffledBatches(sources[1], 8).load_state_dict(state)


@pytest.mark.parametrize("resident", [False, True])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_shares_of_processes_are_the_batches_of_one(size: int, resident: bool) -> None:
    # 10 rows over 4 are 3, 3, 3 and 1.
    source = Streamed(53)
    options: dict[str, Any] = {"seed": 5, "epochs": 2, **SMALL}

    def batches(rank: int, size: int) -> ShuffledBatches:
        data = source.all() if resident else Streamed(53)
        return ShuffledBatches(data, 10, share=(rank, size), **options)

    parts = zip(*(batches(rank, size) for rank in range(size)), strict=True)
    for whole, each in zip(batches(0, 1), parts, strict=True):
        assert_bitwise("a batch of all shares", torch.cat(each), whole)
        assert [len(part) for part in each] == [len(part) for part in whole.chunk(size)]
    assert batches(1, size).state_dict() == batches(0, 1).state_dict(), "a position for any size"
