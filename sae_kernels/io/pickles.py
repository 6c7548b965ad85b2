"""Safe interpretation of torch.save's pickles: names and shapes of tensors, nothing allocated.

``torch.load(weights_only=True)`` runs no foreign code, but a short pickle can still make it
allocate gigabytes (a bytearray), hash for hours (a tuple of the same tuple twice, and so on) or
overflow the stack (a tuple in a tuple, a million times). So the pickle is first interpreted with
placeholders, and only the operations that build a dictionary of dense tensors are known.
"""

from __future__ import annotations

import math
import pickletools
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

MAX_OPERATIONS = 20_000  # a tensor takes some forty
_DIMENSIONS = 8
_ITEM_SIZES = {
    f"torch {name}Storage": size
    for size, names in {
        1: ("Bool", "Byte", "Char"),
        2: ("BFloat16", "Half", "Short"),
        4: ("Float", "Int"),
        8: ("Double", "Long", "ComplexFloat"),
        16: ("ComplexDouble",),
    }.items()
    for name in names
}
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_LITERALS = ("BINFLOAT", "BINUNICODE", "BININT", "BININT1", "BININT2", "LONG1")


class Storage(NamedTuple):
    """A placeholder of a tensor storage, whose bytes are outside the pickle."""

    key: str
    kind: str
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes that the file must hold for it."""
        return self.numel * _ITEM_SIZES[self.kind]


class View(NamedTuple):
    """A placeholder of a tensor: a strided view of a storage."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def dense(self) -> bool:
        """Whether the view is not empty, lies inside its storage and is about as large as it.

        With stride 0 a view of a few bytes can have any shape: copying it would take all memory.
        """
        numel = math.prod(self.size)
        reach = sum((n - 1) * step for n, step in zip(self.size, self.stride, strict=True))
        inside = numel > 0 and self.offset + reach < self.storage.numel
        return inside and numel <= self.storage.numel <= 2 * numel + 1024


class _Global(NamedTuple):
    name: str


class PickleInterpreter:
    """Interprets the pickles of a file one after the other, and collects their storages."""

    def __init__(self, file: BinaryIO) -> None:
        self.storages: dict[str, Storage] = {}
        self._file = file
        self._left = MAX_OPERATIONS

    def read(self) -> Any:
        """Interprets the next pickle and returns its value: dict, list, str, int, Storage or View.

        Raises:
            ValueError, IndexError, KeyError, TypeError: the pickle is damaged, or is not built of
                the operations of a state dict.
        """
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        for operation, argument, _ in pickletools.genops(self._file):
            self._left -= 1
            if self._left < 0:
                raise ValueError(f"more than {MAX_OPERATIONS} operations of a pickle")
            self._step(operation.name, argument)
        return self._stack.pop()

    def _step(self, name: str, argument: Any) -> None:
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name])
        elif name in _LITERALS:
            self._stack.append(argument)
        elif name == "GLOBAL":
            self._stack.append(_known(argument))
        elif name in ("BINPUT", "LONG_BINPUT"):
            self._memo[argument] = self._stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            self._stack.append(self._memo[argument])
        elif name in _ACTIONS:
            _ACTIONS[name](self)
        elif not (name == "STOP" or (name == "PROTO" and argument == 2)):
            raise ValueError(f"a pickle's {name} {argument or ''}, of which no state dict is made")

    def _mark(self) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def _marked(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def _last(self, count: int) -> list[Any]:
        return [self._stack.pop() for _ in range(count)][::-1]

    def _tuple(self, items: list[Any]) -> None:
        self._stack.append(tuple(items))

    def _append(self, items: list[Any]) -> None:
        _expect(type(self._stack[-1]) is list, "a list")
        self._stack[-1].extend(items)

    def _set(self, items: list[Any]) -> None:
        _expect(type(self._stack[-1]) is dict, "a dict")
        for name, value in zip(items[::2], items[1::2], strict=True):
            if type(name) is not str:  # hashing a nested tuple may take for ever
                raise TypeError(f"expected names of tensors, got {type(name).__name__}")
            self._stack[-1][name] = value

    def _build(self) -> None:
        """Drops the attributes of a state dict, its metadata."""
        target, state = self._stack[-2:]
        _expect(type(target) is dict and type(state) is dict, "a dict and its attributes")
        self._stack.pop()

    def _persist(self) -> None:
        kind, storage_type, key, location, numel, *view = self._stack.pop()
        fits = kind == "storage" and isinstance(key, str) and isinstance(location, str)
        fits = fits and isinstance(storage_type, _Global) and storage_type.name in _ITEM_SIZES
        _expect(fits and _natural(numel) and view in ([], [None]), "a storage")
        storage = Storage(key, storage_type.name, numel)
        _expect(self.storages.setdefault(key, storage) == storage, "one storage of a name")
        self._stack.append(storage)

    def _reduce(self) -> None:
        function, arguments = self._last(2)
        _expect(isinstance(function, _Global) and function.name in _FUNCTIONS, "a function")
        self._stack.append(_FUNCTIONS[function.name](*arguments))


def _expect(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"expected {what} in the pickle")


def _natural(value: object) -> bool:
    return type(value) is int and value >= 0


def _known(name: str) -> _Global:
    if name not in _FUNCTIONS and name not in _ITEM_SIZES:
        raise ValueError(f"{name.replace(' ', '.'):.80} in the pickle is no part of a dense tensor")
    return _Global(name)


def _tensor(
    storage: Any, offset: Any, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> View:
    _expect(isinstance(storage, Storage) and _natural(offset), "a storage and an offset")
    for numbers in (size, stride):
        _expect(type(numbers) is tuple and all(map(_natural, numbers)), "sizes and strides")
    _expect(len(size) == len(stride) <= _DIMENSIONS, "sizes and strides of one length")
    _expect(type(grad) is bool and hooks == {} and metadata in (None, {}), "nothing but a tensor")
    return View(storage, offset, size, stride)


def _parameter(tensor: Any, grad: Any, hooks: Any) -> View:
    _expect(isinstance(tensor, View) and type(grad) is bool and hooks == {}, "a parameter")
    view: View = tensor
    return view


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "collections OrderedDict": lambda: {},
    "torch._utils _rebuild_tensor_v2": _tensor,
    "torch._utils _rebuild_parameter": _parameter,
}
_ACTIONS: dict[str, Callable[[PickleInterpreter], None]] = {
    "MARK": PickleInterpreter._mark,
    "EMPTY_DICT": lambda p: p._stack.append({}),
    "EMPTY_LIST": lambda p: p._stack.append([]),
    "TUPLE": lambda p: p._tuple(p._marked()),
    "TUPLE1": lambda p: p._tuple(p._last(1)),
    "TUPLE2": lambda p: p._tuple(p._last(2)),
    "TUPLE3": lambda p: p._tuple(p._last(3)),
    "APPEND": lambda p: p._append(p._last(1)),
    "APPENDS": lambda p: p._append(p._marked()),
    "SETITEM": lambda p: p._set(p._last(2)),
    "SETITEMS": lambda p: p._set(p._marked()),
    "BUILD": PickleInterpreter._build,
    "BINPERSID": PickleInterpreter._persist,
    "REDUCE": PickleInterpreter._reduce,
}
