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
RULES: dict[Any, Callable[..., Any]] = {}
T = torch.Tensor


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Enters a rule for some functions of torch."""

    def enter(answer: Rule) -> Rule:
        RULES.update(dict.fromkeys(functions, answer))
        return answer

    return enter


def entries_of(value: Any) -> SparseCodes | None:
    """The entries of a LazyCodes that still say all; None of everything else."""
    return getattr(value, "entries", None) if isinstance(value, T) else None


def _used(acts: Any, answer: torch.Tensor) -> torch.Tensor:
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


def by_latent(codes: SparseCodes, values: torch.Tensor) -> torch.Tensor:
    """Sums of entries' values over each latent, [F]; differentiable."""
    out = values.new_zeros(codes.n_latents)
    return out.index_add(0, codes.indices.flatten().long(), values.flatten())


def _over(acts: Any, dim: Any) -> str | None:
    """Which dimensions a reduction goes over: "all", "latents", "tokens", or None for others."""
    if dim is None or dim == ():
        return "all"
    n = acts.dim()
    dims = {d % n for d in ((dim,) if isinstance(dim, int) else dim)}
    if dims == set(range(n)):
        return "all"
    return "latents" if dims == {n - 1} else "tokens" if dims == set(range(n - 1)) else None


@rule(T.sum, torch.sum)
def _sum(
    acts: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, **other: Any
) -> Any:
    codes, over = entries_of(acts), _over(acts, dim)
    if codes is None or over is None or other:
        return NotImplemented
    values = codes.values
    whole = values.dtype == torch.bool or not values.is_floating_point()
    values = values.to(dtype or (torch.int64 if whole else values.dtype))
    if over == "all":
        out = values.sum()
    else:
        out = by_token(codes, values) if over == "latents" else by_latent(codes, values)
    if keepdim:
        sizes = [1 if over == "all" else n for n in acts.shape]
        if over == "latents":
            sizes[-1] = 1
        elif over == "tokens":
            sizes[:-1] = [1] * (len(sizes) - 1)
        out = out.reshape(sizes)
    return _used(acts, out)


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
    codes, over = entries_of(acts), _over(acts, dim)
    if codes is None or keepdim or any(each is not None for each in kwargs.values()):
        return NotImplemented
    if not isinstance(p, (int, float)) or not 1 <= p < float("inf"):
        return NotImplemented
    if over == "all":
        return _used(acts, codes.values.flatten().norm(p))
    if over != "latents":
        return NotImplemented
    if codes.offsets is None:
        return _used(acts, codes.values.norm(p, dim=-1))
    total = by_token(codes, codes.values.abs() ** p)
    # A token without entries has the norm 0, and no gradient.
    return _used(acts, torch.where(total > 0, total, 1) ** (1 / p) * (total > 0))


# Columns, masks and products.


@rule(T.__getitem__)
def _getitem(acts: Any, index: Any) -> Any:
    codes = entries_of(acts)
    if codes is None:
        return NotImplemented
    mask = entries_of(index)
    if mask is not None and mask.values.dtype == torch.bool and index.shape == acts.shape:
        ragged = codes.offsets is not None
        if mask.indices is codes.indices and ragged:  # in the order of the dense tensor
            return _used(acts, codes.values[mask.values])
        if mask.indices is codes.indices:
            order = codes.indices.argsort(-1)
            kept = mask.values.gather(-1, order)
            return _used(acts, codes.values.gather(-1, order)[kept])
        return NotImplemented
    latents = _latents_of(index, acts.dim())
    return NotImplemented if latents is None else _used(acts, codes.columns(latents))


def _latents_of(index: Any, n_dims: int) -> torch.Tensor | None:
    """The latents of ``acts[..., latents]`` and ``acts[:, latents]``, a list or a 1-D tensor."""
    if not isinstance(index, tuple) or not index:
        return None
    *before, last = index
    whole = [Ellipsis] if before == [Ellipsis] else [slice(None)] * (n_dims - 1)
    if before != whole or isinstance(last, (int, slice, type(None))) or last is Ellipsis:
        return None  # those are views, which may be written through
    try:
        latents = torch.as_tensor(last)
    except (TypeError, ValueError, RuntimeError):
        return None
    good = latents.dim() == 1 and latents.dtype == torch.int64 and type(latents) is T
    return latents if good and bool((latents >= 0).all()) else None


@rule(T.matmul, torch.matmul, T.__matmul__, T.mm, torch.mm)
def _matmul(acts: Any, weight: Any) -> Any:
    codes = entries_of(acts)
    if codes is None or not _is_matrix(weight) or weight.shape[0] != codes.n_latents:
        return NotImplemented
    return _used(acts, functional.decode(codes, weight).to(_product_dtype(acts, weight)))


@rule(F.linear)
def _linear(acts: Any, weight: Any, bias: Any = None) -> Any:
    codes = entries_of(acts)
    if codes is None or not _is_matrix(weight) or weight.shape[1] != codes.n_latents:
        return NotImplemented
    out = functional.decode(codes, weight.T, bias)
    return _used(acts, out.to(_product_dtype(acts, weight)))


def _is_matrix(weight: Any) -> bool:
    return type(weight) in (T, torch.nn.Parameter) and weight.dim() == 2


def _product_dtype(acts: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(acts.dtype, weight.dtype)


@rule(T.to_dense)
def _to_dense(acts: Any, *args: Any, **kwargs: Any) -> Any:
    # A dense tensor's to_dense() is that tensor.
    return acts


# What looks behind the tensor: at its memory, or at its gradient.


@rule(T.detach, torch.detach, T.data.__get__)  # type: ignore[attr-defined]
def _detach(acts: Any, *_: Any) -> Any:
    return acts.alias() if hasattr(acts, "alias") else NotImplemented


@rule(T.numpy, T.__array__)
def _numpy(acts: Any, *args: Any, **kwargs: Any) -> Any:
    if acts.requires_grad:
        raise RuntimeError(
            "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead."
        )
    return _memory_of(acts, "numpy").numpy(*args, **kwargs)


@rule(T.data_ptr)
def _data_ptr(acts: Any) -> Any:
    return _memory_of(acts, "data_ptr").data_ptr()


@rule(T.untyped_storage)
def _untyped_storage(acts: Any) -> Any:
    return _memory_of(acts, "untyped_storage").untyped_storage()


def _memory_of(acts: Any, why: str) -> torch.Tensor:
    dense: torch.Tensor = acts.dense(why)
    acts._memory.written = True  # by whoever holds it, at any time
    return dense


@rule(T.tolist)
def _tolist(acts: Any) -> Any:
    return acts.dense("tolist").tolist()


@rule(T.retain_grad, T.register_hook, T.requires_grad_)
def _watched(acts: Any, *args: Any, **kwargs: Any) -> Any:
    if hasattr(acts, "watch") and acts.requires_grad:
        acts.watch()
    return NotImplemented
