"""Reading and writing SAE files: this package's own, and those of other tools (docs/formats.md)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sae_kernels.errors import DataError, name_hint
from sae_kernels.formats import dictionary_learning, gemma_scope, native, saelens, sparsify
from sae_kernels.formats.dictionary_learning import read_dictionary_learning
from sae_kernels.formats.dictionary_learning_writer import write_dictionary_learning
from sae_kernels.formats.gemma_scope import read_gemma_scope
from sae_kernels.formats.layout import Weights
from sae_kernels.formats.saelens import read_saelens
from sae_kernels.formats.saelens_writer import write_saelens
from sae_kernels.formats.sparsify import read_sparsify, write_sparsify

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "Weights",
    "detect",
    "present",
    "read",
    "read_dictionary_learning",
    "read_gemma_scope",
    "read_saelens",
    "read_sparsify",
    "shapes",
    "write_dictionary_learning",
    "write_saelens",
    "write_sparsify",
]

# The files by which a folder is known; all of one list must be there.
_SIGNS: dict[str, list[tuple[str, ...]]] = {
    "native": [(native.CONFIG_FILE, native.WEIGHTS_FILE)],
    "saelens": [(saelens.CONFIG_FILE, saelens.WEIGHTS_FILE)],
    "sparsify": [(sparsify.CONFIG_FILE, sparsify.WEIGHTS_FILE)],
    "dictionary_learning": [(dictionary_learning.WEIGHTS_FILE,)],
    "gemma_scope": [(name,) for name in gemma_scope.FILES],
}
_READERS: dict[str, Callable[[str | Path], Weights]] = {
    "native": native.read_native,
    "saelens": read_saelens,
    "sparsify": read_sparsify,
    "dictionary_learning": read_dictionary_learning,
    "gemma_scope": read_gemma_scope,
}


def present(path: str | Path) -> list[str]:
    """The formats of which a folder (or a file) has all files."""
    path = Path(path)
    if path.suffix == ".pt" and path.is_file():
        return ["dictionary_learning"]
    if (path.suffix == ".npz" or path.name in gemma_scope.FILES) and path.is_file():
        return ["gemma_scope"]
    return [
        name
        for name, signs in _SIGNS.items()
        if any(all((path / file).is_file() for file in files) for files in signs)
    ]


def detect(path: str | Path) -> str:
    """Whose format a folder (or a file) has, by the names of its files alone.

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
    found = present(path)
    if not found:
        known = "; ".join(
            f"{' and '.join(files)} ({name})" for name, signs in _SIGNS.items() for files in signs
        )
        raise DataError(f"{path}: expected the files of a saved SAE: {known}")
    if len(found) > 1:
        raise DataError(
            f"{path}: expected the files of one saved SAE, got those of {' and '.join(found)}; "
            "say which format to read"
        )
    return found[0]


def read(path: str | Path, format: str | None = None) -> Weights:
    """An SAE in anybody's files, in the format that `detect` finds or that is named.

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
    format = detect(path) if format is None else format
    if format not in _READERS:
        raise DataError(f"format: got {format!r}; {name_hint(format, _READERS)}")
    return _READERS[format](path)
