"""Settings as TOML files, and the differences between two sets of settings."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import DataError
from sae_kernels.io.files import JSON_LIMIT, publish

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Tables = dict[str, Any]


def read_tables(path: Path) -> Tables:
    """Reads a TOML file into tables.

    Raises:
        DataError: no such file, or no TOML.
    """
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise DataError(
                f"{path}: expected TOML of at most {JSON_LIMIT} bytes; name a TOML file"
            )
        # Some editors write a byte order mark, which TOML does not have.
        return tomllib.loads(path.read_text(encoding="utf-8").removeprefix("\ufeff"))
    except FileNotFoundError:
        raise DataError(f"{path}: expected a TOML file, it is not there") from None
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise DataError(f"{path}: expected TOML ({error})") from error


def write_tables(path: Path, tables: Mapping[str, Any]) -> None:
    """Writes settings as TOML, atomically; None is left out, as TOML has none."""
    import tomli_w  # writing alone needs it: kernels are measured where it is missing

    text = tomli_w.dumps(plain(tables))
    publish(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def plain(value: Any) -> Any:
    """A value as TOML can hold it: without None, tuples and paths.

    Example:
        >>> plain({"k": 32, "lr": None, "groups": (1, 2), "data": {}})
        {'k': 32, 'groups': [1, 2]}
    """
    if isinstance(value, dict):
        items = {str(key): plain(item) for key, item in value.items() if item is not None}
        return {key: item for key, item in items.items() if item != {}}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def changes(before: Tables, now: Tables, defaults: Tables) -> dict[str, tuple[Any, Any]]:
    """Keys whose values differ, with both values; a missing key counts as its default.

    Example:
        >>> changes({"train": {"lr": 1.0}}, {"train": {"lr": 2.0, "seed": 0}}, {"train.seed": 0})
        {'train.lr': (1.0, 2.0)}
    """
    old, new = dict(flat(before)), dict(flat(now))
    found = {}
    for key in sorted(old.keys() | new.keys()):
        values = tuple(side.get(key, defaults.get(key)) for side in (old, new))
        if values[0] != values[1]:
            found[key] = (values[0], values[1])
    return found


def flat(tables: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Pairs of a dotted key, as "train.lr", and its value."""
    for key, value in tables.items():
        if isinstance(value, dict):
            yield from flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value
