"""Flags and TOML files out of the settings' dataclasses, which stay the one place to edit."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
import sys
import types
import typing
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sae_kernels.errors import name_hint
from sae_kernels.nn import TopKConfig
from sae_kernels.train import TrainConfig

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TABLES: dict[str, Any] = {"sae": TopKConfig, "train": TrainConfig}
LATENTS_PER_INPUT = 8
_DEFAULTS = {"d_in": "width of the activations", "n_latents": f"{LATENTS_PER_INPUT} d_in"}


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Puts a flag for every setting where the command takes ``**flags``; None is not given."""

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        command(**arguments)

    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags = [_flag(table, field) for table in TABLES for field in dataclasses.fields(TABLES[table])]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=keyword) for p in own] + flags
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def configs(path: Path | None, flags: dict[str, Any], d_in: int) -> tuple[TopKConfig, TrainConfig]:
    """The settings for activations of this width: flags over the file over the defaults.

    Raises:
        ValueError: an unknown table or key, a value that does not fit, a file that is no TOML.
    """
    tables = _read(path) if path else {table: {} for table in TABLES}
    for table, cls in TABLES.items():
        for field in dataclasses.fields(cls):
            value = flags.get(_flag_name(table, field.name))
            if value is not None:
                tables[table][field.name] = value
    sae, train = tables["sae"], tables["train"]
    if "activation_scale" in sae and train.setdefault("activation_scale", "none") != "none":
        raise ValueError(
            f"activation_scale: expected the SAE's own {sae['activation_scale']} or an estimate, "
            f"got both; leave out one of them, or set the one of [train] to none"
        )
    defaults = {"d_in": d_in, "n_latents": LATENTS_PER_INPUT * d_in}
    return TopKConfig(**defaults | sae), TrainConfig(**train)


def _read(path: Path) -> dict[str, dict[str, Any]]:
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected TOML ({error})") from error
    _refuse_unknown(f"{path}: unknown table", tables, TABLES)
    for table, values in tables.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a table [{table}], got {values!r}")
        known = [field.name for field in dataclasses.fields(TABLES[table])]
        _refuse_unknown(f"{path}: [{table}]: unknown key", values, known)
    return {table: dict(tables.get(table, {})) for table in TABLES}


def _refuse_unknown(what: str, given: typing.Iterable[str], known: typing.Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{what} {name!r}; {name_hint(name, known)}")


def _flag_name(table: str, field: str) -> str:
    """The field's name; the SAE's own gets a prefix where training has one of that name too."""
    shared = any(field == other.name for other in dataclasses.fields(TrainConfig))
    return f"sae_{field}" if table == "sae" and shared else field


def _flag(table: str, field: dataclasses.Field[Any]) -> inspect.Parameter:
    cls = TABLES[table]
    kind = typing.get_type_hints(cls)[field.name]
    if isinstance(kind, types.UnionType):
        kind = next(member for member in typing.get_args(kind) if member is not types.NoneType)
    metavar = None
    if typing.get_origin(kind) is Literal:
        # A plain string: the settings check themselves, and their message is better.
        metavar, kind = "|".join(typing.get_args(kind)), str
    name = _flag_name(table, field.name)
    default = _DEFAULTS.get(field.name, field.default)
    words = _descriptions(cls).get(field.name, field.name)
    words += "" if default is None else f" [default: {default}]"
    # In the text, since the flag's own default is None: not given.
    option = typer.Option(help=words[0].upper() + words[1:], metavar=metavar)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


@functools.cache
def _descriptions(cls: type) -> dict[str, str]:
    """What the class's docstring says about each attribute."""
    text = inspect.cleandoc(cls.__doc__ or "").replace("``", "").partition("Attributes:\n")[2]
    entries = re.findall(r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for names, words in entries for name in names.split(", ")}
