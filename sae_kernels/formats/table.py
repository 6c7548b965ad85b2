"""The table of formats: by which files each is known, and what reads and writes it."""

from __future__ import annotations

import fnmatch
import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_kernels.errors import DataError, name_hint
from sae_kernels.formats import (
    circuit_tracer,
    circuit_tracer_clt,
    dictionary_learning,
    gemma_scope,
    native,
    saelens,
    saelens_config,
    saelens_whitening,
    sparsify,
)
from sae_kernels.formats.dictionary_learning_writer import write_dictionary_learning
from sae_kernels.formats.native import folded
from sae_kernels.formats.saelens_writer import write_saelens

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from sae_kernels.formats.layout import Weights
    from sae_kernels.nn import SAEConfig

_LISTED = 100_000  # entries of a folder that are looked at


class Format(NamedTuple):
    """One tool's way to save an SAE.

    Attributes:
        name: as commands and functions call it.
        files: a folder is of the format if it holds all files of one of these; ``*`` stands for
            any part of a name.
        read: from a folder or a weights file.
        write: into a folder; None: it is only read.
        describe: the configuration, from settings and headers alone.
        settings: small files that may lie beside the weights; they are read first.
        suffix: of a weights file that may have any name; none: the name decides.
        layer_file: name of a layer's weights, of a folder that holds several layers' SAEs.
        read_options: further arguments of ``read``.
    """

    name: str
    files: tuple[tuple[str, ...], ...]
    read: Callable[..., Weights]
    write: Callable[..., None] | None
    describe: Callable[[str | Path], SAEConfig]
    settings: tuple[str, ...]
    suffix: str = ""
    layer_file: str = ""
    read_options: tuple[str, ...] = ()

    def fits(self, names: Collection[str]) -> bool:
        """Whether files of these names make a folder of the format."""
        return any(all(_like(file, names) for file in files) for files in self.files)

    def fits_file(self, name: str, beside: Collection[str]) -> bool:
        """Whether a file is the weights of an SAE of the format, by what lies beside it."""
        if self.suffix and name.endswith(self.suffix):
            return True
        return any(
            _like(files[-1], [name]) and all(_like(file, beside) for file in files)
            for files in self.files
        )

    def weights(self, names: Collection[str]) -> list[str]:
        """The weights of the one SAE in a folder that fits; none in one of several layers."""
        files = next(f for f in self.files if all(_like(file, names) for file in f))
        if self.layer_file:
            return []
        patterns = [file for file in files if file not in self.settings]
        return sorted(name for pattern in patterns for name in _like(pattern, names))

    def saes(self, names: Collection[str]) -> list[str]:
        """The places in a folder that fits, each with an SAE: the folder, or a file a layer."""
        layers = _like(self.layer_file.format("*"), names) if self.layer_file else []
        return sorted(layers, key=lambda name: (len(name), name)) or [""]


def _like(file: str, names: Collection[str]) -> list[str]:
    """The names that a file's name or pattern stands for."""
    if "*" in file:
        return fnmatch.filter(names, file)
    return [file] if file in names else []


# A folder's weights file comes last among its files.
FORMATS = {
    format.name: format
    for format in (
        Format(
            "native",
            ((native.CONFIG_FILE, native.WEIGHTS_FILE),),
            native.read_native,
            native.write_native,
            native.describe_native,
            (native.CONFIG_FILE,),
        ),
        Format(
            "saelens",
            ((saelens.CONFIG_FILE, saelens.WEIGHTS_FILE),),
            saelens.read_saelens,
            write_saelens,
            saelens.describe_saelens,
            (
                saelens.CONFIG_FILE,
                saelens_config.SCALER_FILE,
                saelens_whitening.WHITENING_FILE,
            ),
            read_options=("activation_scale",),
        ),
        Format(
            "sparsify",
            ((sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE),),
            sparsify.read_sparsify,
            sparsify.write_sparsify,
            sparsify.describe_sparsify,
            (sparsify.CONFIG_FILE,),
        ),
        Format(
            "dictionary_learning",
            ((dictionary_learning.WEIGHTS_FILE,),),
            dictionary_learning.read_dictionary_learning,
            write_dictionary_learning,
            dictionary_learning.describe_dictionary_learning,
            (dictionary_learning.CONFIG_FILE,),
            ".pt",
        ),
        Format(
            "gemma_scope",
            tuple((name,) for name in gemma_scope.FILES),
            gemma_scope.read_gemma_scope,
            None,
            gemma_scope.describe_gemma_scope,
            (gemma_scope.CONFIG_FILE,),
            ".npz",
        ),
        Format(
            "circuit_tracer",
            ((circuit_tracer.CONFIG_FILE, circuit_tracer.LAYER_FILE.format("*")),),
            circuit_tracer.read_circuit_tracer,
            circuit_tracer.write_circuit_tracer,
            circuit_tracer.describe_circuit_tracer,
            (circuit_tracer.CONFIG_FILE,),
            layer_file=circuit_tracer.LAYER_FILE,
        ),
        Format(
            "circuit_tracer_clt",
            (
                (
                    circuit_tracer.CONFIG_FILE,
                    circuit_tracer_clt.DECODER_FILE.format("*"),
                    circuit_tracer_clt.ENCODER_FILE.format("*"),
                ),
            ),
            circuit_tracer_clt.read_cross_layer,
            circuit_tracer_clt.write_cross_layer,
            circuit_tracer_clt.describe_cross_layer,
            (circuit_tracer.CONFIG_FILE,),
        ),
    )
}


