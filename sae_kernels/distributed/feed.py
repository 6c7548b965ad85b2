"""Processes that run a model for those that train on its activations.

The first processes of a mesh train, the last run the model. Those that train ask, all at the same
time: for a sample, for the next batch, to go on from a saved position, to end. The others answer.
Each row goes from the process that computed it to the one that trains on its part of the batch,
from where the batch is gathered as stored activations are.
"""

from __future__ import annotations

from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sae_kernels.distributed.collectives import Collectives, share
from sae_kernels.distributed.team import Team
from sae_kernels.runs.interrupts import Interrupts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor

    from sae_kernels.config.parallel import ParallelConfig


class Feed:
    """Splits the processes of a mesh into those that train and those that run a model.

    Made by all of them at once, as it makes process groups.

    Args:
        mesh: of one dimension.
        parallel: the settings, with ``harvest_ranks``.

    Attributes:
        everyone: all processes.
        mesh: those of this process's kind.
        runs_model: whether it is one of those that run the model.
        first: the first of these.

    Raises:
        ValueError: a mesh of two dimensions, or no process that is left to train.
    """

    def __init__(self, mesh: DeviceMesh, parallel: ParallelConfig) -> None:
        if mesh.ndim != 1:
            raise ValueError(
                "mesh: expected one dimension with harvest_ranks, of all processes, got "
                f"{tuple(mesh.shape)}; give latents_over and tokens_over as settings"
            )
        self.everyone = Team(mesh, parallel.timeout)
        self.first = len(parallel.training_ranks(self.everyone.size))
        self.runs_model = self.everyone.rank >= self.first
        ranks = mesh.mesh.tolist()
        own = ranks[self.first :] if self.runs_model else ranks[: self.first]
        wait = timedelta(seconds=parallel.timeout)
        group = dist.new_group(own, timeout=wait, use_local_synchronization=True)
        self.mesh = DeviceMesh.from_group(group, mesh.device_type)
        self._timeout = parallel.timeout
        # Rows go through the memory of the hosts, so that no kernel waits for another process.
        self._collectives = Collectives(self.everyone.control)

    def check(self, source: Any, settings: Mapping[str, Any]) -> None:
        """Raises ValueError in all processes unless their settings are the same and a model runs.

        Args:
            source: here; a model's stream where it runs.
            settings: of the run here, plain values by name.
        """
        self.everyone.expect_same(settings)
        with self.everyone.together():
            if self.runs_model and not hasattr(source, "spread_over"):
                raise ValueError(
                    "activations: expected LiveBatches with harvest_ranks, got "
                    f"{type(source).__name__}; stored ones need no process to compute them"
                )

    def serve(self, stream: Any) -> None:
        """Runs the model and answers those that train, until they have all they want.

        Args:
            stream: a model's, :class:`~sae_kernels.harvest.LiveBatches`.

        Raises:
            RankError: another process failed.
            SystemExit, KeyboardInterrupt: a signal ended the run.
        """
        everyone, team = self.everyone, Team(self.mesh, self._timeout)
        team.expect_same({"activations": stream.state_dict()})
        everyone.told(_about(stream), by=self.first)
        with stream.spread_over(team, ahead=True), Interrupts() as interrupts:
            while True:
                what, given = everyone.told(None)
                if what == "end":
                    break
                part = None
                with everyone.together():
                    if what == "sample":
                        answer = stream.sample(given).cpu(), stream.facts
                    elif what == "go on from":
                        answer = stream.load_state_dict(given)
                    else:
                        part = stream.part()
                        answer = part and (part[1].to(torch.int16), stream.state_dict())
                everyone.told(answer, by=self.first)
                if part is not None:
                    self.send(*part)
                    everyone.any(interrupts.received is not None)
            if given:
                interrupts.raise_received("those that train have saved")

    @contextmanager
    def batches(self) -> Iterator[FedBatches]:
        """The stream for those that train; the others end with the block unless it fails."""
        fed = FedBatches(self)
        try:
            yield fed
        except (KeyboardInterrupt, SystemExit):
            if fed.stops:
                self.everyone.told(("end", True))
            raise
        self.everyone.told(("end", False))

    def ask(self, what: str, given: Any = None) -> Any:
        """Asks the processes that run the model; all that train ask the same and get the answer."""
        self.everyone.told((what, given))
        with self.everyone.together():
            pass
        return self.everyone.told(None, by=self.first)

    def send(self, rows: Tensor, holders: Tensor) -> None:
        """Sends the rows of a batch that are in this process to those that train.

        Args:
            rows: [n, D], in the order of the batch.
            holders: which of the processes that run the model has each row of it, int [B].
        """
        own = holders == self.everyone.rank - self.first
        mine = [int(own[part.start : part.stop].sum()) for part in self._shares(len(holders))]
        sent = torch.tensor([*mine, *[0] * (self.everyone.size - self.first)])
        self._exchange(rows.cpu(), sent, torch.zeros_like(sent))

    def received(self, holders: Tensor, nothing: Tensor) -> Tensor:
        """This process's part of a batch, of consecutive rows.

        Args:
            holders: as of :meth:`send`.
            nothing: [0, D], of the dtype of the rows.
        """
        part = self._shares(len(holders))[self.everyone.rank]
        holders = holders[part.start : part.stop]
        came = torch.zeros(self.everyone.size, dtype=torch.int64)
        came[self.first :] = holders.bincount(minlength=self.everyone.size - self.first)
        found = self._exchange(nothing, torch.zeros_like(came), came)
        rows = torch.empty_like(found)
        rows[holders.argsort(stable=True)] = found
        return rows

    def _shares(self, n: int) -> list[range]:
        return [share(n, rank, self.first) for rank in range(self.first)]

    def _exchange(self, rows: Tensor, sent: Tensor, came: Tensor) -> Tensor:
        # As bytes: gloo does not know every dtype.
        found = self._collectives.exchange_rows(
            rows.contiguous().view(torch.uint8), sent, came, "activations"
        )
        return found.view(rows.dtype)


