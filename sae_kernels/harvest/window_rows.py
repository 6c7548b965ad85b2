"""The activations of one window of text, in this process or with a part in each of several."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sae_kernels.errors import NonFiniteError

if TYPE_CHECKING:
    from sae_kernels.distributed.team import Team
    from sae_kernels.harvest.chunks import Chunk
    from sae_kernels.harvest.rows import LayerRows


class WindowRows:
    """The rows [n, D] of a window of text, by their numbers in the order of the text.

    Of several processes each runs the model on every so many-th of its batches, and holds their
    rows alone. The batches are those of one process, and so are the bits of the rows.

    Args:
        model: gives the rows.
        dtype, device: of the rows.
        team: the processes, all of which make the same calls; None: this one has all rows.

    Attributes:
        own: the rows that are here.
    """

    def __init__(
        self, model: LayerRows, dtype: torch.dtype, device: torch.device, team: Team | None = None
    ) -> None:
        self._model, self._team = model, team
        self._nothing = torch.empty(0, model.d_in, dtype=dtype, device=device)
        self._buffer = self.own = self._nothing

    def fill(self, window: list[Chunk], what: str, least: int = 0) -> None:
        """Runs the model on a window in place of the one before.

        Args:
            window: the chunks.
            what: its name in messages.
            least: rows that memory is taken for at once, as later windows may have more.

        Raises:
            NonFiniteError: the model's output holds NaN or infinity, on any of the processes.
        """
        batches, team = self._model.batches(window), self._team
        mine = batches if team is None else batches[team.rank :: team.size]
        n = max(sum(window[i].rows for batch in mine for i in batch), least)
        if len(self._buffer) < n:
            self._buffer = self.own = self._nothing  # its memory is free before more is taken
            self._buffer = self._nothing.new_empty((n, self._nothing.shape[1]))
        with nullcontext() if team is None else team.together():
            self.own = self._model.fill(window, self._buffer, batches=mine)
            _check_finite(self.own, what)
        if team is not None:
            holders = torch.empty(len(window), dtype=torch.int64)
            for number, batch in enumerate(batches):
                holders[batch] = number % team.size
            counts = torch.tensor([chunk.rows for chunk in window])
            self._holders = holders.repeat_interleave(counts)
            self._places, _ = _among_equals(self._holders, team.size)

    def gathered(self, own: Tensor, numbers: Tensor | None = None) -> Tensor:
        """Rows by their numbers, or all of them, given something of each that is here.

        Args:
            own: [rows here, ...].
            numbers: int64 [m], the same in all processes; of several best on the CPU.

        Returns:
            [m, ...], in the order of the numbers.
        """
        team = self._team
        if team is None:
            return own if numbers is None else own[numbers]
        numbers = torch.arange(len(self._holders)) if numbers is None else numbers.cpu()
        holders = self._holders[numbers]
        places, most = _among_equals(holders, team.size)
        mine = own[self._places[numbers[holders == team.rank]].to(own.device)]
        every = team.collectives.gather_rows(mine, most * team.size, "activations")
        return every[(holders * most + places).to(own.device)]


def _among_equals(labels: Tensor, n: int) -> tuple[Tensor, int]:
    """The place of each of some labels below n among its equals, and how many the commonest has.

    >>> _among_equals(torch.tensor([1, 0, 1, 1]), 2)
    (tensor([0, 0, 1, 2]), 3)
    """
    counts = labels.bincount(minlength=n)
    order = labels.argsort(stable=True)
    first = (counts.cumsum(0) - counts)[labels[order]]
    places = torch.empty_like(labels)
    places[order] = torch.arange(len(labels)) - first
    return places, int(counts.max())


def _check_finite(rows: Tensor, what: str) -> None:
    if not len(rows):  # of a short text a process may have none
        return
    extremes = torch.stack(rows.aminmax())
    if not extremes.isfinite().all():
        raise NonFiniteError(
            f"{what}: expected activations that are finite in {rows.dtype}, got extremes "
            f"{extremes.tolist()}; look for NaN in the model or take a wider dtype"
        )
