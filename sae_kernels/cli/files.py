"""Input and output folders of the commands."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sae_kernels.data import ShardDataset
    from sae_kernels.data.rows import RowSource


class Data(NamedTuple):
    """Activations on disk: the layers that an SAE reads, and a transcoder's targets."""

    layers: list[ShardDataset]
    targets: list[ShardDataset]

    @classmethod
    def open(
        cls, folders: Sequence[Path], targets: Sequence[Path], check_on_read: bool = False
    ) -> Data:
        """Opens the folders without reading the activations."""
        from sae_kernels.data import ShardDataset

        def opened(folder: Path) -> ShardDataset:
            return ShardDataset(folder, check_on_read=check_on_read)

        return cls([opened(f) for f in folders], [opened(f) for f in targets])

    @property
    def source(self) -> RowSource:
        """All layers as one source, side by side."""
        from sae_kernels.data import side_by_side

        return side_by_side(self.layers)

    @property
    def target(self) -> RowSource | None:
        """All targets as one source, side by side; None if there are none."""
        from sae_kernels.data import side_by_side

        return side_by_side(self.targets) if self.targets else None

    def verify(self) -> None:
        """Compares every file with its checksum; raises DataError."""
        for data in (*self.layers, *self.targets):
            data.verify()


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises DataError for an output folder that is not empty, unless ``overwrite`` is set."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: expected a folder or nothing, got a file; choose another --out")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise DataError(
            f"{folder}: expected a new or an empty folder, got one that holds files; choose "
            "another --out, or --overwrite to replace them"
        )
