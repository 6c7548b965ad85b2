"""Counting the tensors that operations make, for bounds on memory."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Sizes(TorchDispatchMode):
    """Bytes of each storage that an operation returns and did not get, with the operation."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[int, str]] = []

    @property
    def largest(self) -> int:
        """Bytes of the largest storage made."""
        return max(size for size, _ in self.made)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_place(t) for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and _place(t) not in given:
                self.made.append((t.untyped_storage().nbytes(), str(func)))
        return out


def _place(t: torch.Tensor) -> int:
    return t.untyped_storage().data_ptr()
