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
from sae_kernels.nn import CONFIGS
from sae_kernels.train import PRESETS, TrainConfig, nested_groups, preset

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from sae_kernels.nn import SAEConfig

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Every setting there is, by table: the class that describes it and its field. Architectures share
# most of theirs; a name means the same in all.
FIELDS: dict[str, dict[str, tuple[type, dataclasses.Field[Any]]]] = {
    "sae": {f.name: (c, f) for c in CONFIGS.values() for f in dataclasses.fields(c)},
    "train": {f.name: (TrainConfig, f) for f in dataclasses.fields(TrainConfig)},
}
DEFAULT_ARCHITECTURE = "topk"
LATENTS_PER_INPUT = 8
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


class Widths(typing.NamedTuple):
    """What the data says about an SAE: the width of each folder, and of a transcoder's target."""

    layers: list[int]
    target: int | None = None


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Puts a flag for every setting where the command takes ``**flags``; None is not given."""

    @functools.wraps(command)
    def wrapper(**arguments: Any) -> None:
        command(**arguments)

    signature = inspect.signature(command, eval_str=True)
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    flags = [_flag(table, name) for table, fields in FIELDS.items() for name in fields]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters = [p.replace(kind=keyword) for p in own] + flags
    wrapper.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
    return wrapper


def configs(
    path: Path | None, flags: dict[str, Any], widths: Widths, arch: str | None = None
) -> tuple[SAEConfig, TrainConfig]:
    """The settings for activations of these widths: flags over the file over the architecture's.

    Raises:
        ValueError: an unknown table, key or architecture, a setting that the architecture does not
            have, a value that does not fit, a file that is no TOML.
    """
    tables = _read(path)[1]
    for table, fields in FIELDS.items():
        for name in fields:
            value = flags.get(_flag_name(table, name))
            if value is not None:
                tables[table][name] = value
    arch = architecture(path, arch)
    chosen = preset(arch)
    sae, train = tables["sae"], tables["train"]
    if "activation_scale" in sae and train.setdefault("activation_scale", "none") != "none":
        raise ValueError(
            f"activation_scale: expected the SAE's own {sae['activation_scale']} or an estimate, "
            f"got both; leave out one of them, or set the one of [train] to none"
        )
    known = [field.name for field in dataclasses.fields(chosen.config)]
    for name in sae:
        if name not in known:
            raise ValueError(
                f"{name}: no setting of architecture {arch!r}, which has {', '.join(known)}"
            )
    sae = {**_of_data(widths), **chosen.sae, **sae}
    sae = {name: _typed(chosen.config, name, value) for name, value in sae.items()}
    if "groups" in chosen.sae and sae["groups"] == chosen.sae["groups"]:
        sae["groups"] = nested_groups(sae["n_latents"])
    return chosen.config(**sae), TrainConfig(**{**chosen.train, **train})


def architecture(path: Path | None, arch: str | None) -> str:
    """The name that counts: the flag's, the file's, or the default."""
    return arch or _read(path)[0] or DEFAULT_ARCHITECTURE


def _of_data(widths: Widths) -> dict[str, Any]:
    if len(set(widths.layers)) > 1:
        raise ValueError(
            f"expected layers of one width, got {widths.layers}; a crosscoder reads layers of one "
            "d_in"
        )
    d_in = widths.layers[0]
    values = {"d_in": d_in, "n_latents": LATENTS_PER_INPUT * d_in}
    if len(widths.layers) > 1:
        values["n_layers"] = len(widths.layers)
    if widths.target is not None:
        values["d_out"] = widths.target
    return values


def _typed(config: type, name: str, value: Any) -> Any:
    """A value as the field has it: flags know one type a name, and TOML no tuples."""
    kind = typing.get_type_hints(config)[name]
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if name == "groups" and isinstance(value, str):
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError as error:
            raise ValueError(
                f"groups: expected sizes such as 512,512,1024, got {value!r}"
            ) from error
    return value


def _read(path: Path | None) -> tuple[str | None, dict[str, dict[str, Any]]]:
    if path is None:
        return None, {table: {} for table in FIELDS}
    try:
        with path.open("rb") as file:
            tables = tomllib.load(file)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: expected TOML ({error})") from error
    arch = tables.pop("arch", None)
    if arch is not None and not isinstance(arch, str):
        raise ValueError(f"{path}: arch: expected one of {', '.join(PRESETS)}, got {arch!r}")
    _refuse_unknown(f"{path}: unknown table", tables, FIELDS)
    for table, values in tables.items():
        if not isinstance(values, dict):
            raise ValueError(f"{path}: expected a table [{table}], got {values!r}")
        _refuse_unknown(f"{path}: [{table}]: unknown key", values, FIELDS[table])
    return arch, {table: dict(tables.get(table, {})) for table in FIELDS}


def _refuse_unknown(what: str, given: typing.Iterable[str], known: typing.Iterable[str]) -> None:
    for name in given:
        if name not in known:
            raise ValueError(f"{what} {name!r}; {name_hint(name, known)}")


def _flag_name(table: str, field: str) -> str:
    """The field's name; the SAE's own gets a prefix where training has one of that name too."""
    return f"sae_{field}" if table == "sae" and field in FIELDS["train"] else field


def _flag(table: str, setting: str) -> inspect.Parameter:
    cls, field = FIELDS[table][setting]
    kind = typing.get_type_hints(cls)[setting]
    if isinstance(kind, types.UnionType):
        kind = next(member for member in typing.get_args(kind) if member is not types.NoneType)
    metavar = None
    if typing.get_origin(kind) is Literal:
        # A plain string: the settings check themselves, and their message is better.
        metavar, kind = "|".join(typing.get_args(kind)), str
    elif typing.get_origin(kind) is tuple:
        metavar, kind = "N,N,...", str
    name = _flag_name(table, setting)
    default = _DEFAULTS.get(setting, field.default)
    words = _descriptions(cls).get(setting, setting)
    words += "" if default is None else f" [default: {default}]"
    # In the text, since the flag's own default is None: not given.
    option = typer.Option(help=words[0].upper() + words[1:], metavar=metavar)
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


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
