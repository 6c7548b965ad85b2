"""What entries can answer of a dense tensor of codes: a table from torch's functions to rules.

A rule gets the call's arguments and returns NotImplemented where the dense tensor is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.nn import functional as F

from sae_kernels import functional

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.codes import SparseCodes

Rule = TypeVar("Rule", bound="Callable[..., Any]")
T = torch.Tensor


class Rules(dict[Any, "Callable[..., Any]"]):
    """Functions of torch with their rules; called, it enters one."""

    def __call__(self, *functions: Any) -> Callable[[Rule], Rule]:
        """A decorator: the rule for these functions."""

        def enter(answer: Rule) -> Rule:
            self.update(dict.fromkeys(functions, answer))
            return answer

        return enter


RULES = rule = Rules()


def entries_of(value: Any) -> SparseCodes | None:
    """The entries of a LazyCodes that still say all; None of everything else."""
    return getattr(value, "entries", None) if isinstance(value, T) else None


def used(acts: Any, answer: torch.Tensor) -> torch.Tensor:
    """Notes that a differentiable answer came from the entries."""
    acts._used = acts._used or answer.requires_grad
    return answer


# Functions of single entries: f(0) = 0, so the other places stay 0.


def _of_each(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def answer(acts: Any, *args: Any, **kwargs: Any) -> Any:
        codes = entries_of(acts)
        if codes is None or not _plain_options(args, kwargs):
            return NotImplemented
        return acts.like(function(codes.values, *args, **kwargs))

    return answer


def _plain_options(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    kinds = (bool, torch.dtype, torch.memory_format, type(None))
    return "out" not in kwargs and all(isinstance(a, kinds) for a in (*args, *kwargs.values()))


for _name in ("bool", "float", "double", "half", "bfloat16", "int", "long"):
    rule(getattr(T, _name))(_of_each(getattr(T, _name)))
for _name in ("abs", "relu", "neg", "square", "sign", "clone", "tanh"):
    rule(getattr(T, _name), getattr(torch, _name))(_of_each(getattr(T, _name)))
rule(T.contiguous)(_of_each(T.clone))
rule(F.relu)(_of_each(F.relu))
rule(T.__neg__)(_of_each(T.neg))


@rule(T.to)
def _to(acts: Any, *args: Any, **kwargs: Any) -> Any:
    codes = entries_of(acts)
    if codes is None or kwargs or len(args) != 1:
        return NotImplemented
    (what,) = args
    if isinstance(what, torch.dtype):
        return acts if what == acts.dtype else acts.like(codes.values.to(what))
    if not isinstance(what, (str, torch.device)):
        return NotImplemented
    there = codes.values.to(what)
    if there.device == acts.device:
        return acts
    moved = (None if each is None else each.to(what) for each in (codes.indices, codes.offsets))
    return acts.like(there, *moved)


@rule(T.cpu)
def _cpu(acts: Any, **kwargs: Any) -> Any:
    return NotImplemented if kwargs else _to(acts, "cpu")


@rule(T.pow, torch.pow, T.__pow__)
def _pow(acts: Any, power: Any) -> Any:
    codes = entries_of(acts)
    if codes is None or not isinstance(power, (int, float)) or power < 1:
        return NotImplemented
    return acts.like(codes.values**power)


def _scaled(operation: Callable[..., torch.Tensor], *, swaps: bool) -> Callable[..., Any]:
    """A product or quotient with a number, a scalar or a vector [F] of finite values."""

    def answer(left: Any, right: Any, **kwargs: Any) -> Any:
        acts, other = (left, right) if entries_of(left) is not None else (right, left)
        codes = entries_of(acts)
        if codes is None or kwargs or (acts is right and not swaps):
            return NotImplemented
        if isinstance(other, (int, float)) or (type(other) is T and other.dim() == 0):
            factor: Any = other
        elif type(other) in (T, torch.nn.Parameter) and other.shape == acts.shape[-1:]:
            if not other.is_floating_point():
                return acts.like(operation(codes.values, other[codes.indices.long()]))
            factor = functional.gather_by_latent(other, codes)
        elif type(other) is T and other.shape == (*acts.shape[:-1], 1) and acts.dim() > 1:
            factor = other.flatten()[codes.tokens.long()].reshape(codes.values.shape)
        else:
            return _both(operation, acts, other)
        return acts.like(operation(codes.values, factor))

    return answer


def _both(operation: Callable[..., torch.Tensor], acts: Any, other: Any) -> Any:
    """A product of two codes with the same places."""
    codes, more = entries_of(acts), entries_of(other)
    if more is None or codes is None or codes.indices is not more.indices:
        return NotImplemented
    if operation is not T.mul:
        return NotImplemented  # 0 / 0 elsewhere
    other._used = True
    return acts.like(codes.values * more.values)


rule(T.mul, torch.mul, torch.multiply, T.__mul__, T.__rmul__)(_scaled(T.mul, swaps=True))
rule(T.div, torch.div, T.__truediv__)(_scaled(T.div, swaps=False))


def _compared(
    operation: Callable[..., torch.Tensor], false_at_zero: Callable[[float], bool]
) -> Callable[..., Any]:
    def answer(acts: Any, bound: Any) -> Any:
        codes = entries_of(acts)
        if codes is None or not isinstance(bound, (int, float)) or not false_at_zero(bound):
            return NotImplemented
        return acts.like(operation(codes.values.detach(), bound))

    return answer


rule(T.gt, torch.gt, T.__gt__)(_compared(torch.gt, lambda bound: bound >= 0))
rule(T.ge, torch.ge, T.__ge__)(_compared(torch.ge, lambda bound: bound > 0))
rule(T.lt, torch.lt, T.__lt__)(_compared(torch.lt, lambda bound: bound <= 0))
rule(T.le, torch.le, T.__le__)(_compared(torch.le, lambda bound: bound < 0))
rule(T.ne, torch.ne, T.__ne__)(_compared(torch.ne, lambda bound: bound == 0))


# Reductions.


def by_token(codes: SparseCodes, values: torch.Tensor) -> torch.Tensor:
    """Sums of entries' values over each token, in the shape of the batch; differentiable."""
    if codes.offsets is None:
        return values.sum(-1)
    out = values.new_zeros(codes.offsets.shape[0] - 1)
    return out.index_add(0, codes.tokens.long(), values).reshape(codes.batch_shape)


