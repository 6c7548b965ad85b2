"""Base of all settings: frozen dataclasses whose fields carry limits and documentation.

A field is declared as ``k: int = setting(32, "latents kept per token", POSITIVE_INTEGER)``. Its
type and limits are checked when the settings are created; the words document it in ``help()`` and
on the command line.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
import types
import typing
from contextlib import suppress
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from sae_kernels.errors import name_hint

_Settings = TypeVar("_Settings", bound="Settings")
NONE = "none"  # in TOML and on the command line, None for a setting whose default is not None


class Limit(NamedTuple):
    """A range of numbers from ``least`` to ``most``.

    Attributes:
        words: the range in an error message, as "a positive number".
        least, most: the ends.
        open_below, open_above: whether that end is excluded.
    """

    words: str
    least: float = -math.inf
    most: float = math.inf
    open_below: bool = False
    open_above: bool = False

    def holds(self, value: float) -> bool:
        """Whether a finite number lies in the range."""
        above = value > self.least if self.open_below else value >= self.least
        return above and (value < self.most if self.open_above else value <= self.most)


POSITIVE_INTEGER = Limit("a positive integer", least=1)
NATURAL = Limit("an integer of at least 0", least=0)
POSITIVE = Limit("a positive number", least=0, open_below=True)
SCALE = Limit("a positive finite number", least=0, open_below=True)
NOT_NEGATIVE = Limit("a number of at least 0", least=0)
FRACTION = Limit("a number in [0, 1]", least=0, most=1)
BELOW_ONE = Limit("a number in [0, 1)", least=0, most=1, open_above=True)


def setting(default: Any, words: str, *limits: Limit, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field of settings: its default, documentation, limits and choices."""
    return dataclasses.field(default=default, metadata=about(words, *limits, choices=choices))


def about(words: str, *limits: Limit, choices: tuple[str, ...] = ()) -> dict[str, Any]:
    """Metadata of a field: documentation, range of numbers, allowed names."""
    return {"words": " ".join(words.split()), "limits": limits, "choices": choices}


