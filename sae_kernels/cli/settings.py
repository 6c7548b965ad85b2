"""Command-line flags generated from the settings' classes, merged with a TOML file."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from sae_kernels.config.base import NONE, declared
from sae_kernels.config.toml import read_tables
from sae_kernels.nn import presets
from sae_kernels.training.run_config import (
    DEFAULT_ARCHITECTURE,
    LATENTS_PER_INPUT,
    check_tables,
    merged,
    setting_classes,
    setting_names,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from sae_kernels.config.base import Declared, Settings
    from sae_kernels.config.toml import Tables

_Settings = TypeVar("_Settings", bound="Settings")
_OWN = ("folders",)  # arguments, not flags
_DEFAULTS = {
    "d_in": "width of the activations",
    "n_latents": f"{LATENTS_PER_INPUT} d_in",
    "d_out": "d_in, or the width of the target",
    "n_layers": "number of folders of activations",
}


def arch_help(*data: str) -> str:
    """Help text of --arch: the presets that train on such data, see ``Preset.data``."""
    kinds = {name: kind.preset for name, kind in presets().items()}
    fit = [f"{name}, {preset.about}" for name, preset in kinds.items() if preset.data in data]
    return f"Architecture: {'; '.join(fit)}. [default: {DEFAULT_ARCHITECTURE}]"


def with_flags(
    *tables: str | type[Settings],
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator that replaces a command's ``**flags`` by one flag per setting.

    Args:
        tables: tables of a run's TOML file, or single classes of settings.

    A flag that is not given is None. The command's own parameters come first.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**arguments: Any) -> None:
            command(**arguments)

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        flags = [
            _flag(setting_classes()[table] if isinstance(table, str) else [table], name)
            for table in tables
            for name in (setting_names(table) if isinstance(table, str) else declared(table))
            if name not in _OWN
        ]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters = [p.replace(kind=keyword) for p in own] + flags
        wrapper.__signature__ = signature.replace(  # type: ignore[attr-defined]
            parameters=parameters
        )
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return add


def given(
    path: Path | None, flags: dict[str, Any], arch: str | None, tables: Sequence[str]
) -> Tables:
    """Merges the settings of a TOML file with flags, which take precedence.

    Raises:
        ValueError: an unknown table or key.
        DataError: a file that is no TOML.
    """
    below = {} if path is None else read_tables(path)
    try:
        check_tables(below)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    above: Tables = {} if arch is None else {"arch": arch}
    for table in tables:
        names = [name for name in setting_names(table) if flags.get(name) is not None]
        above[table] = {name: flags[name] for name in names}
    return merged(below, above)


def with_given(settings: _Settings, flags: Mapping[str, Any]) -> _Settings:
    """The settings with those that flags of :func:`with_flags` gave.

    Raises:
        ValueError: a value out of range.
    """
    names = [name for name in declared(type(settings)) if flags.get(name) is not None]
    return dataclasses.replace(settings, **{name: flags[name] for name in names})


def _flag(classes: list[type[Settings]], setting: str) -> inspect.Parameter:
    found = [cls for cls in classes if setting in declared(cls)]
    # An architecture with further choices describes those of all.
    said = max((declared(cls)[setting] for cls in found), key=lambda each: len(each.choices))
    kind, metavar = _kind([declared(cls)[setting] for cls in found])
    default = _DEFAULTS.get(setting, _default(found, setting))
    words = said.words or setting
    words += "" if default in (None, ()) else f" [default: {default}]"
    # The default stands in the text, as the flag's own is None: not given.
    about: dict[str, Any] = {"help": words[0].upper() + words[1:], "metavar": metavar}
    if said.optional and kind in (int, float) and default is not None:
        parser = functools.partial(_or_none, kind)
        about |= {"metavar": f"{kind.__name__.upper()}|{NONE}", "parser": parser}
    annotation = Annotated[kind | None, typer.Option(**about)]  # type: ignore[valid-type]
    return inspect.Parameter(
        setting, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _or_none(kind: type[float], text: str) -> float | str:
    """A number, or the word for none."""
    if text == NONE:
        return text
    try:
        return kind(text)
    except ValueError:
        raise typer.BadParameter(f"expected a number or {NONE}, got {text!r}") from None


def _kind(said: list[Declared]) -> tuple[Any, str | None]:
    """Type and metavar of a flag, from all classes that have the setting."""
    names = list(dict.fromkeys(name for each in said for name in each.choices))
    kinds = [each.kind for each in said]
    if names:  # a plain string, as the settings' own error message is better
        return str, "|".join(names)
    if kinds[0] == tuple[str, ...]:
        return list[str], None
    if typing.get_origin(kinds[0]) is tuple:
        return str, "N,N,..."
    return (float if float in kinds else kinds[0]), None  # BatchTopK's k is a float


def _default(classes: list[type[Any]], setting: str) -> Any:
    """The default of a setting, or those of all architectures where they differ."""
    defaults = {
        f.default: None for cls in classes for f in dataclasses.fields(cls) if f.name == setting
    }
    defaults.pop(dataclasses.MISSING, None)
    if len(defaults) < 2:
        return next(iter(defaults), None)
    return " or ".join(map(str, defaults)) + ", by architecture"
