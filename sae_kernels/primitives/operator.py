"""Makes operators of torch out of typed functions: one function is all that declares a primitive.

A primitive is a folder. Its ``__init__.py`` holds one function under :func:`primitive`:

- its signature is the operator's schema and the Python call;
- its body checks the arguments and describes the results with :func:`result`, which is all that
  ``torch.compile`` needs to know (the operator's fake).

Each further module of the folder is one implementation, ``run(*arguments)`` with the same arguments
without ``backend``, and is named after its backend. Which of them runs is decided when the operator
runs, so a compiled graph follows the environment too.

Whoever traces, transforms or profiles meets the operator in torch's dispatcher. Where nobody does,
the call goes straight to the implementation: the way through the dispatcher and back costs as much
as a small kernel.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import TYPE_CHECKING, Any, Generic, ParamSpec, TypeVar, cast, get_type_hints

import torch
from torch._C import _functorch
from torch._C._dynamo.eval_frame import get_eval_frame_callback
from torch.autograd import forward_ad

from sae_kernels import backends
from sae_kernels.primitives.signature import columns, parameters, schema

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sae_kernels.primitives.signature import Parameter

_Arguments = ParamSpec("_Arguments")
_Results = TypeVar("_Results")
_NOTHING: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_VALUES = {int, float, bool, str, type(None)}
_LIBRARY = torch.library.Library("sae_kernels", "DEF")


def result(shape: Sequence[int | None], dtype: torch.dtype) -> torch.Tensor:
    """Describes one result of a primitive, for its function to return.

    A tensor to the type checker alone, so that the function can be annotated with what its callers
    get. A size of None is one that depends on the data; it is the same for all results of a call.
    """
    return (shape, dtype)  # type: ignore[return-value]


def primitive(
    *, decided_by: str | None = None, writes: Sequence[str] = ()
) -> Callable[[Callable[_Arguments, _Results]], Operator[_Arguments, _Results]]:
    """Registers the decorated function as ``torch.ops.sae_kernels.<its name>``.

    Its last parameter is ``backend``, a name or None.

    Args:
        decided_by: the column (:mod:`~sae_kernels.primitives.signature`) whose device and dtype
            decide the backend; by default the first.
        writes: the columns that a call changes.
    """
    return lambda function: Operator(function, decided_by, writes)


class Operator(Generic[_Arguments, _Results]):
    """An operator of torch with its argument checks in front, called like a function."""

    def __init__(
        self,
        function: Callable[_Arguments, _Results],
        decided_by: str | None,
        writes: Sequence[str],
    ) -> None:
        functools.update_wrapper(self, function)
        self.name = function.__name__
        self._function = function
        declared = parameters(function)
        self._defaults = [(p.name, p.default) for p in declared]
        self._kinds = [p.kind for p in declared]
        names = [name for name, _ in columns(declared)]
        self._is_flat = len(names) == len(declared)
        self._faked = False
        self._returns_one = get_type_hints(function)["return"] is torch.Tensor
        self._deciding = _place(declared, decided_by or names[0])
        _LIBRARY.define(schema(function, writes))
        _LIBRARY.impl(self.name, self._enter, "CompositeExplicitAutograd")
        torch.library.register_fake(f"sae_kernels::{self.name}", self._fake, lib=_LIBRARY)
        self.op = getattr(torch.ops.sae_kernels, self.name).default

    def __call__(self, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Results:
        self._function(*args, **kwargs)  # the checks
        given: Any = args
        if len(given) < len(self._defaults):
            rest = self._defaults[len(given) :]
            given = (*given, *[kwargs.get(name, default) for name, default in rest])
        if unobserved() and _plain(given):
            return self._run(given[:-1], given[-1])  # type: ignore[no-any-return]
        return cast("_Results", self.op(*(given if self._is_flat else self._flat(given))))

    def like(self, arguments: Sequence[Any]) -> torch.Tensor:
        """The tensor that decides the backend, among the arguments of an implementation."""
        parameter, column = self._deciding
        value = arguments[parameter]
        if isinstance(value, torch.Tensor):
            return value
        taken: list[Any] = []
        self._kinds[parameter].flatten(value, taken)
        found = taken[column]
        tensor: torch.Tensor = found[0] if isinstance(found, list) else found
        return tensor

    def _flat(self, arguments: Sequence[Any]) -> list[Any]:
        taken: list[Any] = []
        # Shorter where the arguments are an implementation's, which are without the backend.
        for kind, value in zip(self._kinds, arguments, strict=False):
            kind.flatten(value, taken)
        return taken

    def _arguments(self, taken: Sequence[Any]) -> Sequence[Any]:
        if self._is_flat:
            return taken
        left = iter(taken)
        return [kind.unflatten(left) for kind in self._kinds]

    def _fake(self, *taken: Any) -> Any:
        # Dynamo asks for this first. What it traces later need not look into sys.modules, of
        # which it would make a dictionary of its own while modules are still being imported.
        self._faked = True
        function: Callable[..., Any] = self._function
        names, arguments = (name for name, _ in self._defaults), self._arguments(taken)
        returned = function(**dict(zip(names, arguments, strict=True)))
        if returned is None:
            return None
        described = (returned,) if self._returns_one else returned
        found: Any = None
        if any(size is None for shape, _ in described for size in shape):
            found = torch.library.get_ctx().new_dynamic_size()
        device = self.like(arguments).device
        made = [
            torch.empty([found if n is None else n for n in shape], dtype=dtype, device=device)
            for shape, dtype in described
        ]
        return made[0] if self._returns_one else tuple(made)

    def _enter(self, *taken: Any) -> Any:
        # Where a graph breaks at an operator, Dynamo would go on to compile pieces of what runs
        # it, and tensors whose addresses a kernel was given would end in between.
        traced = self._faked or "torch._dynamo" in sys.modules
        *arguments, backend = self._arguments(taken)
        return (self._untraced if traced else self._run)(arguments, backend)

    @functools.cached_property
    def _untraced(self) -> Callable[..., Any]:
        untraced: Callable[..., Any] = torch.compiler.disable(self._run)
        return untraced

    def _run(self, arguments: Sequence[Any], backend: str | None) -> Any:
        like = self.like(arguments)
        module = backends.implementation(self.name, like.device, like.dtype, backend, arguments)
        # An implementation written in torch is a kernel like any other: autograd does not look
        # into it, and autocast does not round operands whose dtype was settled before the call.
        with _undisturbed(like):
            try:
                return module.run(*arguments)
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"{self.name}: {like.device} is out of memory; take fewer tokens at a time, or "
                    f"in training moment_dtype='bfloat16' or master_weights='split' ({error})"
                ) from error


def _place(declared: Sequence[Parameter], name: str) -> tuple[int, int]:
    """Which parameter a column belongs to, and which of that parameter's columns it is."""
    for nth, parameter in enumerate(declared):
        names = [column for column, _ in columns([parameter])]
        if name in names:
            return nth, names.index(name)
    raise ValueError(f"decided_by: expected one of the columns, got {name!r}")


