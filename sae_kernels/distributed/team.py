"""The processes of a run: what they agree on, and the files that they write together."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from sae_kernels.distributed.collectives import Collectives
from sae_kernels.distributed.faults import named
from sae_kernels.distributed.latents import LatentRanks
from sae_kernels.errors import RankError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch.distributed import ProcessGroup

    from sae_kernels.config.parallel import ParallelConfig


_Made = TypeVar("_Made")


class Team:
    """The processes of a mesh that train one SAE, each with some of its latents.

    Made by all of them at once, as it makes process groups.

    Args:
        mesh: of one dimension, or of two named "latents" and "tokens".
        timeout: seconds to wait for a rank that does not answer.

    Attributes:
        mesh, group: as given, and the process group of all.
        rank, size: of the group.
        collectives: exchanges of activations over it.
        layout: the settings ``latents_over`` and ``tokens_over`` by the names of its dimensions.
        control: a group on the CPU, for what the hosts agree on.
        saving, saving_mesh: another for the thread that saves checkpoints alone.

    Raises:
        ValueError: a mesh of other dimensions.
    """

    def __init__(self, mesh: DeviceMesh, timeout: float) -> None:
        names, wait = mesh.mesh_dim_names or (), timedelta(seconds=timeout)
        if mesh.ndim != 1 and sorted(names) != ["latents", "tokens"]:
            raise ValueError(
                "mesh: expected one dimension, or two named 'latents' and 'tokens', got "
                f"{tuple(mesh.shape)} {names or 'without names'}"
            )
        sizes = zip(names, mesh.shape, strict=False)
        self.layout: dict[str, Any] = {
            f"{n}_over": size for n, size in sizes if n in ("latents", "tokens")
        }
        members = sorted(mesh.mesh.flatten().tolist())
        self.mesh, self.timeout = mesh, timeout
        # Others that torchrun started take no part in making groups: they may run the model.
        new_group = functools.partial(
            dist.new_group, members, timeout=wait, use_local_synchronization=True
        )
        self.group = mesh.get_group() if mesh.ndim == 1 else new_group()
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self.collectives = Collectives(self.group)
        # On the CPU, so that no kernel waits behind what the host asks.
        self.control = new_group(backend="gloo")
        self.saving = new_group(backend="gloo")
        self.saving_mesh = DeviceMesh.from_group(self.saving, "cpu")

    def ranks(self, n_latents: int, parallel: ParallelConfig) -> LatentRanks:
        """The exchanges of a training step, for an SAE of so many latents; the layout is fitted."""
        return LatentRanks(
            self.group,
            n_latents,
            tokens_over=parallel.tokens_over,
            blocks=parallel.blocks,
            partial_sums=parallel.partial_sums,
            timeout=self.timeout,
        )

    def any(self, flag: bool) -> bool:
        """Whether it is true on some rank."""
        flags = torch.tensor([int(flag)])
        dist.all_reduce(flags, dist.ReduceOp.MAX, group=self.control)
        return bool(flags)

    def told(self, value: Any, by: int = 0) -> Any:
        """The plain value of one rank."""
        return _broadcast(value, self.control, by)

    @contextmanager
    def together(self) -> Iterator[None]:
        """If the block raises on one rank it raises on all: the first one's error, by its rank."""
        error: Exception | None = None
        try:
            yield
        except Exception as raised:
            error = raised
        self._raise_first(error, self.control)

    def expect_same(self, facts: Mapping[str, Any]) -> None:
        """Raises ValueError on all ranks unless all have the same facts; it names the first other.

        Args:
            facts: settings and fingerprints by name, plain values.
        """
        others = _gathered({n: repr(v) for n, v in facts.items()}, self.control)
        ranks = dist.get_process_group_ranks(self.control)
        for rank, other in zip(ranks, others, strict=True):
            for name, value in others[0].items():
                if other.get(name) != value:
                    raise ValueError(
                        f"{name}: expected the same on all ranks, rank {ranks[0]} has "
                        f"{value:.200}, rank {rank} has {other.get(name, 'nothing'):.200}"
                    )

    def write(
        self,
        own: Callable[[Path], _Made],
        lead: Callable[[Callable[[Path], list[_Made]]], object],
        group: ProcessGroup | None = None,
    ) -> None:
        """Writes a file or folder together, which rank 0 makes and publishes.

        Args:
            own: writes this rank's part of what is at a path.
            lead: run by rank 0; calls its argument with the path, once, which runs ``own`` on all
                ranks and returns their results.
            group: to talk over, from a thread of its own.

        Raises:
            RankError: another rank failed.
            OSError: this one did.
        """
        group = group or self.control
        asked = False

        def everywhere(path: Path | None) -> list[_Made]:
            nonlocal asked
            asked = True
            said = _broadcast(None if path is None else str(path), group)
            made, error = None, None
            if said is not None:
                try:
                    made = own(Path(said))
                except Exception as raised:
                    error = raised
            self._raise_first(error, group)
            results: list[_Made] = _gathered(made, group)
            return results

        error: Exception | None = None
        try:
            if self.rank == 0:
                lead(everywhere)
        except Exception as raised:
            error = raised
        if not asked:
            try:
                everywhere(None)
            except Exception as raised:
                error = error or raised
        self._raise_first(error, group)

    def _raise_first(self, error: Exception | None, group: ProcessGroup) -> None:
        """Raises this rank's error, or one that names the first rank with one."""
        found = _gathered(None if error is None else named(error, dist.get_rank()), group)
        if error is not None:
            raise error
        for other in found:
            if other is not None:
                raise RankError(other)


def _gathered(value: Any, group: ProcessGroup) -> list[Any]:
    """A plain value of every rank."""
    values = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def _broadcast(value: Any, group: ProcessGroup, rank: int = 0) -> Any:
    """A plain value of one rank."""
    values = [value]
    dist.broadcast_object_list(values, dist.get_global_rank(group, rank), group=group)
    return values[0]