def by_latent(codes: SparseCodes, values: torch.Tensor, dims: set[int]) -> torch.Tensor:
    """Sums of entries' values over some dimensions of the batch; differentiable."""
    places = codes.indices.flatten().long()
    tokens, step = codes.tokens.flatten().long(), codes.n_latents
    sizes: list[int] = []
    for dim in reversed(range(len(codes.batch_shape))):
        size = codes.batch_shape[dim]
        if dim not in dims:
            places = places + (tokens % size) * step
            step *= size
            sizes.insert(0, size)
        tokens = tokens // size
    out = values.new_zeros(step).index_add(0, places, values.flatten())
    return out.reshape(*sizes, codes.n_latents)


def _dims(acts: Any, dim: Any) -> set[int] | None:
    """The dimensions that a reduction goes over; None where they are not numbers."""
    n = acts.dim()
    if dim is None or dim == ():
        return set(range(n))
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    return {d % n for d in dims} if all(isinstance(d, int) for d in dims) else None


@rule(T.sum, torch.sum)
def _sum(
    acts: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **other: Any
) -> Any:
    codes, dims = entries_of(acts), _dims(acts, dim)
    if codes is None or dims is None or other:
        return NotImplemented
    values, last = codes.values, acts.dim() - 1
    whole = values.dtype == torch.bool or not values.is_floating_point()
    values = values.to(dtype or (torch.int64 if whole else values.dtype))
    if len(dims) == acts.dim():
        out = values.sum()
    elif last in dims:
        out = by_token(codes, values)
        out = out.sum(tuple(dims - {last})) if len(dims) > 1 else out
    else:
        out = by_latent(codes, values, dims)
    if keepdim:
        out = out.reshape([1 if d in dims else size for d, size in enumerate(acts.shape)])
    return used(acts, out)


@rule(T.mean, torch.mean)
def _mean(
    acts: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **other: Any
) -> Any:
    if other:
        return NotImplemented
    if not acts.is_floating_point() and dtype is None:
        return NotImplemented  # torch refuses it
    total = _sum(acts, dim, keepdim, dtype=dtype)
    if total is NotImplemented or total.numel() == 0:
        return NotImplemented
    return total / (acts.numel() / total.numel())


@rule(T.any, torch.any)
def _any(acts: Any, dim: Any = None, keepdim: bool = False, **other: Any) -> Any:
    codes = entries_of(acts)
    if codes is None or other:
        return NotImplemented
    counts = _sum(acts.like((codes.values.detach() != 0).long()), dim, keepdim)
    return counts if counts is NotImplemented else counts > 0


@rule(T.count_nonzero, torch.count_nonzero)
def _count_nonzero(acts: Any, dim: Any = None) -> Any:
    codes = entries_of(acts)
    if codes is None:
        return NotImplemented
    return _sum(acts.like((codes.values.detach() != 0).long()), dim)


@rule(T.norm, torch.norm, torch.linalg.vector_norm)
def _norm(acts: Any, p: Any = None, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    p = kwargs.pop("ord", p)
    p = 2 if p in (None, "fro") else p
    codes, dims = entries_of(acts), _dims(acts, dim)
    if (
        codes is None
        or dims is None
        or keepdim
        or any(each is not None for each in kwargs.values())
    ):
        return NotImplemented
    if not isinstance(p, (int, float)) or not 1 <= p < float("inf"):
        return NotImplemented
    if len(dims) == acts.dim():
        return used(acts, codes.values.flatten().norm(p))
    if dims != {acts.dim() - 1}:
        return NotImplemented
    if codes.offsets is None:
        return used(acts, codes.values.norm(p, dim=-1))
    total = by_token(codes, codes.values.abs() ** p)
    # A token without entries has the norm 0, and no gradient.
    return used(acts, torch.where(total > 0, total, 1) ** (1 / p) * (total > 0))


@rule(torch.linalg.norm)
def _linalg_norm(acts: Any, ord: Any = None, dim: Any = None, **kwargs: Any) -> Any:
    # Without a dimension it is the norm of a matrix.
    return _norm(acts, ord, dim, **kwargs) if isinstance(dim, int) else NotImplemented
