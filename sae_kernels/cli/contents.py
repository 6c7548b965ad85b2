"""Lists the SAEs and the folders of activations below a folder, for ``inspect``."""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

from sae_kernels.errors import DataError

_LISTED = 100  # SAEs, and folders of activations, that are described
_FOLDERS = 10_000  # that are looked at for activations


def contents(folder: Path) -> dict[str, Any] | None:
    """The SAEs and the folders of activations below a folder; None if there are none.

    Returns:
        "kind", how many there are, and of up to 100 each what its settings say; no weights and no
        activations are read.
    """
    from sae_kernels import formats

    saes = formats.find(folder)
    stored = _activations(folder)
    if not saes and not stored:
        return None
    return {
        "kind": "folder",
        "n_saes": len(saes),
        "n_activations": len(stored),
        "contents": [
            *(_sae(folder, found) for found in saes[:_LISTED]),
            *(_stored(folder, path) for path in stored[:_LISTED]),
        ],
    }


def _sae(folder: Path, found: Any) -> dict[str, Any]:
    from sae_kernels import formats

    known = {"path": str(found.path.relative_to(folder)), "format": found.format}
    try:
        config = formats.describe(found.path, found.format)
    except (DataError, ValueError) as error:
        return {**known, "error": str(error)}
    sizes = {"d_in": config.d_in, "n_latents": config.n_latents}
    return {**known, "architecture": config.architecture, **sizes}


def _activations(folder: Path) -> list[Path]:
    from sae_kernels.data.shard_index import INDEX

    walked = itertools.islice(os.walk(folder), _FOLDERS)
    return sorted(Path(at) for at, _, names in walked if INDEX in names)


def _stored(folder: Path, path: Path) -> dict[str, Any]:
    from sae_kernels.data.shard_index import Index

    known = {"path": str(path.relative_to(folder)), "format": "activations"}
    try:
        index = Index.read(path)
    except (DataError, ValueError) as error:
        return {**known, "error": str(error)}
    rows = sum(shard.count for shard in index.shards)
    return {**known, "layer": index.metadata.get("layer"), "d_in": index.d_in, "n_tokens": rows}
