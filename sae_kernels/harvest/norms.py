"""Rows of enormous norm: the bound above which they are left out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_kernels.config.places import activation_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from sae_kernels.config.row_filter import RowFilter


class NormBound:
    """Says which rows [n, D] have a norm of at most a multiple of the median norm.

    The median is taken once, of the first rows that are given, so that whether a later row is kept
    depends on the row alone and not on the batch it is in. Rows of several layers lie side by side,
    each layer has its own bound, and a row is left out in all of them if one is exceeded.

    A median, as a few enormous rows hardly move it; norms of 0 do not count in it, so that rows of
    a layer that is mostly off are kept. The first rows' median stands for that of all: norms of
    ordinary rows differ by a small factor between texts, sinks by a large one.

    Args:
        multiple: a row is left out if its norm exceeds this many times the median; None keeps all.
        widths: the width of each layer.

    Attributes:
        bounds: the largest norm of each layer that is kept; infinite where the first rows are all
            zero; None before the first rows, and where all are kept.

    Example:
        >>> norms = NormBound(10.0, [2])
        >>> norms.kept(torch.tensor([[1.0, 0.0], [0.0, 2.0], [30.0, 0.0]])).tolist()
        [True, True, False]
        >>> norms.bounds
        (20.0,)
    """

    def __init__(self, multiple: float | None, widths: Sequence[int]) -> None:
        self._multiple, self._widths = multiple, list(widths)
        self.bounds: tuple[float, ...] | None = None

    @property
    def waits(self) -> bool:
        """Whether the bounds have to be fixed yet, by the next rows."""
        return self._multiple is not None and self.bounds is None

    def kept(self, rows: Tensor, gathered: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Which rows [n, D] are kept, bool [n] on their device; the first call fixes the bounds.

        NaN and infinity are kept, as leaving them out would hide what is wrong with the model.

        Args:
            rows: those whose norms are judged.
            gathered: where processes share the rows: all rows' numbers, given those of the rows
                here. The answer is then of all rows.
        """
        if self._multiple is None:
            every = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
            return every if gathered is None else gathered(every)
        layers = rows.split(self._widths, dim=1)
        norms = torch.stack([torch.linalg.vector_norm(x.float(), dim=1) for x in layers], dim=1)
        enormous = (~norms.isfinite()).any(1).nonzero().flatten()
        norms[enormous[~rows[enormous].isfinite().all(1)]] = torch.nan
        if gathered is not None:
            norms = gathered(norms)
        if self.bounds is None:
            self.bounds = tuple(self._multiple * _median(each) for each in norms.unbind(1))
        return ~(norms > norms.new_tensor(self.bounds)).any(1)

    def recorded(self) -> list[float | None] | None:
        """The bounds as JSON has them: None for an infinite one."""
        if self.bounds is None:
            return None
        return [bound if math.isfinite(bound) else None for bound in self.bounds]

    def facts(self, row_filter: RowFilter) -> dict[str, Any]:
        """Which rows are left out, as JSON values: the filter's settings and ``max_norm``."""
        return {**row_filter.to_json(), "max_norm": self.recorded()}

    def index_facts(self, layer: int, above: int) -> dict[str, Any]:
        """For the index of a layer's stored activations: its bound, and the rows above any."""
        recorded = self.recorded()
        return {"max_norm": recorded and recorded[layer], "rows_above_max_norm": above}


def read_bounds(recorded: object, layers: int) -> tuple[float, ...] | None:
    """Bounds as :meth:`NormBound.recorded` gave them; None where there are none.

    Raises:
        ValueError: neither None nor a positive number or None for each layer.
    """
    if recorded is None:
        return None
    given = recorded if isinstance(recorded, list) else []
    bounds = [math.inf if bound is None else bound for bound in given]
    fit = [type(bound) in (int, float) and bound > 0 for bound in bounds]
    if len(bounds) != layers or not all(fit):
        raise ValueError(
            f"max_norm: expected a list of a positive number for each of {layers} layers, got "
            f"{recorded!r:.200}"
        )
    return tuple(bounds)


def recorded_max_norm(metadata: Mapping[str, Any]) -> float | None:
    """The largest norm of the rows that an SAE of one layer was trained on; None without a bound.

    Args:
        metadata: of the SAE, whose entry "activations" has what :meth:`NormBound.facts` gave.

    Raises:
        ValueError: what is no list of bounds.

    Example:
        >>> recorded_max_norm({"activations": {"max_norm": [20.0]}})
        20.0
    """
    recorded = activation_facts(metadata).get("max_norm")
    bounds = read_bounds(recorded, len(recorded) if isinstance(recorded, list) else 1)
    return None if bounds is None or len(bounds) > 1 or math.isinf(bounds[0]) else bounds[0]


def _median(norms: Tensor) -> float:
    """The median of the norms that are neither zero nor NaN or infinite; infinity without one."""
    norms = norms[(norms > 0) & norms.isfinite()]
    return float(norms.median()) if len(norms) else math.inf
