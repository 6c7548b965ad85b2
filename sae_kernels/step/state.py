"""State of a training between two steps, as named tensors and plain values."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch


class State(NamedTuple):
    """State of a training step or a part of it; tensors are not copied.

    Attributes:
        tensors: counters and moments by name.
        values: plain JSON values by name.
    """

    tensors: dict[str, torch.Tensor]
    values: dict[str, Any]

    def __or__(self, other: State) -> State:
        """Both parts together."""
        return State(self.tensors | other.tensors, self.values | other.values)


def restore_(mine: Mapping[str, torch.Tensor], state: State) -> None:
    """Copies saved tensors into those of the same name, in place.

    Raises:
        DataError: a tensor is missing, or has another shape or dtype.
    """
    for name, tensor in mine.items():
        tensor.copy_(matched(name, tensor, state))


def matched(name: str, like: torch.Tensor, state: State) -> torch.Tensor:
    """The saved tensor of a name, checked against the shape and dtype of ``like``.

    Raises:
        DataError: it is missing, or has another shape or dtype.
    """
    saved = state.tensors.get(name)
    came = None if saved is None else (list(saved.shape), saved.dtype)
    if saved is None or came != (list(like.shape), like.dtype):
        raise DataError(
            f"{name}: expected {list(like.shape)} in {like.dtype} in the checkpoint, got "
            f"{came or 'nothing'}; it is of another run, or of another version"
        )
    return saved
