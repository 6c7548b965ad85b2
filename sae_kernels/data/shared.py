"""Sources that several runs read together: all rows side by side, and each run's columns."""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels.data.joint import JointRows
from sae_kernels.data.shards import ShardDataset
from sae_kernels.data.sources import batches_of, is_rows

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping

    from sae_kernels.data.rows import RowSource
    from sae_kernels.data.sources import Stream


class Share:
    """One run's columns of the rows that several runs read together.

    Args:
        own: what the run would read alone; it is asked for facts, and for rows at the end.
        columns: (start, stop) of its columns in the shared rows, in its own order.
        first: states of its own batches and of the shared ones before the first batch.
    """

    def __init__(
        self,
        own: RowSource | Stream,
        columns: list[tuple[int, int]],
        first: tuple[dict[str, Any], dict[str, Any]],
    ) -> None:
        self.own, self._columns = own, columns
        # Where the two differ before the first batch is what they are of; the rest is a position.
        self._first = first
        self._differ = {name for name in first[0] if first[0][name] != first[1].get(name)}

    def rows(self, shared: torch.Tensor) -> torch.Tensor:
        """The run's rows [n, own width], as it would have read them alone."""
        rows = torch.cat([shared[:, start:stop] for start, stop in self._columns], dim=1)
        return rows.to(self.own.dtype) if is_rows(self.own) else rows

    def facts(self, joint: RowSource | Stream) -> dict[str, Any]:
        """Which of the run's rows were left out, as of the source of all runs; {} if unknown."""
        if is_rows(self.own):
            return dict(getattr(self.own, "facts", {}))
        found = dict(getattr(joint, "facts", {}))
        if found.get("max_norm"):
            bounds = dict(zip(joint.layers, found["max_norm"], strict=True))  # type: ignore[union-attr]
            found["max_norm"] = [bounds[layer] for layer in self.own.layers]  # type: ignore[attr-defined]
        return found

    def own_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of the run's own batches at the place of the shared ones."""
        own = {name: self._first[0][name] for name in self._differ}
        return {**state, **own, **_without_bounds(state)}

    def shared_state(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state of the shared batches at the place of the run's own ones.

        Raises:
            ValueError: a state of other data than the run's own.
        """
        for name in self._differ:
            if state.get(name) != self._first[0][name]:
                raise ValueError(
                    f"{name}: expected the data that the run began with, {state.get(name)!r:.300}, "
                    f"got {self._first[0][name]!r:.300}; use the same data and settings"
                )
        joint = {name: self._first[1][name] for name in self._differ}
        return {**state, **joint, **_without_bounds(state)}


def _without_bounds(state: Mapping[str, Any]) -> dict[str, Any]:
    """What of a state is of other layers, too: bounds, which a stream finds in its first window."""
    return {"max_norm": None} if "max_norm" in state else {}


def shared(
    sources: Mapping[str, RowSource | Stream], batch_size: int, seed: int
) -> tuple[RowSource | Stream, dict[str, Share]]:
    """One source for several runs, and each run's share of it; none if all have the same source.

    Args:
        sources: of each run, by name: rows of the same tokens, or streams of one model and text.
        batch_size, seed: of all runs.

    Raises:
        ValueError: sources that cannot be read together.

    Example:
        >>> from sae_kernels.data import TensorRows
        >>> a, b = TensorRows(torch.zeros(4, 2)), TensorRows(torch.ones(4, 3))
        >>> source, shares = shared({"one": a, "other": b}, batch_size=2, seed=0)
        >>> source.d_in, shares["other"].rows(source.rows(0, 1).activations).tolist()
        (5, [[1.0, 1.0, 1.0]])
    """
    distinct = list({id(source): source for source in sources.values()}.values())
    if len(distinct) == 1:
        return distinct[0], {}
    joint = _joined(distinct)
    ends = list(accumulate(width for _, width in _pieces(joint)))
    places = {
        key: (end - width, end) for (key, width), end in zip(_pieces(joint), ends, strict=True)
    }
    first = batches_of(joint, batch_size, seed).state_dict()
    shares = {}
    for name, own in sources.items():
        columns = [places[key] for key, _ in _pieces(own)]
        states = batches_of(own, batch_size, seed).state_dict(), first
        shares[name] = Share(own, columns, states)
    return joint, shares


def _joined(sources: list[RowSource | Stream]) -> RowSource | Stream:
    """All pieces of the sources side by side, each once."""
    rows = [source for source in sources if is_rows(source)]
    if len(rows) == len(sources):
        parts = [part for source in rows for part in getattr(source, "sources", [source])]
        return JointRows(list({_key(part): part for part in parts}.values()))
    joined = getattr(sources[0], "joined", None)
    if rows or joined is None or any(type(each) is not type(sources[0]) for each in sources):
        kinds = ", ".join(sorted({type(source).__name__ for source in sources}))
        raise ValueError(
            f"source: expected stored rows of all runs, or LiveBatches of all, got {kinds}"
        )
    found: Stream = joined(sources[1:])
    return found


def _pieces(source: Any) -> list[tuple[Hashable, int]]:
    """What a source has side by side, with the widths: data sets, or layers of a model."""
    if hasattr(source, "layers"):
        return list(zip(source.layers, source.widths, strict=True))
    return [(_key(part), part.d_in) for part in getattr(source, "sources", [source])]


def _key(source: RowSource) -> Hashable:
    """The same for the same data."""
    return source.folder.absolute() if isinstance(source, ShardDataset) else id(source)
