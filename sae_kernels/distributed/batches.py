"""Whole batches on every rank, of which each reads a share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from sae_kernels.data.batches import Batches
    from sae_kernels.distributed.collectives import Collectives


class GatheredBatches:
    """Whole batches [B, D] on every rank, of which each reads its share.

    Args:
        batches: of this rank's share of the rows.
        batch_size: rows of a whole batch.
        collectives: of the ranks.
    """

    def __init__(self, batches: Batches, batch_size: int, collectives: Collectives) -> None:
        self._batches, self._size, self._collectives = batches, batch_size, collectives

    def __next__(self) -> Tensor:
        return self._collectives.gather_rows(next(self._batches), self._size, "activations")

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, the same on all ranks and for any number of them."""
        return self._batches.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where a saved iterator stood, of whatever number of ranks."""
        self._batches.load_state_dict(state)
