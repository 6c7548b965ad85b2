"""What entries can answer of parts of a dense tensor, of products with it, and of its memory.

More rules, as in :mod:`~sae_kernels.integrations.lazy_rules`.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from sae_kernels import functional
from sae_kernels.integrations.lazy_rules import Rules, entries_of, used

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.codes import SparseCodes

RULES = rule = Rules()
T = torch.Tensor

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
            return used(acts, codes.values[mask.values])
        if mask.indices is codes.indices:
            order = codes.indices.argsort(-1)
            kept = mask.values.gather(-1, order)
            return used(acts, codes.values.gather(-1, order)[kept])
        return NotImplemented
    if type(index) is T and index.dtype == torch.bool and index.shape == acts.shape[:-1]:
        chosen = _tokens_of(codes, index)
        acts._used = acts._used or chosen.values.requires_grad
        return acts.of(chosen, acts.ledger)
    latents = _latents_of(index, acts.dim())
    return NotImplemented if latents is None else used(acts, codes.columns(latents))


def _tokens_of(codes: SparseCodes, mask: torch.Tensor) -> SparseCodes:
    """The codes of some tokens, by a mask of the batch's shape."""
    if codes.offsets is None:
        return codes.with_values(codes.values[mask], codes.indices[mask])
    kept = mask.flatten()
    entries = kept[codes.tokens.long()]
    ends = codes.offsets.diff()[kept].cumsum(0, dtype=torch.int32)
    offsets = torch.cat([ends.new_zeros(1), ends])
    chosen = codes.with_values(codes.values[entries], codes.indices[entries])
    return dataclasses.replace(chosen, offsets=offsets, leading=None)


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
    return used(acts, functional.decode(codes, weight).to(_product_dtype(acts, weight)))


@rule(F.linear)
def _linear(acts: Any, weight: Any, bias: Any = None) -> Any:
    codes = entries_of(acts)
    if codes is None or not _is_matrix(weight) or weight.shape[1] != codes.n_latents:
        return NotImplemented
    out = functional.decode(codes, weight.T, bias)
    return used(acts, out.to(_product_dtype(acts, weight)))


def _is_matrix(weight: Any) -> bool:
    return type(weight) in (T, torch.nn.Parameter) and weight.dim() == 2


def _product_dtype(acts: torch.Tensor, weight: torch.Tensor) -> torch.dtype:
    return torch.promote_types(acts.dtype, weight.dtype)


@rule(T.nonzero, torch.nonzero)
def _nonzero(acts: Any, *, as_tuple: bool = False) -> Any:
    codes = entries_of(acts)
    if codes is None:
        return NotImplemented
    places = codes.tokens.flatten().long() * codes.n_latents + codes.indices.flatten().long()
    found = torch.unravel_index(places[codes.values.flatten() != 0].sort().values, acts.shape)
    return found if as_tuple else torch.stack(found, dim=-1)


def _reshaped(function: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """Another shape of the batch, as a view of the same memory."""

    def answer(acts: Any, *args: Any, **kwargs: Any) -> Any:
        if entries_of(acts) is None or acts.requires_grad:
            return NotImplemented  # autograd must know of a view: it may be written through
        looks = torch.empty(acts.shape, dtype=acts.dtype, device="meta")
        looks = function(looks, *args, **kwargs)
        if looks.dtype != acts.dtype or looks.shape[-1:] != acts.shape[-1:]:
            return NotImplemented
        return acts.batched(tuple(looks.shape[:-1]))

    return answer


for _name in ("reshape", "view", "flatten", "unflatten"):
    rule(getattr(T, _name))(_reshaped(getattr(T, _name)))
for _name in ("reshape", "flatten", "unflatten"):
    rule(getattr(torch, _name))(_reshaped(getattr(torch, _name)))


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
