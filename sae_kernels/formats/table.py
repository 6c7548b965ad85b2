"""The table of formats: by which files each is known, and what reads and writes it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.errors import DataError, name_hint
from sae_kernels.formats import (
    dictionary_learning,
    gemma_scope,
    native,
    saelens,
    saelens_config,
    sparsify,
)
from sae_kernels.formats.dictionary_learning_writer import write_dictionary_learning
from sae_kernels.formats.saelens_writer import write_saelens

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from sae_kernels.formats.layout import Weights


class Format(NamedTuple):
    """One tool's way to save an SAE.

    Attributes:
        name: as commands and functions call it.
        files: a folder is of the format if it holds all files of one of these.
        read: from a folder or a weights file.
        write: into a folder; None: it is only read.
        settings: small files that may lie beside the weights; they are read first.
        suffix: of a weights file that may have any name; none: the name decides.
    """

    name: str
    files: tuple[tuple[str, ...], ...]
    read: Callable[[str | Path], Weights]
    write: Callable[..., None] | None
    settings: tuple[str, ...]
    suffix: str = ""

    def fits(self, names: Collection[str]) -> bool:
        """Whether files of these names make a folder of the format."""
        return any(set(files) <= {*names} for files in self.files)

    def fits_file(self, name: str, beside: Collection[str]) -> bool:
        """Whether a file is the weights of an SAE of the format, by what lies beside it."""
        if self.suffix and name.endswith(self.suffix):
            return True
        return any(name == files[-1] and set(files) <= {*beside} for files in self.files)

    def weights(self, names: Collection[str]) -> list[str]:
        """The files of a folder that fits which are not settings."""
        files = next(files for files in self.files if set(files) <= {*names})
        return [file for file in files if file not in self.settings]


# A folder's weights file comes last among its files.
FORMATS = {
    format.name: format
    for format in (
        Format(
            "native",
            ((native.CONFIG_FILE, native.WEIGHTS_FILE),),
            native.read_native,
            native.write_native,
            (native.CONFIG_FILE,),
        ),
        Format(
            "saelens",
            ((saelens.CONFIG_FILE, saelens.WEIGHTS_FILE),),
            saelens.read_saelens,
            write_saelens,
            (saelens.CONFIG_FILE, saelens_config.SCALER_FILE),
        ),
        Format(
            "sparsify",
            ((sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE),),
            sparsify.read_sparsify,
            sparsify.write_sparsify,
            (sparsify.CONFIG_FILE,),
        ),
        Format(
            "dictionary_learning",
            ((dictionary_learning.WEIGHTS_FILE,),),
            dictionary_learning.read_dictionary_learning,
            write_dictionary_learning,
            (dictionary_learning.CONFIG_FILE,),
            ".pt",
        ),
        Format(
            "gemma_scope",
            tuple((name,) for name in gemma_scope.FILES),
            gemma_scope.read_gemma_scope,
            None,
            (gemma_scope.CONFIG_FILE,),
            ".npz",
        ),
    )
}


def known(name: str, what: str = "format", *, written: bool = False) -> Format:
    """The format of a name.

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
    """The formats of which a folder has all files, or whose weights a file is."""
    path = Path(path)
    folder = path.parent if path.is_file() else path
    signs = {file for format in FORMATS.values() for files in format.files for file in files}
    here = {file for file in signs if (folder / file).is_file()}
    if path.is_file():
        return [name for name, format in FORMATS.items() if format.fits_file(path.name, here)]
    return [name for name, format in FORMATS.items() if format.fits(here)]


def detect(path: str | Path) -> str:
    """The format of a folder (or a weights file), by the names of its files alone.

    Returns:
        "native", "saelens", "sparsify", "dictionary_learning" or "gemma_scope".

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


def read(path: str | Path, format: str | None = None) -> Weights:
    """The tensors of an SAE in anybody's files, in the format that `detect` finds or that is named.

    Args:
        path: a folder, or a weights file in one.
        format: as `detect` calls it.

    Raises:
        DataError: no such format, or what its reader refuses.

    Example:
        >>> import tempfile, torch
        >>> from sae_kernels.nn import GatedConfig
        >>> tensors = {name: torch.zeros(size) for name, size in GatedConfig(2, 3).shapes().items()}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_saelens(folder, GatedConfig(2, 3), tensors)
        ...     read(folder).config.architecture
        'gated'
    """
    chosen = known(detect(path) if format is None else format)
    path = Path(path)
    of_folders = not chosen.suffix and path.is_file()
    return chosen.read(path.parent if of_folders else path)


def write(folder: str | Path, weights: Weights, to: str) -> None:
    """Writes an SAE in another tool's format; the function stays the same.

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
    writer(folder, weights.config, weights.tensors, weights.metadata)
