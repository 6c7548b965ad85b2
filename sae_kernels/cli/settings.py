"""Flags and TOML files out of the settings' dataclasses, which stay the one place to edit."""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sae_kernels.config.tables import read_tables
from sae_kernels.nn import CONFIGS
from sae_kernels.training import PRESETS
from sae_kernels.training.run_config import (
    DEFAULT_ARCHITECTURE,
    FIELDS,
    LATENTS_PER_INPUT,
    check_tables,
    merged,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from sae_kernels.config.tables import Tables

_OWN = ("folders",)  # arguments, not flags
_DEFAULTS = {
    "d_in": "width of the activations",
    "n_latents": f"{LATENTS_PER_INPUT} d_in",
    "d_out": "d_in, or the width of the target",
    "n_layers": "how many folders of activations are given",
}


def arch_help(*data: str) -> str:
    """What --arch says: the architectures that are trained on such data."""
    fit = [f"{name}, {each.about}" for name, each in PRESETS.items() if each.data in data]
    return f"Architecture: {'; '.join(fit)}. [default: {DEFAULT_ARCHITECTURE}]"


def with_flags(*tables: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Puts a flag for every setting of these tables where the command takes ``**flags``.

    A flag that is not given is None. The command's own parameters come before settings of a name.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def wrapper(**arguments: Any) -> None:
            command(**arguments)

        signature = inspect.signature(command, eval_str=True)
        own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
        flags = [
            _flag(table, name) for table in tables for name in FIELDS[table] if name not in _OWN
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
    """The settings of a file and of flags, which come first; one of no such table is refused.

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
        names = [name for name in FIELDS[table] if flags.get(_flag_name(table, name)) is not None]
        above[table] = {name: flags[_flag_name(table, name)] for name in names}
    return merged(below, above)


def _flag_name(table: str, field: str) -> str:
    """The field's name; the SAE's own gets a prefix where training has one of that name too."""
    return f"sae_{field}" if table == "sae" and field in FIELDS["train"] else field


def _flag(table: str, setting: str) -> inspect.Parameter:
    cls, field = FIELDS[table][setting]
    kind = _kind(table, setting)
    if isinstance(kind, types.UnionType):
        kind = next(member for member in typing.get_args(kind) if member is not types.NoneType)
    metavar = None
    if typing.get_origin(kind) is Literal:
        # A plain string: the settings check themselves, and their message is better.
        metavar, kind = "|".join(typing.get_args(kind)), str
    elif kind == tuple[str, ...]:
        kind = list[str]
    elif typing.get_origin(kind) is tuple:
        metavar, kind = "N,N,...", str
    name = _flag_name(table, setting)
    default = _DEFAULTS.get(setting, field.default)
    words = _descriptions(cls).get(setting, setting)
    words += "" if default in (None, ()) else f" [default: {default}]"
    # In the text, since the flag's own default is None: not given.
    option = typer.Option(help=words[0].upper() + words[1:], metavar=metavar)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _kind(table: str, setting: str) -> Any:
    """A setting's type: the wider one where architectures differ, as in k of TopK and BatchTopK."""
    classes = CONFIGS.values() if table == "sae" else [FIELDS[table][setting][0]]
    kinds = [hints[setting] for hints in map(typing.get_type_hints, classes) if setting in hints]
    return float if float in kinds else kinds[0]


@functools.cache
def _descriptions(cls: type) -> dict[str, str]:
    """What the docstrings of the class and its bases say about each attribute."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        text = inspect.cleandoc(base.__doc__ or "").replace("``", "").partition("Attributes:\n")[2]
        entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
        for names, words in entries:
            found |= {name: " ".join(words.split()) for name in names.split(", ")}
    return found
