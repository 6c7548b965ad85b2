"""Sources of activations: tensors, folders, row sources, streams, any iterable of batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.data import ShardDataset, ShardWriter, ShuffledBatches, TensorRows
from sae_kernels.data.sources import IterableStream, batches_of, is_rows, open_source
from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path

D = 3


def numbered(n: int, rows: int = 4) -> list[torch.Tensor]:
    return [torch.full((rows, D), float(i)) for i in range(n)]


def test_each_kind_is_opened_as_what_it_is(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, D) as writer:
        writer.write(torch.zeros(7, D))
    stored = ShardDataset(tmp_path)
    assert isinstance(open_source(torch.zeros(7, D)), TensorRows)
    for folder in (tmp_path, str(tmp_path)):
        found = open_source(folder)
        assert isinstance(found, ShardDataset)
        assert found.n_tokens == 7
    assert open_source(stored) is stored
    stream = IterableStream(numbered(2))
    assert open_source(stream) is stream
    assert isinstance(open_source(numbered(2)), IterableStream)
    assert is_rows(open_source(torch.zeros(7, D)))
    assert not is_rows(stream)
    assert batches_of(stream, 4, 0) is stream
    assert isinstance(batches_of(TensorRows(torch.zeros(7, D)), 4, 0), ShuffledBatches)


def test_a_folder_without_activations_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a data set"):
        open_source(tmp_path)


@pytest.mark.parametrize("value", [3, None, 2.5])
def test_what_is_none_of_these_is_named(value: Any) -> None:
    came = type(value).__name__
    with pytest.raises(TypeError, match=rf"activations: expected a tensor .* over, got {came}$"):
        open_source(value)


@pytest.mark.parametrize("again", [True, False], ids=["list", "generator"])
def test_looking_ahead_does_not_move_on(again: bool) -> None:
    given = numbered(3)
    stream = IterableStream(given if again else iter(given))
    assert (stream.d_in, stream.batch_size, stream.position) == (D, 4, 0)
    # What comes first of what is read once; of a list rows from everywhere.
    expected = [0, 0, 1, 1, 2, 2] if again else [0, 0, 0, 0, 1, 1]
    assert stream.sample(6)[:, 0].tolist() == expected
    assert len(stream.sample(100)) == 12  # all there are
    assert [float(next(stream)[0, 0]) for _ in range(3)] == [0, 1, 2]
    assert stream.position == 3
    if again:
        assert [float(next(stream)[0, 0]) for _ in range(4)] == [0, 1, 2, 0]
    else:
        with pytest.raises(StopIteration):
            next(stream)


def test_the_place_can_be_taken_up_again() -> None:
    stream = IterableStream(numbered(3))
    for _ in range(5):
        next(stream)
    other = IterableStream(numbered(3))
    other.sample(6)
    other.load_state_dict(stream.state_dict())
    assert other.position == 5
    assert float(next(other)[0, 0]) == 2
    with pytest.raises(ValueError, match=r"batches: expected those .* 5 up to its .*, got 3"):
        IterableStream(iter(numbered(3))).load_state_dict(stream.state_dict())


@pytest.mark.parametrize(
    ("batches", "error", "message"),
    [
        ([], ValueError, "expected at least one batch"),
        ([torch.zeros(D)], TypeError, r"expected batches that are tensors \[B, D\], got \[3\]"),
        ([torch.zeros(0, D)], TypeError, r"got \[0, 3\]"),
        (["text"], TypeError, "got str"),
        ([[torch.zeros(2, D), torch.zeros(2)]], TypeError, "got list"),
    ],
)
def test_batches_that_are_none_are_refused(
    batches: list[Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        IterableStream(batches)


def test_a_batch_of_another_width_is_refused_when_it_comes() -> None:
    stream = IterableStream([torch.zeros(2, D), torch.zeros(2, D + 1)])
    next(stream)
    with pytest.raises(ValueError, match="expected batches of width 3, as the first, got 4"):
        next(stream)
