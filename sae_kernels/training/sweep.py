"""Expands a sweep's TOML file into runs that share a stream of activations."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from sae_kernels.training.run_config import check_tables, merged, setting_classes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sae_kernels.config.toml import Tables

_GRID, _RUNS = "sweep", "run"
_KINDS = ("arch", "architecture")
_OWN = ("layer", "target_layer", "folders", "target")  # of [data]: what of the stream a run reads


def expand(tables: Tables) -> dict[str, Tables]:
    """The tables of each run of a sweep, by name.

    Args:
        tables: the shared settings, as of :class:`~sae_kernels.training.RunConfig`, with lists of
            values in ``[sweep]`` (keys are "table.key" or "arch"; every combination is a run)
            and further runs in ``[[run]]`` tables with a ``name`` and their own settings. Without
            either there is one run.

    All runs share the order of the data, ``train.data_seed``, the model and the text; they may
    differ in the layers or folders that they read.

    Raises:
        ValueError: unknown keys, values that are no lists, or duplicate names.

    Example:
        >>> base = {"sae": {"d_in": 8, "n_latents": 32}, "sweep": {"sae.k": [2, 4]}}
        >>> {name: run["sae"]["k"] for name, run in expand(base).items()}
        {'k2': 2, 'k4': 4}
    """
    check_tables(tables, also=(_GRID, _RUNS))
    base = {key: value for key, value in tables.items() if key not in (_GRID, _RUNS)}
    train = dict(base.get("train", {}))
    train.setdefault("data_seed", train.get("seed", 0))
    base = {**base, "train": train}
    found: dict[str, Tables] = {}
    for name, own in [*_grid(tables.get(_GRID, {})), *_named(tables.get(_RUNS, []))]:
        if name in found:
            raise ValueError(f"sweep: expected names that differ, got {name!r} twice")
        found[name] = merged(base, own)
    return found or {"run": base}


def _grid(grid: Any) -> Iterator[tuple[str, Tables]]:
    """Names and settings of every combination of the lists."""
    if not isinstance(grid, dict):
        raise ValueError(f"[sweep]: expected a table of lists, got {grid!r}")
    grid = dict(_flat(grid))
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"[sweep]: {key}: expected a list of values, got {values!r}")
    for values in itertools.product(*grid.values()) if grid else ():
        own: Tables = {}
        for key, value in zip(grid, values, strict=True):
            table, _, name = key.rpartition(".")
            own = merged(own, {table: {name: value}} if table else {name: value})
        _check_own("[sweep]", own)
        yield "-".join(_label(key, value) for key, value in zip(grid, values, strict=True)), own


def _named(runs: Any) -> Iterator[tuple[str, Tables]]:
    """Names and settings of the [[run]] tables."""
    if not isinstance(runs, list) or not all(isinstance(run, dict) for run in runs):
        raise ValueError("[[run]]: expected tables, each with a name")
    for run in runs:
        own = {key: value for key, value in run.items() if key != "name"}
        _check_own("[[run]]", own)
        if not isinstance(run.get("name"), str):
            raise ValueError(f"[[run]]: name: expected a name, got {run.get('name')!r}")
        yield run["name"], own


def _check_own(where: str, own: Tables) -> None:
    """Raises ValueError for unknown settings, and for those that all runs share."""
    try:
        check_tables(own)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    shared = [f"data.{name}" for name in own.get("data", {}) if name not in _OWN]
    for name in (*shared, *(["output"] if "output" in own else [])):
        table = name.partition(".")[0]
        raise ValueError(
            f"{where}: {name}: expected in the file's own table [{table}], shared by all runs"
        )


def _flat(grid: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Pairs of "table.key" and value, from either spelling in TOML."""
    for key, value in grid.items():
        if key in setting_classes() and isinstance(value, dict):
            yield from ((f"{key}.{name}", each) for name, each in value.items())
        else:
            yield key, value


def _label(key: str, value: Any) -> str:
    """The part of a run's name for one setting."""
    text = "x".join(map(str, value)) if isinstance(value, list) else str(value)
    text = text.lower() if isinstance(value, bool) else text
    name = key.rpartition(".")[2]
    digits = text[:1].isdigit()
    short = text if name in _KINDS else f"{name}{text}" if digits else f"{name}_{text}"
    return "".join(c if c.isalnum() or c in "._+-" else "_" for c in short)
