"""That running kernels on the host finds what it is for: barriers that are missing.

On a GPU such a kernel may well pass for months.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from sae_kernels.backends import cuda
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.transpose_codes import transpose_codes
from tests.cuda.conftest import OnHost, compile_for_host

if TYPE_CHECKING:
    from pathlib import Path

# The file, what stands before the barrier, and the barrier.
BARRIERS = {
    "list-loaded": ("select_tile.cuh", "tile.best_values[at] : 0);\n  }\n", "  __syncthreads();\n"),
    "list-padded": ("select_tile.cuh", "list.put(j, 0, 0);\n", "    __syncthreads();\n"),
    "counters-read": ("transpose_codes.cuh", "__popc(below));\n", "      __syncwarp();\n"),
    "sums-known": ("transpose_codes.cuh", "= before + sum;\n", "  __syncthreads();\n"),
}


def results() -> list[torch.Tensor]:
    """What the kernels make of a few inputs, on the backend "cuda"."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 701, generator=generator)
    indices = torch.randint(0, 999, (400, 4), generator=generator, dtype=torch.int32)
    return [
        *select_topk(torch.eye(2), scores.T, None, 33, None, backend="cuda"),
        *select_topk(torch.eye(2), scores[:, :301].T, None, 33, None, backend="cuda"),
        *transpose_codes(indices, None, None, 999, backend="cuda"),
    ]


@pytest.mark.full
@pytest.mark.parametrize("name", BARRIERS)
def test_a_missing_barrier_is_noticed(
    name: str, on_host: OnHost, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sae_kernels.primitives.select_topk.cuda.tile_shape", lambda B, F: (2, 400))
    wanted = results()
    folder = cuda.sources()
    assert folder is not None
    shutil.copytree(folder, tmp_path / "cuda")
    file, before, barrier = BARRIERS[name]
    source = tmp_path / "cuda" / file
    text = source.read_text()
    assert text.count(before + barrier) == 1
    source.write_text(text.replace(before + barrier, before))
    on_host.kernels = compile_for_host(tmp_path / "cuda", tmp_path / "kernels.so")
    assert any(gives_itself_away(on_host, schedule, wanted) for schedule in range(8))


def gives_itself_away(host: OnHost, schedule: int, wanted: list[torch.Tensor]) -> bool:
    """Whether results differ under a schedule, or threads miss each other."""
    host.schedule = schedule
    try:
        return not all(map(torch.equal, results(), wanted))
    except RuntimeError:
        return True
