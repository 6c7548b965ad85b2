"""Loading an SAE from a folder, a weights file or the hub, whichever tool saved it."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.errors import DataError
from sae_kernels.formats.table import FORMATS, Format, detect, known, one_of, present, read
from sae_kernels.io import hub
from sae_kernels.io.hub import HubPlace
from sae_kernels.nn.registry import from_weights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from sae_kernels.nn import SparseAutoencoder

_log = logging.getLogger(__name__)
_SHOWN = 12  # SAEs that an error lists by name
_WALKED = 100_000  # files of a folder that are looked at


class Found(NamedTuple):
    """A saved SAE on this disk.

    Attributes:
        path: its folder, or its weights file.
        format: the name of its format.
    """

    path: Path
    format: str


def load(
    path_or_name: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    format: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> SparseAutoencoder:
    """Loads an SAE that any of the known tools saved, ready for use.

    Read are this package's own files and those of SAELens, sparsify, dictionary_learning (with its
    fork switch_sae) and Gemma Scope; docs/formats.md has what of each.

    Args:
        path_or_name: a folder, the weights file in one, or a repository on the Hugging Face hub as
            ``owner/repo`` or ``owner/repo/folder``. Of a repository the settings and weights of
            this one SAE are downloaded, the settings first.
        device: where the weights go; None is the CPU.
        dtype: of the weights; None leaves that of the file. Thresholds keep their own precision.
        format: "native", "saelens", "sparsify", "dictionary_learning" or "gemma_scope"; None finds
            it by the names of the files, and says it in a log line of level INFO.
        revision: branch, tag or commit of a repository.
        local_files_only: read the hub's cache and never ask the network.

    Returns:
        The module of the saved architecture in evaluation mode. ``metadata`` is what the files say
        of the model and the layer; of another tool's files it has the format, as "format".

    Raises:
        DataError: nothing there; no SAE in it, or several, which are listed; files that are damaged
            or that no architecture here can be.

    Example:
        >>> import tempfile, torch
        >>> from sae_kernels.nn import TopKSAE
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     TopKSAE(4, 16, k=2).save_pretrained(folder)
        ...     sae = load(folder, dtype=torch.bfloat16)
        >>> type(sae).__name__, sae.W_enc.dtype, sae.training
        ('TopKSAE', torch.bfloat16, False)
    """
    found = locate(path_or_name, format, revision=revision, local_files_only=local_files_only)
    config, tensors, metadata = read(*found)
    sae = from_weights(config, tensors)
    sae.metadata = metadata if found.format == "native" else {**metadata, "format": found.format}
    _log.info("%s: %s SAE in the format %s", path_or_name, config.architecture, found.format)
    return sae.to(device=device, dtype=dtype)


def locate(
    path_or_name: str | Path,
    format: str | None = None,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Found:
    """Finds the one SAE that a path or a hub name stands for, and downloads it if need be.

    Args:
        path_or_name, format, revision, local_files_only: as of :func:`load`.

    Raises:
        DataError: there is none, or there are several, which are listed.
    """
    chosen = None if format is None else known(format)
    path = Path(path_or_name)
    if path.exists():
        return _on_disk(path, chosen)
    place = HubPlace.of(str(path_or_name))
    if place is None:
        raise DataError(
            f"{path_or_name}: expected a folder with a saved SAE, its weights file or a hub name "
            "owner/repo, there is nothing"
        )
    if local_files_only:
        inside = hub.cached_folder(place.repository, revision) / place.inside
        if not inside.exists():
            raise DataError(f"{path_or_name}: expected it in the hub's cache, it is not there")
        return _on_disk(inside, chosen)
    return _on_hub(place, chosen, revision)


def _on_disk(path: Path, chosen: Format | None) -> Found:
    """The SAE at a path; a folder without one may hold one further down."""
    if path.is_file():
        return Found(path, detect(path) if chosen is None else chosen.name)
    here = present(path)
    if chosen is None and here:
        return Found(path, one_of(path, here))
    if chosen is not None and chosen.name in here:
        return Found(path, chosen.name)
    below = _saes(_files_below(path), chosen)
    if not below and chosen is not None:
        return Found(path, chosen.name)  # whose reader says which file is missing
    inside, name = _only(path, below)
    return Found(path / inside, name)


def _on_hub(place: HubPlace, chosen: Format | None, revision: str | None) -> Found:
    """The SAE at a place of a repository, its settings downloaded first and then its weights."""
    shown = "/".join(filter(None, place))
    listing = hub.listing(place.repository, revision)
    files = [PurePosixPath(file) for file in listing.files]
    inside = PurePosixPath(place.inside)
    if inside in files:
        folder, beside = inside.parent, {f.name for f in files if f.parent == inside.parent}
        fitting = [f.name for f in FORMATS.values() if f.fits_file(inside.name, beside)]
        name = one_of(shown, fitting) if chosen is None else chosen.name
        weights = [inside]
    else:
        below = _saes([file for file in files if inside in file.parents], chosen)
        at = {inside: below[inside]} if inside in below else below
        folder, name = _only(shown, at)
        names = {file.name for file in files if file.parent == folder}
        weights = [folder / file for file in FORMATS[name].weights(names)]
    settings = [
        parent / file
        # dictionary_learning's checkpoints share the settings of the folder above theirs.
        for parent in (folder, *([folder.parent] if folder.name == "checkpoints" else []))
        for file in FORMATS[name].settings
        if parent / file in files
    ]
    wanted = [str(file) for file in (*settings, *weights)]
    path = hub.download(place.repository, wanted, listing.commit)[-1]
    return Found(path if inside in files else path.parent, name)


def _saes(files: Iterable[PurePosixPath], chosen: Format | None) -> dict[PurePosixPath, list[str]]:
    """The folders that hold an SAE, each with the formats that its files fit."""
    names: dict[PurePosixPath, set[str]] = {}
    for file in files:
        names.setdefault(file.parent, set()).add(file.name)
    formats = FORMATS.values() if chosen is None else [chosen]
    fitting = {at: [f.name for f in formats if f.fits(here)] for at, here in names.items()}
    return {at: found for at, found in sorted(fitting.items()) if found}


def _only(shown: object, below: dict[PurePosixPath, list[str]]) -> tuple[PurePosixPath, str]:
    """The single SAE below a folder, and its format.

    Raises:
        DataError: there is none; there are several, which are listed; or it has the files of
            several formats.
    """
    if not below:
        one_of(shown, [])
    if len(below) > 1:
        listed = ", ".join(f"{at!s:.200}" for at in [*below][:_SHOWN])
        more = ", ..." if len(below) > _SHOWN else ""
        raise DataError(
            f"{shown}: expected one SAE, got a folder with {len(below)} of them: {listed}{more}; "
            "name one"
        )
    ((folder, names),) = below.items()
    return folder, one_of(f"{shown}/{folder}", names)


def _files_below(folder: Path) -> Iterator[PurePosixPath]:
    """Every file below a folder by its path in it; no link to a folder is followed."""
    files = (
        PurePosixPath(Path(at, name).relative_to(folder).as_posix())
        for at, _, names in os.walk(folder)
        for name in names
    )
    return itertools.islice(files, _WALKED)