class Declared(NamedTuple):
    """The declaration of a field.

    Attributes:
        kind: its type, without None.
        optional: whether None is allowed.
        choices: the allowed names; empty if it is no choice of names.
        limits: ranges of a number.
        words: its documentation.
    """

    kind: Any
    optional: bool
    choices: tuple[str, ...]
    limits: tuple[Limit, ...]
    words: str

    def expects(self) -> str:
        """The allowed values in words, for error messages."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        if self.kind in _WORDS:
            return _WORDS[self.kind]
        if self.limits:
            return self.limits[0].words
        return _NUMBERS.get(self.kind) or f"a {self.kind.__name__}"

    def typed(self, value: Any) -> Any:
        """A tuple from what JSON, TOML or a flag have in its place; other values as they are.

        These are a list, one element, or integers as "N,N,..."; "none" is None where that is
        allowed and no name.
        """
        if value == NONE and self.optional and self.kind is not str and not self.choices:
            return None
        if typing.get_origin(self.kind) is not tuple:
            return value
        each = typing.get_args(self.kind)[0]
        if isinstance(value, str) and each is int:
            parts = value.split(",") if value.strip() else []
            with suppress(ValueError):  # fits() refuses what is no list of integers
                return tuple(int(part) for part in parts)
        if isinstance(value, list):
            return tuple(value)
        return (value,) if type(value) is each else value

    def fits(self, value: Any) -> bool:
        """Whether a value is allowed; bools and infinities are no numbers."""
        if value is None:
            return self.optional
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if self.kind is bool:
            return isinstance(value, bool)
        if self.kind is str:
            return isinstance(value, str) and value != ""
        if isinstance(self.kind, type) and issubclass(self.kind, Settings):
            return isinstance(value, self.kind)
        if typing.get_origin(self.kind) is tuple:
            each = typing.get_args(self.kind)[0]
            return isinstance(value, tuple) and all(type(item) is each for item in value)
        numbers = (int,) if self.kind is int else (int, float)
        if isinstance(value, bool) or not isinstance(value, numbers) or not math.isfinite(value):
            return False
        return all(limit.holds(value) for limit in self.limits)


_WORDS: dict[Any, str] = {
    bool: "true or false",
    str: "a name",
    tuple[str, ...]: "a list of names",
    tuple[int, ...]: "a list of integers such as 512,512,1024",
}
_DECLARED: dict[Any, dict[str, Declared]] = {}  # annotations are read once a class, not a check
_NUMBERS: dict[Any, str] = {int: "an integer", float: "a number"}


@dataclasses.dataclass(frozen=True)
class Settings:
    """Base class of settings, which checks and documents every field by its declaration."""

    # Table of the TOML file, named in errors about a key.
    table: ClassVar[str] = "config"

    def __init_subclass__(cls, **arguments: Any) -> None:
        super().__init_subclass__(**arguments)
        own = {n: f.metadata for n, f in vars(cls).items() if isinstance(f, dataclasses.Field)}
        entries = "".join(f"\n    {n}: {m['words']}." for n, m in own.items() if m.get("words"))
        if entries and cls.__doc__:
            cls.__doc__ = f"{inspect.cleandoc(cls.__doc__)}\n\nAttributes:{entries}\n"

    def __post_init__(self) -> None:
        for name, declaration in declared(type(self)).items():
            value = declaration.typed(getattr(self, name))  # frozen settings are hashable
            object.__setattr__(self, name, value)
            self.expect(name, declaration.fits(value), declaration.expects())

    def expect(self, name: str, fits: bool, expected: str) -> None:
        """Raises ValueError with the field's name and value unless it fits."""
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """The values by name, for JSON and TOML."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def to_table(self) -> dict[str, Any]:
        """The values by name for TOML, which has no None: "none" where that is not the default."""
        return {
            name: NONE if value is None and getattr(type(self), name, None) is not None else value
            for name, value in self.to_dict().items()
        }

    @classmethod
    def from_dict(cls: type[_Settings], values: dict[str, Any]) -> _Settings:
        """Settings from a dictionary as :meth:`to_dict` gives it; missing keys have their default.

        Raises:
            ValueError: an unknown key (the message suggests the nearest), a missing key without a
                default, a value out of range.
        """
        fields = dataclasses.fields(cls)
        known = [field.name for field in fields]
        for key in values:
            if key not in known:
                raise ValueError(f"{cls.table}: unknown key {key!r}; {name_hint(key, known)}")
        for field in fields:
            if field.default is dataclasses.MISSING and field.name not in values:
                raise ValueError(f"{cls.table}: expected the key {field.name!r}, it is not there")
        return cls(**values)


def declared(cls: type[Settings]) -> dict[str, Declared]:
    """The declaration of every field of a class and its bases, in order.

    A field redeclared for another default alone keeps the documentation and limits of the base.
    """
    if cls not in _DECLARED:
        _DECLARED[cls] = _read_declarations(cls)
    return _DECLARED[cls]


def _read_declarations(cls: type[Settings]) -> dict[str, Declared]:
    hints = typing.get_type_hints(cls)
    above = [declared(base) for base in cls.__bases__ if issubclass(base, Settings)]
    found = {}
    for f in dataclasses.fields(cls):
        kind, optional = _without_none(hints[f.name])
        names = typing.get_args(kind) if typing.get_origin(kind) is Literal else ()
        said = f.metadata or about("")
        own = Declared(kind, optional, said["choices"] or names, said["limits"], said["words"])
        inherited = next((base[f.name] for base in above if f.name in base), None)
        if inherited is not None and not f.metadata:
            own = inherited._replace(kind=kind, optional=optional)
        found[f.name] = own
    return found


def _without_none(hint: Any) -> tuple[Any, bool]:
    """The type of an annotation without None, and whether None was in it."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return hint, False
    (kind,) = (each for each in typing.get_args(hint) if each is not types.NoneType)
    return kind, True
