"""Translates the signature of a typed Python function into the schema of a torch operator.

Operators take tensors, numbers and strings, and lists of one of these. A parameter may also be a
named tuple, which stands for its fields, or a sequence of named tuples, which stands for a list per
field. The arguments that the operator itself takes are called columns here.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, get_args, get_type_hints

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

_TYPES: dict[Any, str] = {
    torch.Tensor: "Tensor",
    torch.Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    bool: "bool",
    str: "str",
    str | None: "str?",
    torch.dtype | None: "ScalarType?",
    Sequence[float]: "float[]",
}


class Kind(Protocol):
    """The kind of a parameter, by its annotation: plain, a named tuple or a sequence of them."""

    def columns(self, name: str) -> list[tuple[str, str]]:
        """Names and schema types of the columns of a parameter of this name."""

    def flatten(self, value: Any, into: list[Any]) -> None:
        """Appends the columns of a value."""

    def unflatten(self, columns: Iterator[Any]) -> Any:
        """The value again, from the next columns."""


class _Plain(NamedTuple):
    type: str

    def columns(self, name: str) -> list[tuple[str, str]]:
        return [(name, self.type)]

    def flatten(self, value: Any, into: list[Any]) -> None:
        into.append(value)

    def unflatten(self, columns: Iterator[Any]) -> Any:
        return next(columns)


class _Fields(NamedTuple):
    made: Callable[..., Any]
    kinds: dict[str, Kind]

    def columns(self, name: str) -> list[tuple[str, str]]:
        return [column for field, kind in self.kinds.items() for column in kind.columns(field)]

    def flatten(self, value: Any, into: list[Any]) -> None:
        for kind, part in zip(self.kinds.values(), value, strict=True):
            kind.flatten(part, into)

    def unflatten(self, columns: Iterator[Any]) -> Any:
        return self.made(*[kind.unflatten(columns) for kind in self.kinds.values()])


class _Rows(NamedTuple):
    of: _Fields

    def columns(self, name: str) -> list[tuple[str, str]]:
        return [(f"{name}_{field}", f"{type_}[]") for field, type_ in self.of.columns(name)]

    def flatten(self, value: Any, into: list[Any]) -> None:
        into += [[row[i] for row in value] for i in range(len(self.of.kinds))]

    def unflatten(self, columns: Iterator[Any]) -> Any:
        lists = [next(columns) for _ in self.of.kinds]
        return [self.of.made(*row) for row in zip(*lists, strict=True)]


class Parameter(NamedTuple):
    """A parameter of a declared function.

    Attributes:
        name: as the function spells it.
        default: its default; ``inspect.Parameter.empty`` if there is none.
        kind: what its annotation stands for.
    """

    name: str
    default: Any
    kind: Kind


def parameters(function: Callable[..., Any]) -> list[Parameter]:
    """The parameters of a function in order, with their annotations resolved."""
    hints = get_type_hints(function)
    listed = inspect.signature(function).parameters.values()
    return [Parameter(p.name, p.default, _kind(hints[p.name])) for p in listed]


def columns(of: Sequence[Parameter]) -> list[tuple[str, str]]:
    """Names and schema types of all columns."""
    return [column for parameter in of for column in parameter.kind.columns(parameter.name)]


def schema(function: Callable[..., Any], writes: Sequence[str] = ()) -> str:
    """``name(arguments) -> results`` in torch's schema language.

    Args:
        function: with annotations of the kinds that the module names; it returns a tensor, a tuple
            of tensors or None.
        writes: columns that calls change.
    """
    arguments: list[str] = []
    for name, type_ in columns(parameters(function)):
        if name in writes:
            type_ = type_.replace("Tensor", f"Tensor(a{len(arguments)}!)")
        arguments.append(f"{type_} {name}")
    returned = get_type_hints(function)["return"]
    kinds = () if returned is type(None) else get_args(returned) or (returned,)
    results = ", ".join(_TYPES[kind] for kind in kinds)
    return f"{function.__name__}({', '.join(arguments)}) -> ({results})"


def _kind(annotation: Any) -> Kind:
    if annotation in _TYPES:
        return _Plain(_TYPES[annotation])
    if hasattr(annotation, "_fields"):
        hints = get_type_hints(annotation)
        return _Fields(annotation, {name: _kind(hints[name]) for name in annotation._fields})
    of = _kind(*get_args(annotation))
    if isinstance(of, _Fields):
        return _Rows(of)
    raise TypeError(
        f"a primitive's parameter: expected {', '.join(_TYPES.values())}, a named tuple of them or "
        f"a sequence of such, got {annotation}"
    )
