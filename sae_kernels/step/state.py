"""What a training is between two steps, as tensors and plain values by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


class State(NamedTuple):
    """A part of what outlives a step; the tensors are the living ones until somebody copies them.

    Attributes:
        tensors: counters and moments.
        values: what JSON can hold.
    """

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]

    def __or__(self, other: State) -> State:
        """Both parts together."""
        return State(self.tensors | other.tensors, self.values | other.values)


def restore_(mine: Mapping[str, torch.Tensor], state: State) -> None:
    """Copies the tensors of these names from the state into the living ones.

    Raises:
        DataError: one is missing, or has another shape or dtype.
    """
    for name, tensor in mine.items():
        tensor.copy_(matched(name, tensor, state))


def matched(name: str, like: torch.Tensor, state: State) -> torch.Tensor:
    """The tensor of that name, of the shape and dtype of another.

    Raises:
        DataError: it is missing, or has not.
    """
    saved = state.tensors.get(name)
    came = None if saved is None else (list(saved.shape), saved.dtype)
    if saved is None or came != (list(like.shape), like.dtype):
        raise DataError(
            f"{name}: expected {list(like.shape)} in {like.dtype} in the checkpoint, got "
            f"{came or 'nothing'}; it is of another run, or of another version"
        )
    return saved
