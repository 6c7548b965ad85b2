"""Batches made ahead by a thread: the same ones, its errors, and its end."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import threading
import time
import traceback
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.data import JointRows, Prefetched, ShardDataset, ShardWriter, ShuffledBatches
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

SMALL: dict[str, Any] = {"block_rows": 8, "window_blocks": 3}


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) <= before


class Counted:
    """Batches that name themselves; one may fail, and another waits until it is let go."""

    def __init__(self, fail_at: int | None = None, wait_at: int | None = None) -> None:
        self.position, self.fail_at, self.wait_at = 0, fail_at, wait_at
        self.waits, self.go = threading.Event(), threading.Event()

    def __next__(self) -> Tensor:
        if self.position == self.fail_at:
            raise OSError(f"batch {self.position} is damaged")
        if self.position == self.wait_at:
            self.waits.set()
            self.go.wait()
        self.position += 1
        return torch.tensor([self.position - 1.0])

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["position"]


def _until(reached: Any) -> None:
    deadline = time.monotonic() + 10
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _shards(folder: Path, n: int, d_in: int) -> ShardDataset:
    draw = torch.Generator().manual_seed(d_in)
    with ShardWriter(folder, d_in, rows_per_shard=11) as writer:
        writer.write(torch.randn(n, d_in, generator=draw), torch.arange(n))
    return ShardDataset(folder)


@pytest.mark.parametrize("depth", [1, 2, 7])
def test_the_same_batches_and_then_the_end(tmp_path: Path, depth: int) -> None:
    source = JointRows([_shards(tmp_path / "a", 53, 3), _shards(tmp_path / "b", 53, 2)])
    options: dict[str, Any] = {"epochs": 3, "drop_last": False, **SMALL}
    straight = list(ShuffledBatches(source, 7, **options))
    with Prefetched(ShuffledBatches(source, 7, **options), depth=depth) as batches:
        for theirs in straight:
            assert_bitwise("batch", next(batches), theirs)
        for _ in range(2):
            with pytest.raises(StopIteration):
                next(batches)


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_state_is_that_of_the_last_batch_handed_out(depth: int) -> None:
    x = torch.randn(53, 2)
    options: dict[str, Any] = {"epochs": 2, **SMALL}
    straight = list(ShuffledBatches(x, 7, **options))
    for position in range(len(straight) + 1):
        inner = ShuffledBatches(x, 7, **options)
        with Prefetched(inner, depth=depth) as batches:
            for _ in range(position):
                next(batches)
            if 0 < position < len(straight):
                _until(lambda: inner.position > position)  # noqa: B023 - the thread is ahead
            state = json.loads(json.dumps(batches.state_dict()))
        assert state == batches.state_dict(), "also when it is closed"
        assert state["position"] == position
        with Prefetched(ShuffledBatches(x, 7, **options), depth=depth) as resumed:
            resumed.load_state_dict(state)
            assert resumed.state_dict() == state
            for ours, theirs in zip(resumed, straight[position:], strict=True):
                assert_bitwise("batch", ours, theirs)
        plain = ShuffledBatches(x, 7, **options)
        plain.load_state_dict(state)
        assert plain.position == position, "with and without a thread the state is the same"


def test_a_state_comes_before_the_first_batch_and_must_fit() -> None:
    x = torch.zeros(20, 1)
    with Prefetched(ShuffledBatches(x, 5)) as batches:
        with pytest.raises(ValueError, match="batch_size was 4 is 5"):
            batches.load_state_dict(ShuffledBatches(x, 4).state_dict())
        state = batches.state_dict()
        next(batches)
        with pytest.raises(ValueError, match="before the first batch"):
            batches.load_state_dict(state)


def test_no_more_than_depth_batches_are_made_ahead() -> None:
    inner = Counted()
    with Prefetched(inner, depth=3) as batches:
        assert inner.position == 0, "nothing is read before the first batch is asked for"
        for taken in range(1, 5):
            next(batches)
            _until(lambda: inner.position == taken + 3)  # noqa: B023
            time.sleep(0.01)
            assert inner.position == taken + 3


def test_an_error_comes_with_the_batch_that_it_took_the_place_of() -> None:
    with Prefetched(Counted(fail_at=3), depth=5) as batches:
        assert [float(next(batches)) for _ in range(3)] == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(OSError, match="batch 3 is damaged") as error:
                next(batches)
            assert batches.state_dict() == {"position": 3}
    frames = [frame.line for frame in traceback.extract_tb(error.value.__traceback__)]
    assert any("is damaged" in str(line) for line in frames), "where it was raised in the thread"


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_close_ends_a_thread_that_waits_for_room(taken: int) -> None:
    inner = Counted()
    batches = Prefetched(inner, depth=2)
    for _ in range(taken):
        next(batches)
    if taken:
        _until(lambda: inner.position == taken + 2)
    batches.close()
    batches.close()
    assert inner.position == (taken + 2 if taken else 0)
    with pytest.raises(ValueError, match="got a closed one"):
        next(batches)


def test_close_waits_for_the_batch_in_the_making() -> None:
    inner = Counted(wait_at=1)
    batches = Prefetched(inner)
    next(batches)
    assert inner.waits.wait(10)
    timer = threading.Timer(0.05, inner.go.set)
    timer.start()
    batches.close()
    timer.join()
    assert inner.go.is_set()
    assert inner.position == 2, "and none after it"


def test_close_frees_whoever_waits_for_a_batch() -> None:
    inner = Counted(wait_at=0)
    batches = Prefetched(inner)
    raised: list[BaseException] = []

    def consume() -> None:
        try:
            next(batches)
        except ValueError as error:
            raised.append(error)

    consumer = threading.Thread(target=consume)
    consumer.start()
    assert inner.waits.wait(10)
    timer = threading.Timer(0.05, inner.go.set)
    timer.start()
    batches.close()
    timer.join()
    consumer.join(10)
    assert not consumer.is_alive()
    assert inner.position == 1


def test_an_exception_in_the_block_ends_the_thread() -> None:
    def interrupted() -> None:
        with Prefetched(Counted()) as batches:
            next(batches)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()


def test_a_dropped_one_ends_its_thread() -> None:
    batches = Prefetched(Counted())
    next(batches)
    del batches
    gc.collect()


FORGOTTEN = """
import torch
from sae_kernels.data import Prefetched, ShuffledBatches
kept = Prefetched(ShuffledBatches(torch.zeros(4096, 64), 512), depth={depth})
next(kept)
"""


@pytest.mark.full
@pytest.mark.parametrize("depth", [1, 4])
def test_a_forgotten_one_lets_the_process_end_silently(depth: int) -> None:
    code = FORGOTTEN.format(depth=depth)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-X", "dev", "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.full
def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    code = """
import threading
import torch
from sae_kernels.data import prefetch
class Stuck:
    made = 0
    def __next__(self):
        self.made += 1
        if self.made == 2:
            began.set()
            threading.Event().wait()
        return torch.zeros(1)
    def state_dict(self):
        return {}
began = threading.Event()
prefetch._EXIT_TIMEOUT = 0.1
kept = prefetch.Prefetched(Stuck())
next(kept)
began.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_depth_is_checked() -> None:
    with pytest.raises(ValueError, match="depth: expected at least 1 batch, got 0"):
        Prefetched(Counted(), depth=0)
