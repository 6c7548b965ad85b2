"""Loading an SAE from a folder, a weights file or the hub, whichever tool saved it."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.errors import DataError
from sae_kernels.formats.table import (
    FORMATS,
    Format,
    describe,
    detect,
    known,
    one_of,
    present,
    read,
)
from sae_kernels.io import hub
from sae_kernels.io.hub import HubPlace
from sae_kernels.nn.registry import from_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    import torch

    from sae_kernels.nn import SparseAutoencoder

_log = logging.getLogger(__name__)
_SHOWN = 12  # SAEs that an error lists by name
_WALKED = 100_000  # files of a folder that are looked at
_CHECKPOINTS, _SAE = "checkpoints", "sae"  # of a run's folder: runs/ is a room above


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
    layer: int | None = None,
    activation_scale: float | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> SparseAutoencoder:
    """Loads an SAE that any of the known tools saved, ready for use.

    Read are this package's own files and those of SAELens, sparsify, dictionary_learning (with its
    fork switch_sae), Gemma Scope and circuit-tracer; docs/formats.md has what of each.

    Args:
        path_or_name: a folder, the weights file in one, or a repository on the Hugging Face hub as
            ``owner/repo`` or ``owner/repo/folder``. Of a repository the settings and weights of
            this one SAE are downloaded, the settings first.
        device: where the weights go; None is the CPU.
        dtype: of the weights; None leaves that of the file. Thresholds keep their own precision.
        format: "native", "saelens", "sparsify", "dictionary_learning", "gemma_scope",
            "circuit_tracer" or "circuit_tracer_clt"; None finds it by the names of the files, and
            says it in a log line of level INFO.
        layer: which transcoder of circuit-tracer's set, by the number of its layer.
        activation_scale: the factor of activations, for an SAE of SAELens whose folder asks for
            one (``normalize_activations = "expected_average_only_in"``) and does not hold it.
        revision: branch, tag or commit of a repository.
        local_files_only: read the hub's cache and never ask the network.

    Returns:
        The module of the saved architecture in evaluation mode. Of ``metadata``, "activations" is
        what the files say of the model and the layer; of another tool's files it has the format as
        "format", and all fields that are not interpreted under the format's name.

    Raises:
        DataError: nothing there; no SAE in it, or several, which are listed; files that are damaged
            or that no architecture here can be.
        ValueError: a layer or a factor for files that have no use for it.

    Example:
        >>> import tempfile, torch
        >>> from sae_kernels.nn import TopKSAE
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     TopKSAE(4, 16, k=2).save_pretrained(folder)
        ...     sae = load(folder, dtype=torch.bfloat16)
        >>> type(sae).__name__, sae.W_enc.dtype, sae.training
        ('TopKSAE', torch.bfloat16, False)
    """
    found = locate(
        path_or_name, format, layer=layer, revision=revision, local_files_only=local_files_only
    )
    config, tensors, metadata = read(*found, activation_scale=activation_scale)
    sae = from_weights(config, tensors)
    sae.metadata = metadata if found.format == "native" else {**metadata, "format": found.format}
    _log.info("%s: %s SAE in the format %s", path_or_name, config.architecture, found.format)
    return sae.to(device=device, dtype=dtype)


def locate(
    path_or_name: str | Path,
    format: str | None = None,
    *,
    layer: int | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Found:
    """Finds the one SAE that a path or a hub name stands for, and downloads it if need be.

    Args:
        path_or_name, format, layer, revision, local_files_only: as of :func:`load`.

    Raises:
        DataError: there is none, or there are several, which are listed.
    """
    chosen = None if format is None else known(format)
    path = Path(path_or_name)
    if path.exists():
        return _on_disk(path, chosen, layer)
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
        return _on_disk(inside, chosen, layer)
    return _on_hub(place, chosen, revision, layer)


def find(folder: str | Path) -> list[Found]:
    """All SAEs in a folder and below it, sorted; of a finished run its checkpoints are left out.

    Args:
        folder: of a release, of runs, of a set; at most 100,000 files are looked at.

    Example:
        >>> import tempfile
        >>> from sae_kernels.nn import TopKSAE
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for k in (2, 3):
        ...         TopKSAE(4, 16, k=k).save_pretrained(f"{folder}/k{k}")
        ...     [(found.path.name, found.format) for found in find(folder)]
        [('k2', 'native'), ('k3', 'native')]
    """
    folder = Path(folder)
    below = _saes(_files_below(folder), None)
    return [Found(folder / at, name) for at, names in below.items() for name in names]


def _on_disk(path: Path, chosen: Format | None, layer: int | None) -> Found:
    """The SAE at a path; a folder without one may hold one further down."""
    if path.is_file():
        _no_layer(layer, path)
        return Found(path, detect(path) if chosen is None else chosen.name)
    here = [name for name in present(path) if chosen is None or chosen.name == name]
    if here and not FORMATS[one_of(path, here)].layer_file:
        _no_layer(layer, path)
        return Found(path, here[0])
    below = _saes(_files_below(path, deep=not here), chosen)
    if not below and chosen is not None:
        return Found(path, chosen.name)  # whose reader says which file is missing
    inside, name = _only(path, below, layer, _described(path))
    return Found(path / inside, name)


def _on_hub(
    place: HubPlace, chosen: Format | None, revision: str | None, layer: int | None
) -> Found:
    """The SAE at a place of a repository, its settings downloaded first and then its weights."""
    shown = "/".join(filter(None, place))
    listing = hub.listing(place.repository, revision)
    files = [PurePosixPath(file) for file in listing.files]
    inside = PurePosixPath(place.inside)
    if inside in files:
        _no_layer(layer, shown)
        folder, beside = inside.parent, {f.name for f in files if f.parent == inside.parent}
        fitting = [f.name for f in FORMATS.values() if f.fits_file(inside.name, beside)]
        name = one_of(shown, fitting) if chosen is None else chosen.name
        weights = [inside]
    else:
        below = _saes([file for file in files if inside in file.parents], chosen)
        at = {inside: below[inside]} if inside in below else below
        folder, name = _only(shown, at, layer)
        if FORMATS[name].layer_file and folder in files:
            weights, folder = [folder], folder.parent
        else:
            names = {file.name for file in files if file.parent == folder}
            weights = [folder / file for file in FORMATS[name].weights(names)]
    settings = [
        parent / file
        # dictionary_learning's checkpoints share the settings of the folder above theirs.
        for parent in (folder, *([folder.parent] if folder.name == "checkpoints" else []))
        for file in FORMATS[name].settings
        if parent / file in files
    ]
    # Of a set that is refused by its settings no weights are downloaded.
    wanted = [str(file) for file in (*settings, *weights)]
    path = hub.download(place.repository, wanted, listing.commit)[-1]
    is_file = inside in files or bool(FORMATS[name].layer_file)
    return Found(path if is_file else path.parent, name)


def _saes(files: Iterable[PurePosixPath], chosen: Format | None) -> dict[PurePosixPath, list[str]]:
    """The folders that hold an SAE, or a layer's file in one, each with the formats it fits."""
    names: dict[PurePosixPath, set[str]] = {}
    for file in files:
        names.setdefault(file.parent, set()).add(file.name)
    formats = list(FORMATS.values()) if chosen is None else [chosen]
    found: dict[PurePosixPath, list[str]] = {}
    for at, here in sorted(names.items()):
        for format in formats:
            if format.fits(here) and not _is_checkpoint(at, names):
                for place in format.saes(here):
                    found.setdefault(at / place, []).append(format.name)
    return found


