"""Safe reading of untrusted tensor files and settings: no code runs, headers are checked first."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from sae_kernels.errors import DataError
from sae_kernels.io.files import read_json

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

Tensors = dict[str, torch.Tensor]
STORED_DTYPES = {  # as safetensors calls them
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
Sizes = dict[str, tuple[int, ...]]

SETTINGS_LIMIT = 1 << 20  # bytes of a JSON file beside the weights; real ones have a few thousand
SETTINGS_DEPTH = 32
INTEGER_BITS = 63  # no width is longer; arithmetic on huge integers could take for ever
HEADER_LIMIT = 1 << 20  # bytes of the header that lists a file's tensors


class Stored(NamedTuple):
    """The tensors of an open file: their shapes, read and checked, and a function to load them.

    Attributes:
        path: the file.
        sizes: every tensor's shape, from the header; no data have been read.
        load: reads all tensors, on the CPU; allocates in proportion to the file's length.
    """

    path: Path
    sizes: Sizes
    load: Callable[[], Tensors]


def read_settings(path: Path) -> dict[str, Any]:
    """Reads the JSON object of settings beside an SAE's weights.

    Raises:
        DataError: a missing file, no JSON object, or one above the limits of length and depth.
    """
    values = read_json(path, limit=SETTINGS_LIMIT)
    if deeper(values, SETTINGS_DEPTH):
        raise DataError(f"{path}: expected a JSON object of at most {SETTINGS_DEPTH} levels")
    return values


def deeper(value: object, levels: int) -> bool:
    """Whether dictionaries and lists lie in each other on more than so many levels."""
    if not isinstance(value, (dict, list)):
        return False
    inside = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(deeper(part, levels - 1) for part in inside)


def check_integers(path: Path, values: Mapping[str, Any]) -> None:
    """Raises DataError for integers of more than 63 bits, before anything computes with them."""
    for name, value in values.items():
        if isinstance(value, int) and value.bit_length() > INTEGER_BITS:
            shown = name if name.isprintable() else repr(name)
            raise DataError(
                f"{path}: {shown:.300}: expected a number of at most {INTEGER_BITS} bits, got one "
                f"of {value.bit_length()}"
            )


def whole(path: Path, values: dict[str, Any], key: str, default: int | None = None) -> int:
    """A non-negative integer of a JSON object.

    Raises:
        DataError: the key is missing without a default, or holds something else.
    """
    value = values.get(key, default)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise DataError(f"{path}: {key}: expected an integer of at least 0, got {value!r:.80}")
    return value


def flag(path: Path, values: dict[str, Any], key: str, default: bool) -> bool:
    """A boolean of a JSON object.

    Raises:
        DataError: the key holds something else.
    """
    value = values.get(key, default)
    if not isinstance(value, bool):
        raise DataError(f"{path}: {key}: expected true or false, got {value!r:.80}")
    return value


@contextmanager
def reading(path: Path, what: str, advice: str = "") -> Iterator[None]:
    """Turns any exception of a parser into a DataError of one line.

    Raises:
        DataError: the file is missing, or the block raises.
    """
    if not path.is_file():  # opening a named pipe would block
        raise DataError(f"{path}: expected the file of a saved SAE, it is not there")
    try:
        yield
    except DataError:
        raise
    except Exception as error:  # parsers of damaged files raise anything
        said = " ".join(f"{type(error).__name__}: {error!s:.120}".split())
        reason = "".join(c if c.isprintable() else "?" for c in said)
        raise DataError(f"{path}: expected {what}, it cannot be read ({reason}){advice}") from error


def stored_safetensors(path: Path) -> Stored:
    """Opens a safetensors file and reads its header.

    Raises:
        DataError: a missing or damaged file; `load` raises it too.
    """
    what = "a safetensors file"
    with reading(path, what):
        with path.open("rb") as start:
            length = int.from_bytes(start.read(8), "little")
        if length > HEADER_LIMIT:
            raise ValueError(f"its header claims {length} bytes, {HEADER_LIMIT} are the most")
        with safe_open(path, framework="pt") as file:
            sizes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # no mapping

    def load() -> Tensors:
        with reading(path, what):
            tensors: Tensors = load_file(path)
            return tensors

    return Stored(path, sizes, load)


def read_safetensors(path: Path) -> Tensors:
    """Loads all tensors of a safetensors file, on the CPU.

    Raises:
        DataError: a missing or damaged file.
    """
    return stored_safetensors(path).load()
