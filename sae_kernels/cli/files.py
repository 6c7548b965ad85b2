"""What stands where a command wants to write."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


def check_free(folder: Path, overwrite: bool) -> None:
    """Refuses a folder that holds anything, unless it may be overwritten."""
    if folder.exists() and not folder.is_dir():
        raise DataError(f"{folder}: expected a folder or nothing, got a file; choose another --out")
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise DataError(
            f"{folder}: expected a new or an empty folder, got one that holds files; choose "
            "another --out, or --overwrite to replace them"
        )
