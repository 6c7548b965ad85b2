"""What letting candidates through costs the fused products, and how many they let through."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import calls
from benchmarks.gpu_check.bench import Bench, Record, compared
from benchmarks.gpu_check.kernels import PRODUCT, product

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_FUSED = ("triton", "gluon")


def costs(bench: Bench, name: str) -> Iterator[Record]:
    """Whole products that let nothing through, and the k best of each row; then the survivors."""
    shape = bench.shape(name)
    x, W, b, k, rank_scale, *_ = inputs = bench.inputs("select_topk", shape)
    contestants: dict[str, Callable[[], object]] = {PRODUCT: product(bench, shape)}
    found = calls.runnable("select_topk", inputs, _FUSED)
    facts: list[Record] = []
    for backend in found:
        watched = _Watched(backend, (x, W, b, rank_scale), k)
        facts += watched.survivors(name, backend)
        contestants[f"{backend}, nothing passes"] = watched.whole(torch.inf)
        contestants[f"{backend}, the k best pass"] = watched.whole(None)
    if not found:
        why = "no fused product runs here"
        facts.append({"kind": "not available", "what": f"epilogue {name}", "why": why})
    yield from compared(f"epilogue {name}", "select_topk", bench.time(contestants), PRODUCT)
    yield from facts


class _Watched:
    """A selection whose lists are looked at after every pass."""

    def __init__(self, backend: str, operands: tuple[Any, ...], k: int) -> None:
        # Not at the top: the kernels can only be imported where Triton is.
        from sae_kernels.primitives import schedule
        from sae_kernels.primitives.select_topk import column_passes

        self._module = importlib.import_module(f"sae_kernels.primitives.select_topk.{backend}")
        self._tile = self._module.tile_for(*operands[:2])
        self._operands = column_passes.EncoderOperands(*operands)
        self.counts: list[torch.Tensor] = []
        column_passes.select(self._operands, k, self._tile, self._encode)
        self.capacity = schedule.capacity(k)
        n_tiles = -(-operands[1].shape[0] // self._tile.columns)
        every = torch.ones_like(self._pending)
        self._all = column_passes.ColumnPass(every, 0, n_tiles, schedule.stride(n_tiles))

    def _encode(self, operands: Any, lists: Any, columns: Any, tile: Any) -> None:
        self._module.encode_pass(operands, lists, columns, tile)
        self.counts.append(lists.counts[: operands.x.shape[0]].clone())
        # Of the last rows, for they are selected in chunks; the thresholds rise to the end.
        self._rows, self._lists, self._pending = operands, lists, columns.pending

    def whole(self, threshold: float | None) -> Callable[[], None]:
        """All columns at once for the last rows, with this threshold or their own."""
        thresholds = self._lists.thresholds
        if threshold is not None:
            thresholds = torch.full_like(thresholds, threshold)
        lists = self._lists._replace(thresholds=thresholds)

        def run() -> None:
            lists.counts.zero_()
            self._module.encode_pass(self._rows, lists, self._all, self._tile)

        return run

    def survivors(self, name: str, backend: str) -> list[Record]:
        """Largest and mean fill of the lists after a pass, and how many rows overflowed."""
        counts = torch.cat(self.counts).float()
        over = (counts > self.capacity).float().mean()
        numbers = {
            "entries of a list after a pass, mean": counts.mean(),
            f"entries of a list after a pass, at most (of {self.capacity})": counts.max(),
            "share of the lists that overflowed in a pass": over,
        }
        return [
            {"kind": "fact", "what": f"{name} on {backend}: {what}", "value": float(value)}
            for what, value in numbers.items()
        ]
