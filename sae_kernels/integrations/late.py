"""LateTensor: a tensor that is computed when somebody asks for it, such as pre-activations."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from sae_kernels.functional.recording import autocast_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AbstractContextManager

    from sae_kernels.codes import SparseCodes
    from sae_kernels.integrations.patching import Ledger


class LateTensor(torch.Tensor):
    """A differentiable tensor that is computed at its first use, and never if there is none.

    Its values are ``compute(*inputs)``; its gradient flows into the inputs, through a second
    computation in the backward pass.

    Attributes:
        columns: of pre-activations, the values of some latents alone: ``columns(latents)`` is
            ``self[..., latents]`` of an int64 tensor, differentiable.
        entries: of pre-activations that a threshold selected, those above it; else None.

    Example:
        >>> x, W = torch.ones(2, 3), torch.ones(3, 4, requires_grad=True)
        >>> late = LateTensor.of((2, 4), lambda x, W: x @ W, x, W)
        >>> late
        LateTensor(shape=(2, 4), computed=False)
        >>> late.sum().backward()
        >>> W.grad[0].tolist()
        [2.0, 2.0, 2.0, 2.0]
    """

    columns: Callable[[torch.Tensor], torch.Tensor] | None
    entries: SparseCodes | None
    _late: Later

    @classmethod
    def of(
        cls,
        shape: Sequence[int],
        compute: Callable[..., torch.Tensor],
        *inputs: torch.Tensor,
        dtype: torch.dtype | None = None,
        ledger: Ledger | None = None,
        what: str = "pre-activations",
    ) -> LateTensor:
        """Makes one.

        Args:
            shape: of the values.
            compute: gives the values; it reads no tensor but its arguments.
            inputs: its arguments.
            dtype: of the values; by default that of the first input.
            ledger: counts the first use.
            what: the name in the ledger and in messages.
        """
        late = Later(tuple(shape), compute, inputs, dtype or inputs[0].dtype, ledger, what)
        made: LateTensor = _Made.apply(late, *inputs)
        made.columns = made.entries = None
        return made

    def value(self, why: str = "value()") -> torch.Tensor:
        """The values, without graph, computed at the first call.

        Raises:
            RuntimeError: what they are computed from has changed meanwhile.
        """
        return self._late.value(why)

    @property
    def computed(self) -> bool:
        """Whether somebody asked for the values."""
        return self._late.values is not None

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            return _wrap(args[0]._late)
        name = str(func.overloadpacket).removeprefix("aten.")
        plain = _pytree.tree_map_only(cls, lambda each: each.value(name), (args, kwargs or {}))
        return func(*plain[0], **plain[1])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value("pickle").clone().__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self.value("deepcopy").clone()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LateTensor(shape={tuple(self.shape)}, computed={self.computed})"


class Later:
    """The computation behind a tensor and its detached aliases."""

    def __init__(
        self,
        shape: tuple[int, ...],
        compute: Callable[..., torch.Tensor],
        inputs: tuple[torch.Tensor, ...],
        dtype: torch.dtype,
        ledger: Ledger | None,
        what: str,
    ) -> None:
        self.shape, self.dtype, self.device = shape, dtype, inputs[0].device
        self.compute, self.ledger, self.what = compute, ledger, what
        self.autocast = autocast_dtype(inputs[0])
        self.inputs = [(tensor.detach(), version_of(tensor)) for tensor in inputs]
        self.values: torch.Tensor | None = None

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        """Computes the values as at the time of making."""
        autocast: AbstractContextManager[Any] = nullcontext()
        if self.autocast is not None:
            autocast = torch.autocast(self.device.type, self.autocast)
        with autocast:
            return self.compute(*inputs).to(self.dtype)

    @property
    def fresh(self) -> bool:
        """Whether the values are still to be computed, from inputs that are as they were."""
        # A detached alias counts writes together with what it is an alias of.
        same = all(version_of(tensor) == version for tensor, version in self.inputs)
        return same and self.values is None

    def value(self, why: str) -> torch.Tensor:
        if self.values is None:
            if not self.fresh:
                raise RuntimeError(
                    f"{self.what}: expected to be read before the optimizer's step, got it after "
                    "(they are computed when they are used, and the weights have changed); read "
                    "them before the step, or undo the acceleration"
                )
            if self.ledger is not None:
                self.ledger.made_dense(f"{self.what}: {why}")
            with torch.no_grad():
                self.values = self(*(tensor for tensor, _ in self.inputs))
            self.inputs = []
        return self.values


def version_of(tensor: torch.Tensor) -> int | None:
    """How often a tensor was written to; None of one that does not count."""
    return None if tensor.is_inference() else tensor._version


def _wrap(late: Later) -> LateTensor:
    made: LateTensor = torch.Tensor._make_wrapper_subclass(
        LateTensor, late.shape, dtype=late.dtype, device=late.device, requires_grad=False
    )
    made._late = late
    made.columns = made.entries = None
    return made


class _Made(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, late: Later, *inputs: torch.Tensor) -> LateTensor:
        ctx.save_for_backward(*inputs)
        ctx.late = late
        return _wrap(late)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        needed = ctx.needs_input_grad[1:]
        inputs = [
            tensor.detach().requires_grad_(need)
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        with torch.enable_grad():
            out = ctx.late(*inputs)
        wanted = [tensor for tensor in inputs if tensor.requires_grad]
        grads = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), allow_unused=True))
        return (None, *(next(grads) if need else None for need in needed))
