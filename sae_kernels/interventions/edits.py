"""Edits as plain data: what changes, how, in which rows and at which positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sae_kernels.codes import SparseCodes

At = Literal["all", "prompt", "generated"] | int | Sequence[int]
Latents = int | Sequence[int] | Tensor  # whole numbers of any library
ENDLESS = 1 << 40


class Span(NamedTuple):
    """Positions from ``start`` to before ``stop``; those counted from the prompt's end add P to it.

    Position 0 is a sequence's first token that is not padding; P is the length of its prompt.
    """

    start: int
    start_from_end: int
    stop: int
    stop_from_end: int

    def before(self, other: Span) -> bool:
        """Whether this span ends before another begins, whatever P is."""
        return self.stop_from_end == other.start_from_end and self.stop <= other.start


_SPANS = {
    "all": Span(0, 0, ENDLESS, 0),
    "prompt": Span(0, 0, 0, 1),
    "generated": Span(0, 1, ENDLESS, 0),
}


class Change(NamedTuple):
    """The new value of a latent, ``clamp(factor * value + shift, low, high)``; 0 is no value."""

    factor: float = 1.0
    shift: float = 0.0
    low: float = -math.inf
    high: float = math.inf


@dataclasses.dataclass(frozen=True, eq=False)
class Edit:
    """An edit of latents or of the activation, made by :func:`scale`, :func:`steer` and the like.

    All of them take, by name:

    - ``rows``: the number of a row of the batch, or several; None is every row.
    - ``at``: "all", "prompt" or "generated" positions, or numbers of positions: 0 is a row's first
      token that is not padding, -1 the last one of its prompt.
    - ``when``: a latent; the edit applies to tokens in which it fires (its value is not 0).

    Attributes:
        latents: the latents that it is about.
        changes: one for each of them.
        rows, spans, when: where it applies; ``when`` is -1 for everywhere.
        keeps_only: whether all other latents become 0.
        pools: [latents, n], values that replace the shift in turn.
        vector: [D], added to the activation.
    """

    latents: tuple[int, ...]
    changes: tuple[Change, ...]
    rows: tuple[int, ...] | None
    spans: tuple[Span, ...]
    when: int = -1
    keeps_only: bool = False
    pools: Tensor | None = None
    vector: Tensor | None = None


def scale(
    latents: Latents,
    factor: float,
    *,
    rows: int | Sequence[int] | None = None,
    at: At = "all",
    when: int | None = None,
) -> Edit:
    """Multiplies latents by a factor.

    >>> scale(3, 2.0).changes[0].factor
    2.0
    """
    return _edit(latents, Change(factor=factor), rows, at, when)


def add(
    latents: Latents,
    amount: float,
    *,
    rows: int | Sequence[int] | None = None,
    at: At = "all",
    when: int | None = None,
) -> Edit:
    """Adds an amount to latents, those that did not fire too.

    Without ``when`` no codes are needed: the activation moves along the decoder row.
    """
    return _edit(latents, Change(shift=amount), rows, at, when)


def clamp(
    latents: Latents,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    rows: int | Sequence[int] | None = None,
    at: At = "all",
    when: int | None = None,
) -> Edit:
    """Limits latents to [low, high]; one that did not fire has the value 0."""
    if not low <= high:
        raise ValueError(f"clamp: expected low <= high, got {low} and {high}")
    return _edit(latents, Change(low=low, high=high), rows, at, when)


def set_to(
    latents: Latents,
    value: float,
    *,
    rows: int | Sequence[int] | None = None,
    at: At = "all",
    when: int | None = None,
) -> Edit:
    """Sets latents to a value, those that did not fire too."""
    return _edit(latents, Change(factor=0.0, shift=value), rows, at, when)


def ablate(
    latents: Latents,
    to: float | Tensor = 0.0,
    *,
    rows: int | Sequence[int] | None = None,
    at: At = "all",
    when: int | None = None,
) -> Edit:
    """Sets latents to zero, or to their mean: ``to`` is one value for all, or a value per latent.

    Args:
        latents: the latents.
        to: a number, or [F], as :func:`mean_codes` gives it.
        rows, at, when: see :class:`Edit`.
    """
    if not isinstance(to, Tensor):
        return set_to(latents, to, rows=rows, at=at, when=when)
    chosen = _numbers("latent", latents)
    if to.dim() != 1 or not all(f < len(to) for f in chosen):
        raise ValueError(
            f"to: expected one value for each latent, [F] with F above {max(chosen)}, got "
            f"{list(to.shape)}"
        )
    changes = [Change(factor=0.0, shift=float(to[f])) for f in chosen]
    return _edit(chosen, changes, rows, at, when)


def resample(
    latents: Latents,
    codes: SparseCodes,
    *,
    rows: int | Sequence[int] | None = None,
    at: At = "all",
    when: int | None = None,
) -> Edit:
    """Sets latents to the values that they have in rows of other codes (resample ablation).

    Which of these tokens a value is taken from is a fixed function of row and position, the same
    for all latents of this edit, so that what fires together stays together.

    Args:
        latents: the latents.
        codes: of the text to take values from, of any form; read once, at this call.
        rows, at, when: see :class:`Edit`.
    """
    chosen = _numbers("latent", latents)
    pools = codes.columns(list(chosen)).detach().reshape(-1, len(chosen)).T
    if not pools.numel():
        raise ValueError("codes: expected at least one token to take values from, got none")
    edit = _edit(chosen, Change(factor=0.0), rows, at, when)
    return dataclasses.replace(edit, pools=pools)


def keep_only(latents: Latents, *, rows: int | Sequence[int] | None = None, at: At = "all") -> Edit:
    """Sets all latents to 0 but these, and those that have an edit of their own."""
    return dataclasses.replace(_edit(latents, Change(), rows, at, None), keeps_only=True)


def steer(
    vector: Tensor,
    strength: float = 1.0,
    *,
    rows: int | Sequence[int] | None = None,
    at: At = "all",
) -> Edit:
    """Adds ``strength * vector`` [D] to the activation; needs no codes and no SAE.

    A vector is a row of ``sae.W_dec``, one of :func:`~sae_kernels.interventions.contrast`, or any.
    """
    if not isinstance(vector, Tensor) or vector.dim() != 1 or not vector.is_floating_point():
        got = f"{vector.dtype} {list(vector.shape)}" if isinstance(vector, Tensor) else type(vector)
        raise ValueError(f"vector: expected one direction [D] of floating point, got {got}")
    moved = vector.detach() * strength
    if not moved.isfinite().all():
        raise ValueError(f"vector: expected finite numbers, got NaN or infinity in {strength} * it")
    return dataclasses.replace(_edit((), (), rows, at, None), vector=moved)


def mean_codes(codes: SparseCodes) -> Tensor:
    """The mean value of each latent over all tokens of codes, [F]; a missing entry counts as 0.

    >>> import torch
    >>> from sae_kernels import SparseCodes
    >>> mean_codes(SparseCodes.from_dense(torch.tensor([[0.0, 3.0], [1.0, 0.0]]), k=1)).tolist()
    [0.5, 1.5]
    """
    n_tokens = max(1, math.prod(codes.batch_shape))
    total = codes.values.new_zeros(codes.n_latents)
    total.index_add_(0, codes.indices.flatten().long(), codes.values.detach().flatten())
    return total / n_tokens


def _edit(
    latents: Latents,
    changes: Change | Sequence[Change],
    rows: int | Sequence[int] | None,
    at: At,
    when: int | None,
) -> Edit:
    chosen = _numbers("latent", latents)
    each = (changes,) * len(chosen) if isinstance(changes, Change) else tuple(changes)
    numbers = [number for change in each for number in change]
    if any(map(math.isnan, numbers)):
        raise ValueError("edit: expected numbers, got NaN")
    of = None if rows is None else _numbers("row", rows)
    condition = (-1,) if when is None else _numbers("latent", when)
    if len(condition) != 1:
        raise ValueError(f"when: expected one latent, got {len(condition)}")
    return Edit(chosen, each, of, _spans(at), *condition)


def _numbers(what: str, given: Latents) -> tuple[int, ...]:
    numbers = _whole(given)
    if numbers is None or any(number < 0 for number in numbers):
        raise ValueError(f"{what}: expected whole numbers from 0 on, got {given!r}")
    return numbers


def _whole(given: object) -> tuple[int, ...] | None:
    """A whole number or several, of any library, as integers; None of anything else."""
    try:
        numbers = torch.as_tensor(sorted(given) if isinstance(given, Set) else given)
    except (TypeError, ValueError, RuntimeError):
        return None
    whole = not numbers.is_floating_point() and numbers.dtype != torch.bool
    if numbers.dim() > 1 or not (whole or numbers.numel() == 0):
        return None
    return tuple(numbers.reshape(-1).tolist())


def _spans(at: At) -> tuple[Span, ...]:
    if isinstance(at, str):
        if at not in _SPANS:
            raise ValueError(f"at: expected {', '.join(_SPANS)} or positions, got {at!r}")
        return (_SPANS[at],)
    places = _whole(at)
    if not places:
        raise ValueError(f"at: expected {', '.join(_SPANS)} or positions, got {at!r}")
    spans: list[Span] = []
    for p in sorted(set(places)):
        span = Span(p, int(p < 0), p + 1, int(p < 0))
        if spans and spans[-1][2:] == span[:2]:  # one run of positions is one span
            span = spans.pop()._replace(stop=p + 1)
        spans.append(span)
    return tuple(spans)