def known(name: str, what: str = "format", *, written: bool = False) -> Format:
    """Looks up a format by its name.

    Args:
        name: as ``"saelens"``.
        what: how the error calls it.
        written: it must be one that is written too.

    Raises:
        DataError: no such format; the message has the nearest, or all.
    """
    names = [n for n, format in FORMATS.items() if format.write is not None or not written]
    if name not in names:
        raise DataError(f"{what}: got {name!r:.80}; {name_hint(str(name), names)}")
    return FORMATS[name]


def present(path: str | Path) -> list[str]:
    """Names of the formats that a folder or a weights file may be of, by file names alone."""
    path = Path(path)
    here = _files(path.parent if path.is_file() else path)
    if path.is_file():
        return [name for name, format in FORMATS.items() if format.fits_file(path.name, here)]
    return [name for name, format in FORMATS.items() if format.fits(here)]


def _files(folder: Path) -> set[str]:
    """Names of a folder's files; links to files count, pipes and the like do not."""
    try:
        with os.scandir(folder) as entries:
            return {e.name for e in itertools.islice(entries, _LISTED) if e.is_file()}
    except OSError:
        return set()


def detect(path: str | Path) -> str:
    """The format of a folder (or a weights file), by the names of its files alone.

    Returns:
        "native", "saelens", "sparsify", "dictionary_learning", "gemma_scope", "circuit_tracer" or
        "circuit_tracer_clt".

    Raises:
        DataError: nothing there, no saved SAE, or the files of several.

    Example:
        >>> import pathlib, tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pathlib.Path(folder, "ae.pt").touch()
        ...     detect(folder)
        'dictionary_learning'
    """
    if not Path(path).exists():
        raise DataError(f"{path}: expected a folder with a saved SAE, there is nothing")
    return one_of(path, present(path))


def one_of(path: object, found: list[str]) -> str:
    """The only format that was found at a place.

    Raises:
        DataError: there is none, or several.
    """
    if not found:
        signs = "; ".join(
            f"{' and '.join(files)} ({name})"
            for name, format in FORMATS.items()
            for files in format.files
        )
        raise DataError(f"{path}: expected the files of a saved SAE: {signs}")
    if len(found) > 1:
        raise DataError(
            f"{path}: expected the files of one saved SAE, got those of {' and '.join(found)}; "
            "say which format to read"
        )
    return found[0]


def read(path: str | Path, format: str | None = None, **options: Any) -> Weights:
    """Reads an SAE saved in any known format: the one named, or that `detect` finds.

    Args:
        path: a folder, or a weights file in one.
        format: as `detect` calls it.
        options: of the format's reader: ``activation_scale`` of SAELens' (`read_saelens`). None is
            not given.

    Raises:
        DataError: no such format, or what its reader refuses.
        ValueError: an option that the format's reader does not have.

    Example:
        >>> import tempfile, torch
        >>> from sae_kernels.nn import GatedConfig
        >>> tensors = {name: torch.zeros(size) for name, size in GatedConfig(2, 3).shapes().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_dictionary_learning(folder, GatedConfig(2, 3), tensors)
        ...     read(folder).config.architecture
        'gated'
    """
    chosen = known(detect(path) if format is None else format)
    given = {name: value for name, value in options.items() if value is not None}
    for name, value in given.items():
        if name not in chosen.read_options:
            raise ValueError(
                f"{name}: expected none for the format {chosen.name}, whose files leave nothing "
                f"out; got {value!r}"
            )
    return chosen.read(_place(Path(path), chosen), **given)


def describe(path: str | Path, format: str | None = None) -> SAEConfig:
    """Reads the configuration of an SAE saved in any known format, without its weights.

    Args:
        path, format: as of `read`.

    Raises:
        DataError: as `read`; tensors are compared with the configuration by `read` alone.
    """
    chosen = known(detect(path) if format is None else format)
    return chosen.describe(_place(Path(path), chosen))


def _place(path: Path, chosen: Format) -> Path:
    of_folders = not chosen.suffix and not chosen.layer_file and path.is_file()
    return path.parent if of_folders else path


def write(folder: str | Path, weights: Weights, to: str) -> None:
    """Writes an SAE in another tool's format; the function stays the same.

    A scale of activations, which other tools' files cannot say, is folded into the weights; codes
    are then in units of the raw activations.

    Args:
        folder: made when missing; the format's files in it are replaced.
        weights: as `read` gives them.
        to: the format's name.

    Raises:
        DataError: no such format, or none that is written.
        ValueError: an SAE that the format cannot hold; the message says why.

    Example:
        >>> import tempfile, torch
        >>> from sae_kernels.formats import Weights
        >>> from sae_kernels.nn import TopKConfig
        >>> config = TopKConfig(2, 4, k=1)
        >>> tensors = {name: torch.zeros(size) for name, size in config.shapes().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write(folder, Weights(config, tensors, {}), "sparsify")
        ...     detect(folder)
        'sparsify'
    """
    writer = known(to, "to", written=True).write
    assert writer is not None
    if to != "native":
        weights = folded(weights)
    writer(folder, weights.config, weights.tensors, weights.metadata)
