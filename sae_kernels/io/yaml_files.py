"""Reading a stranger's YAML as plain values: no objects, no aliases, within limits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import yaml

from sae_kernels.errors import DataError
from sae_kernels.io.tensor_files import SETTINGS_DEPTH, deeper, reading

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

YAML_LIMIT = 32 << 10  # bytes; a set of 100 layers with a path for each has 10,000
_PLAIN = (str, int, float, bool, type(None))


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which makes plain values alone, without aliases.

    A few lines of aliases of aliases stand for more values than any memory holds.
    """

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias")
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads a YAML file that holds one mapping of what JSON can hold too.

    Raises:
        DataError: a missing file, one above 32 KiB or 32 levels, no YAML, an alias, values that
            JSON does not have.
    """
    with reading(path, "a YAML file"):
        if (size := path.stat().st_size) > YAML_LIMIT:
            raise DataError(
                f"{path}: expected a YAML file of at most {YAML_LIMIT} bytes, got {size}"
            )
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a safe loader
    if not isinstance(values, dict):
        raise DataError(f"{path}: expected a mapping, got {type(values).__name__}")
    if deeper(values, SETTINGS_DEPTH):
        raise DataError(f"{path}: expected a mapping of at most {SETTINGS_DEPTH} levels")
    _check_plain(path, values)
    return values


def yaml_text(values: Mapping[str, Any]) -> str:
    """Plain values as YAML, in their order."""
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return text


def _check_plain(path: Path, value: object) -> None:
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise DataError(f"{path}: expected names for keys, got {[*value]!r:.200}")
        value = [*value.values()]
    if isinstance(value, list):
        for part in value:
            _check_plain(path, part)
    elif not isinstance(value, _PLAIN) or (isinstance(value, float) and not math.isfinite(value)):
        raise DataError(
            f"{path}: expected text, finite numbers, true and false, got {type(value).__name__}"
        )
