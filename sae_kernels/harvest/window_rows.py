"""The activations of one window of text, in this process or with a part in each of several."""

from __future__ import annotations

from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import nullcontext
from threading import Event
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
        nothing = torch.empty(0, model.d_in, dtype=dtype, device=device)
        self._here, self._next = _Memory(nothing), _Memory(nothing)
        self._ahead: tuple[list[Chunk], Future[None]] | None = None
        self._thread, self._closed = ThreadPoolExecutor(1, "model"), Event()

    @property
    def own(self) -> Tensor:
        return self._here.rows

    @property
    def runs_ahead(self) -> bool:
        """Whether `run_ahead` was called since the last `fill`."""
        return self._ahead is not None

    def close(self) -> None:
        """Ends a window that is run ahead, when the model's batch under way is done."""
        self._closed.set()
        self._thread.shutdown()

    def run_ahead(self, window: list[Chunk]) -> None:
        """Starts to run the model in a thread on the window that `fill` will be given next.

        Memory then holds two windows. No other process takes part until `fill`.
        """
        job = self._thread.submit(self._run, self._next, window)
        self._ahead = window, job

    def fill(self, window: list[Chunk], what: str, least: int = 0) -> None:
        """Runs the model on a window in place of the one before.

        Args:
            window: the chunks.
            what: its name in messages.
            least: rows that memory is taken for at once, as later windows may have more.

        Raises:
            NonFiniteError: the model's output holds NaN or infinity, on any of the processes.
        """
        team = self._team
        ahead, self._ahead = self._ahead, None
        with nullcontext() if team is None else team.together():
            if ahead is not None:
                ahead[1].result()
                self._here, self._next = self._next, self._here
            if ahead is None or ahead[0] is not window:
                self._run(self._here, window, least)
            _check_finite(self.own, what)
        if team is not None:
            holders = torch.empty(len(window), dtype=torch.int64)
            for number, batch in enumerate(self._model.batches(window)):
                holders[batch] = number % team.size
            counts = torch.tensor([chunk.rows for chunk in window])
            # The process that has each row, int64 [n].
            self._holders = holders.repeat_interleave(counts)
            self._places, _ = _among_equals(self._holders, team.size)

    def _run(self, memory: _Memory, window: list[Chunk], least: int = 0) -> None:
        """Runs the model on this process's batches of a window."""

        def check(_rows: int) -> None:
            if self._closed.is_set():
                raise CancelledError

        batches = self._model.batches(window)
        mine = batches if self._team is None else batches[self._team.rank :: self._team.size]
        room = memory.room(max(sum(window[i].rows for batch in mine for i in batch), least))
        memory.rows = self._model.fill(window, room, check, mine)

    def part(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Looks up rows by their numbers: those that are in this process, and who has each.

        Args:
            numbers: int64 [m], on the CPU, the same in all processes of the team.
        """
        assert self._team is not None
        holders = self._holders[numbers]
        places = self._places[numbers[holders == self._team.rank]]
        return self.own[places.to(self.own.device)], holders

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


class _Memory:
    """Memory for the rows of one window after the other, as long as the longest.

    Attributes:
        rows: the part of it that is filled.
    """

    def __init__(self, nothing: Tensor) -> None:
        self._nothing = self._all = self.rows = nothing

    def room(self, n: int) -> Tensor:
        """Memory for n rows or more; what was in it is gone."""
        if len(self._all) < n:
            self._all = self.rows = self._nothing  # free before more is taken
            self._all = self._nothing.new_empty((n, self._nothing.shape[1]))
        return self._all


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