def unobserved() -> bool:
    """Whether nobody follows what torch's dispatcher is asked: it would run the operator alone.

    False where autograd records, a compiler traces, a transform or a mode is active, or a profile
    is made.
    """
    if torch.compiler.is_compiling():  # first: the compiler knows the answer
        return False
    return not (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._is_torch_function_mode_enabled()
        or _functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or torch._C._autograd._profiler_enabled()
        or get_eval_frame_callback() is not None
    )


def recorded(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply(*arguments)``, without autograd's bookkeeping where nothing is recorded."""
    return function.forward(*arguments) if unobserved() else function.apply(*arguments)


def _plain(arguments: Sequence[Any]) -> bool:
    """Whether arguments are dense tensors and numbers, with nothing for the dispatcher to undo."""
    for value in arguments:
        kind = type(value)
        if kind in _TENSORS:
            # The meta device has no kernels; a lazily negated tensor (part of a conjugate) holds
            # other numbers than it stands for.
            if value.is_meta or value.is_neg():
                return False
        elif kind not in _VALUES and not (isinstance(value, (tuple, list)) and _plain(value)):
            return False
    return True


@contextlib.contextmanager
def _alone(tensor: torch.Tensor) -> Iterator[None]:
    # Kernels are launched on the current device, which need not be the tensor's.
    kind = tensor.device.type
    autocast = torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING
    device = torch.cuda.device(tensor.device) if tensor.is_cuda else _NOTHING
    with torch.no_grad(), autocast, device:
        yield


def _undisturbed(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    # Asking first: in a training step there is nothing to turn off, and contexts cost microseconds.
    if torch.is_grad_enabled() or torch._C._is_any_autocast_enabled():
        return _alone(tensor)
    return torch.cuda.device(tensor.device) if tensor.is_cuda else _NOTHING