def _is_checkpoint(at: PurePosixPath, names: Collection[PurePosixPath]) -> bool:
    """Whether a folder is a checkpoint of a run that has saved its SAE."""
    return at.parent.name == _CHECKPOINTS and at.parent.parent / _SAE in names


def _only(
    shown: object,
    below: dict[PurePosixPath, list[str]],
    layer: int | None,
    describe: Callable[[PurePosixPath, str], str] = lambda at, name: "",
) -> tuple[PurePosixPath, str]:
    """The single SAE below a folder, and its format.

    Raises:
        DataError: there is none; there are several, which are listed; or it has the files of
            several formats.
        ValueError: a layer where no SAE is one of a set of layers.
    """
    if not below:
        one_of(shown, [])
    fitting = below if layer is None else _of_layer(shown, below, layer)
    if len(fitting) == 1:
        ((folder, names),) = fitting.items()
        return folder, one_of(f"{shown}/{folder}", names)
    several = [*(fitting or below).items()]
    listed = ", ".join(f"{at!s:.200}{describe(at, names[0])}" for at, names in several[:_SHOWN])
    more = ", ..." if len(several) > _SHOWN else ""
    wanted = "one SAE" if layer is None else f"one of layer {layer}"
    raise DataError(
        f"{shown}: expected {wanted}, got a folder with {len(several)} of them: {listed}{more}; "
        "name one"
    )


def _of_layer(
    shown: object, below: dict[PurePosixPath, list[str]], layer: int
) -> dict[PurePosixPath, list[str]]:
    """Those that are the given layer of a set."""
    files = {at: [FORMATS[name].layer_file for name in names] for at, names in below.items()}
    if not any(any(names) for names in files.values()):
        _no_layer(layer, shown)
    named = {at for at, names in files.items() if at.name in [n.format(layer) for n in names]}
    return {at: names for at, names in below.items() if at in named}


def _no_layer(layer: int | None, shown: object) -> None:
    if layer is not None:
        raise ValueError(
            f"layer: expected none, as {shown} is no folder with a set of layers, got {layer}"
        )


def _described(folder: Path) -> Callable[[PurePosixPath, str], str]:
    """Words about an SAE below a folder, from its settings; none where they cannot be read."""

    def words(at: PurePosixPath, name: str) -> str:
        try:
            config = describe(folder / at, name)
        except (DataError, ValueError):
            return ""
        return f" ({config.architecture}, {config.d_in:,} to {config.n_latents:,})"

    return words


def _files_below(folder: Path, deep: bool = True) -> Iterator[PurePosixPath]:
    """Every file below a folder by its path in it; no link to a folder is followed."""
    files = (
        PurePosixPath(Path(at, name).relative_to(folder).as_posix())
        for at, _, names in itertools.islice(os.walk(folder), None if deep else 1)
        for name in names
    )
    return itertools.islice(files, _WALKED)
