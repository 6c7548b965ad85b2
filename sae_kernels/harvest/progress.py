"""The record of an unfinished harvest, from which another process goes on."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from sae_kernels.data.shard_index import INDEX, PROGRESS, Index, Shard, read_shard
from sae_kernels.errors import DataError
from sae_kernels.harvest.cursor import differences
from sae_kernels.harvest.norms import read_bounds
from sae_kernels.io.files import json_writer, publish, read_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


@dataclass(frozen=True)
class HarvestProgress:
    """Where a harvest stands: its finished shards, and the first row that none of them holds.

    Attributes:
        settings: all that the stored bytes depend on but the text, as JSON values.
        window: number of the window of text that holds that row.
        offset: stored rows of this window before it.
        seen: rows of the windows before this one, those left out included.
        nonfinite: rows among them that were left out as they are not finite.
        above: rows among them that were left out because of their norm.
        max_norm: the bound of each layer's norms; None before the first window.
        text: digest of the tokens up to the end of this window.
        shards: the finished shards of each layer's folder, in the order of the layers.
    """

    settings: Mapping[str, Any]
    window: int = 0
    offset: int = 0
    seen: int = 0
    nonfinite: int = 0
    above: int = 0
    max_norm: list[float | None] | None = None
    text: str = ""
    shards: tuple[tuple[Shard, ...], ...] = ()

    @property
    def stored(self) -> int:
        """Rows in the finished shards."""
        return sum(shard.count for shard in self.shards[0])

    def write(self, folder: Path) -> None:
        """Writes the record to the harvest's folder, atomically."""
        publish(folder / PROGRESS, json_writer(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> HarvestProgress | None:
        """The record in a folder, or None if there is no unfinished harvest.

        Raises:
            DataError: a damaged record.
        """
        path = folder / PROGRESS
        if not path.exists():
            return None
        values = read_json(path, "the record of an unfinished harvest")
        kinds = {"settings": dict, "text": str, "shards": list}
        counts = ("window", "offset", "seen", "nonfinite", "above")
        whole = all(type(values.get(name)) is int and values[name] >= 0 for name in counts)
        whole = whole and all(isinstance(values.get(n), kind) for n, kind in kinds.items())
        if not whole or not _has_bounds(values):
            raise DataError(
                f"{path}: expected {', '.join((*counts, *kinds))} and max_norm; harvest again with "
                "overwrite=True (--overwrite)"
            )
        shards = tuple(
            tuple(read_shard(path, entry) for entry in each) for each in values["shards"]
        )
        numbers = {name: values[name] for name in counts} | {"max_norm": values.get("max_norm")}
        return cls(values["settings"], text=values["text"], shards=shards, **numbers)


def _has_bounds(values: Mapping[str, Any]) -> bool:
    """Whether a record has the bounds of the norms that its rows were judged by."""
    started = values["window"] or values["offset"]
    recorded = values.get("max_norm")
    if recorded is None:
        return not started or values["settings"].get("max_norm_multiple") is None
    try:
        return read_bounds(recorded, len(values["shards"])) is not None
    except ValueError:
        return False


def begun(
    folder: Path,
    layers: Sequence[str],
    settings: Mapping[str, Any],
    *,
    resume: bool,
    overwrite: bool,
) -> HarvestProgress:
    """Where to begin in a folder: at the start, or where an unfinished harvest stands.

    Raises:
        DataError: an unfinished harvest that is neither to be resumed nor overwritten, or one of
            other settings.
    """
    settings = {"layers": list(layers), **settings}
    if not resume and not overwrite:
        refuse_unfinished(folder)
    found = None if overwrite else HarvestProgress.read(folder)
    if found is None:
        (folder / PROGRESS).unlink(missing_ok=True)
        return HarvestProgress(settings, shards=((),) * len(layers))
    if differ := differences(found.settings, settings):
        raise DataError(
            f"{folder}: expected the settings that its unfinished harvest began with: {differ}; "
            "give those, or replace it, overwrite=True (--overwrite)"
        )
    return found


def refuse_unfinished(folder: Path) -> None:
    """Raises DataError if the folder holds an unfinished harvest."""
    if (found := HarvestProgress.read(folder)) is not None:
        raise DataError(
            f"{folder}: expected no unfinished harvest, it holds one of {found.stored} rows so "
            "far; go on with it, resume=True (--resume), or replace it, overwrite=True "
            "(--overwrite)"
        )


def finished_rows(folders: Mapping[str, Path], settings: Mapping[str, Any]) -> int | None:
    """Rows of a finished harvest in the layers' folders; None if it is not finished.

    Raises:
        DataError: data sets of other settings.
    """
    if not all((folder / INDEX).exists() for folder in folders.values()):
        return None
    rows = 0
    for layer, folder in folders.items():
        index = Index.read(folder)
        wanted = {**settings, "layer": layer}
        held = {name: index.metadata.get(name) for name in wanted}
        if differ := differences(held, wanted):
            raise DataError(
                f"{folder}: expected a harvest of these settings to go on with, it holds a "
                f"finished data set of others: {differ}; choose another folder, or replace it, "
                "overwrite=True (--overwrite)"
            )
        rows = sum(shard.count for shard in index.shards)
    return rows