class FedBatches:
    """A stream of batches [B, D] that other processes compute, for those that train together.

    Args:
        feed: the processes.

    Attributes:
        d_in, batch_size, metadata: of the stream there.
        facts: which rows are left out; known with the sample.
        stops: whether all that train stop after this batch, as some process got a signal.
    """

    def __init__(self, feed: Feed) -> None:
        about = feed.everyone.told(None, by=feed.first)
        self._feed, self._state = feed, about.pop("state")
        self._nothing = about.pop("nothing")
        self.batch_size: int = about["batch_size"]
        self.d_in: int = self._nothing.shape[1]
        self.metadata: dict[str, Any] = about["metadata"]
        self.facts: dict[str, Any] = {}
        self.stops = False
        self._team: Team | None = None

    @contextmanager
    def spread_over(self, team: Team) -> Iterator[None]:
        """Batches are gathered from the parts of all that train, in the block."""
        self._team = team
        yield

    def __next__(self) -> Tensor:
        answer = self._feed.ask("next")
        if answer is None:
            raise StopIteration
        holders, self._state = answer
        part = self._feed.received(holders, self._nothing)
        self.stops |= self._feed.everyone.any(False)
        assert self._team is not None
        own = part.to(self._team.mesh.device_type)
        return self._team.collectives.gather_rows(own, self.batch_size, "activations")

    def any(self, flag: bool) -> bool:
        """Whether some process got a signal, given whether this one did."""
        assert self._team is not None
        self.stops |= self._team.any(flag or self.stops)
        return self.stops

    def sample(self, n: int) -> Tensor:
        """About n rows drawn at random from the whole text; moves nothing."""
        rows, self.facts = self._feed.ask("sample", n)
        found: Tensor = rows
        return found

    def state_dict(self) -> dict[str, Any]:
        """The position of the stream after the last batch that came from it."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues where a saved stream stood, of this kind or of LiveBatches."""
        self._feed.ask("go on from", dict(state))
        self._state = dict(state)


def _about(stream: Any) -> dict[str, Any]:
    """Width, dtype, batch size, metadata and position of a stream, for those that train."""
    return {
        "nothing": torch.empty(0, stream.d_in, dtype=stream.dtype),
        "batch_size": stream.batch_size,
        "metadata": stream.metadata,
        "state": stream.state_dict(),
    }
