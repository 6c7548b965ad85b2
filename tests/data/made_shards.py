"""Rows that name themselves, and a data set of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sae_kernels.data import ShardWriter

if TYPE_CHECKING:
    from pathlib import Path

D = 5


def named_rows(n: int) -> Tensor:
    """Rows that name themselves in column 0."""
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    x[:, 0] = torch.arange(n)
    return x


def write(folder: Path, n: int = 25, **options: Any) -> Tensor:
    """A data set of n such rows with tokens and documents, ten to a shard, written by sevens."""
    x = named_rows(n)
    options = {"rows_per_shard": 10} | options
    with ShardWriter(folder, D, **options) as writer:
        for start in range(0, n, 7):
            ids = torch.arange(start, min(start + 7, n))
            writer.write(x[start : start + 7], tokens=ids + 100, documents=ids // 4)
    return x
