"""LazyCodes: codes [..., F] as a tensor of the usual kind, of which only the entries exist.

What the entries can answer they answer (:mod:`~sae_kernels.integrations.lazy_rules` and
:mod:`~sae_kernels.integrations.lazy_parts`), above autograd and differentiably. For everything else
the dense tensor is made, once, and the ledger learns of it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch.utils import _pytree

from sae_kernels.codes import SparseCodes
from sae_kernels.integrations import lazy_parts, lazy_rules

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.integrations.patching import Ledger

_RULES = lazy_rules.RULES | lazy_parts.RULES
_SAME = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class _Memory:
    """What a tensor's storage is: shared by a tensor, its detached aliases and other shapes."""

    def __init__(self, codes: SparseCodes) -> None:
        self.codes = codes  # without graph
        self.dense: torch.Tensor | None = None
        self.written = False  # the entries do not say all any more

    def made(self) -> torch.Tensor:
        if self.dense is None:
            with torch.no_grad():
                self.dense = self.codes.flat().to_dense()
        return self.dense


class LazyCodes(torch.Tensor):
    """A tensor [..., F] that stands for :class:`~sae_kernels.codes.SparseCodes`.

    It has the shape, dtype, device and gradient of the dense codes. Sums, counts, norms,
    comparisons with 0, columns by latent, products with a matrix [F, D] and functions that keep 0
    at 0 are computed from the entries; anything else makes the dense tensor once, which is counted.
    Whoever wants the gradient *at* the codes (``retain_grad``, ``register_hook``) asks before using
    them.

    Make one by :meth:`of`.

    Example:
        >>> codes = SparseCodes.from_dense(torch.tensor([[0.0, 3.0, 0.0, 1.0]]), k=2)
        >>> acts = LazyCodes.of(codes)
        >>> acts.shape, float(acts.sum()), (acts > 0).sum(-1).tolist()
        (torch.Size([1, 4]), 4.0, [2])
        >>> acts.max(dim=-1).values.tolist()  # made dense for this
        [3.0]
    """

    _memory: _Memory
    _plain: SparseCodes  # without graph
    _entries: SparseCodes | None  # with graph; None where the dense tensor's graph is the true one
    _made: Any  # the autograd node that this tensor was made with
    _used: bool  # a differentiable answer was given from the entries
    ledger: Ledger | None
    note: Any  # an adapter's, for its functions that get these codes back

    @classmethod
    def of(cls, codes: SparseCodes, ledger: Ledger | None = None) -> LazyCodes:
        """A tensor of these codes; differentiable where their values are.

        Args:
            codes: of any form.
            ledger: counts what makes the tensor dense.
        """
        if codes.values.requires_grad and torch.is_grad_enabled():
            rest = (codes.indices, codes.offsets, codes.n_latents, codes.leading)
            view: LazyCodes = _OfEntries.apply(codes.values, *rest)
        else:
            view = cls.over(_Memory(codes.with_values(codes.values.detach())))
        view._entries, view.ledger = codes, ledger
        with torch._C.DisableTorchFunctionSubclass():
            view._made = view.grad_fn
        return view

    @classmethod
    def over(cls, memory: _Memory, codes: SparseCodes | None = None) -> LazyCodes:
        """A tensor without graph over a memory; ``codes`` are its codes in another batch shape."""
        codes = memory.codes if codes is None else codes
        view: LazyCodes = torch.Tensor._make_wrapper_subclass(
            cls,
            (*codes.batch_shape, codes.n_latents),
            dtype=codes.values.dtype,
            device=codes.values.device,
            requires_grad=False,
        )
        view._memory, view._plain, view._entries = memory, codes, codes
        view._made, view._used = None, False
        view.ledger = view.note = None
        return view

    @property
    def entries(self) -> SparseCodes | None:
        """The entries with their graph, or None where they no longer say all.

        They do not once somebody wrote to the tensor, took a view to write through, wants the
        gradient at it, or made it part of another graph.
        """
        with torch._C.DisableTorchFunctionSubclass():
            foreign = self.grad_fn is not self._made or (self.is_leaf and self.requires_grad)
        return None if foreign or self._memory.written else self._entries

    def dense(self, why: str = "dense()") -> torch.Tensor:
        """The dense data, without graph; made at the first call, which is counted under ``why``."""
        if self._memory.dense is None and self.ledger is not None:
            self.ledger.made_dense(why)
        return self._memory.made().view(self.shape)

    def watch(self) -> None:
        """Makes this tensor part of the graph of all that follows, for gradients at it.

        Raises:
            RuntimeError: the codes were used already.
        """
        if self._used:
            raise RuntimeError(
                "the gradient at codes: expected to be asked for it before the codes are used, got "
                "it after; call retain_grad or register_hook right after encoding, or undo the "
                "acceleration"
            )
        self._entries = None

    def like(
        self,
        values: torch.Tensor,
        indices: torch.Tensor | None = None,
        offsets: torch.Tensor | None = None,
    ) -> LazyCodes:
        """Codes at the same places with other values, or (with their places) on another device."""
        assert self._entries is not None
        self._used = self._used or values.requires_grad
        codes = self._entries.with_values(values, indices)
        if offsets is not None:
            codes = dataclasses.replace(codes, offsets=offsets)
        return LazyCodes.of(codes, self.ledger)

    def alias(self) -> LazyCodes:
        """A tensor of the same memory without graph, as ``detach()`` gives."""
        view = LazyCodes.over(self._memory, self._plain)
        view.ledger = self.ledger
        return view

    def batched(self, leading: tuple[int, ...]) -> LazyCodes:
        """A tensor of the same memory without graph, with another shape of the batch."""
        codes = self._plain
        if codes.offsets is None:
            shape = (*leading, codes.k)
            codes = codes.with_values(codes.values.reshape(shape), codes.indices.reshape(shape))
        else:
            codes = dataclasses.replace(codes, leading=leading)
        view = LazyCodes.over(self._memory, codes)
        view.ledger = self.ledger
        return view

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        if rule is not None:
            answer = rule(*args, **kwargs)
            if answer is not NotImplemented:
                return answer
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        if func in _SAME:
            return args[0].alias()
        name = str(func.overloadpacket).removeprefix("aten.")
        views = [a for a in _pytree.tree_leaves((args, kwargs)) if isinstance(a, LazyCodes)]
        # A view into the dense tensor may be written through, as the tensor itself.
        into = any(r.alias_info is not None for r in func._schema.returns)
        for view in views:
            view.dense(name)
            if into or func._schema.is_mutable:
                view._memory.written = True
        plain = _pytree.tree_map_only(LazyCodes, lambda v: v.dense(), (args, kwargs))
        out = func(*plain[0], **plain[1])
        return args[0] if func._schema.is_mutable and isinstance(args[0], LazyCodes) else out

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._copied("pickle").__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return self._copied("deepcopy")

    def _copied(self, why: str) -> torch.Tensor:
        """A dense leaf of the same data, as a copy of a tensor is."""
        return self.dense(why).clone().requires_grad_(self.requires_grad)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        n, dense = self._plain.values.numel(), self._memory.dense is not None
        return (
            f"LazyCodes(shape={tuple(self.shape)}, dtype={self.dtype}, entries={n}, dense={dense})"
        )


class _OfEntries(torch.autograd.Function):
    """Entries to the tensor; backwards it gathers what a dense gradient says of them."""

    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        indices: torch.Tensor,
        offsets: torch.Tensor | None,
        n_latents: int,
        leading: tuple[int, ...] | None,
    ) -> LazyCodes:
        codes = SparseCodes(values.detach(), indices, n_latents, offsets, leading)
        ctx.save_for_backward(indices, offsets)
        ctx.n_latents, ctx.leading = n_latents, leading
        return LazyCodes.over(_Memory(codes))

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        indices, offsets = ctx.saved_tensors
        if isinstance(grad, LazyCodes):
            grad = grad.dense("backward")
        places = indices.long()
        if offsets is None:
            return grad.gather(-1, places), None, None, None, None
        rows = SparseCodes(places, indices, ctx.n_latents, offsets).tokens.long()
        return grad.reshape(-1, ctx.n_latents)[rows, places], None, None, None, None
