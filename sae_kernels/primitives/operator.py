"""How a primitive becomes an operator of torch: one mechanism for all of them.

A primitive is a folder: ``__init__.py`` holds the contract (schema, checks, fake), and each
further module one implementation, ``run(*arguments)``, named after its backend. Which of them
runs is decided when the operator runs, so a compiled graph follows the environment too.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels import backends
from sae_kernels.primitives.checks import accumulator

if TYPE_CHECKING:
    from collections.abc import Callable

_LIBRARY = torch.library.Library("sae_kernels", "DEF")


def fake_ragged(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What an encoder of tokens [B, D] returns whose data decide how many entries there are."""
    found = torch.library.get_ctx().new_dynamic_size()
    values = x.new_empty(found, dtype=accumulator(x.dtype))
    indices = x.new_empty(found, dtype=torch.int32)
    return values, indices, x.new_empty(x.shape[0] + 1, dtype=torch.int32)


class Operator:
    """``torch.ops.sae_kernels.<name>`` with its argument checks in front.

    Args:
        schema: ``name(arguments, str backend) -> results`` in torch's schema language; trailing
            arguments that a call leaves out are None.
        check: called with the arguments before the operator; raises ValueError or TypeError.
        fake: called with the arguments; returns empty results of the right shape and dtype.
        dtype_of: position of the argument whose device and dtype decide the backend.
    """

    def __init__(
        self,
        schema: str,
        check: Callable[..., None],
        fake: Callable[..., Any],
        dtype_of: int = 0,
    ) -> None:
        self.name = schema.split("(", 1)[0]
        self._check = check
        self._dtype_of = dtype_of
        _LIBRARY.define(schema)
        _LIBRARY.impl(self.name, self._enter, "CompositeExplicitAutograd")
        torch.library.register_fake(
            f"sae_kernels::{self.name}", lambda *args: fake(*args[:-1]), lib=_LIBRARY
        )
        self.op = getattr(torch.ops.sae_kernels, self.name).default
        self._n_arguments = len(self.op._schema.arguments) - 1

    def __call__(self, *args: Any, backend: str | None = None) -> Any:
        args += (None,) * (self._n_arguments - len(args))
        self._check(*args)
        return self.op(*args, backend or "")

    def _enter(self, *args: Any) -> Any:
        # Where a graph breaks at an operator, Dynamo would go on to compile pieces of what runs
        # it, and tensors whose addresses a kernel was given would end in between.
        return self._untraced(*args) if "torch._dynamo" in sys.modules else self._run(*args)

    @functools.cached_property
    def _untraced(self) -> Callable[..., Any]:
        untraced: Callable[..., Any] = torch.compiler.disable(self._run)
        return untraced

    def _run(self, *args: Any) -> Any:
        *arguments, backend = args
        like = arguments[self._dtype_of]
        module = backends.implementation(self.name, like.device, like.dtype, backend, arguments)
        # An implementation written in torch is a kernel like any other: autograd does not look
        # into it, and autocast does not round operands whose dtype was settled before the call.
        with torch.no_grad(), torch.autocast(like.device.type, enabled=False), _current(like):
            try:
                return module.run(*arguments)
            except torch.OutOfMemoryError as error:
                raise torch.OutOfMemoryError(
                    f"{self.name}: {like.device} is out of memory; take fewer tokens at a time, or "
                    f"in training states='bfloat16' or master='split' ({error})"
                ) from error


def _current(tensor: torch.Tensor) -> contextlib.AbstractContextManager[Any]:
    # Kernels are launched on the current device, which need not be the tensor's.
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
