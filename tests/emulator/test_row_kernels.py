"""What the kernels on rows of weights execute: instructions, loads and launches, by counting."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import calls
from emulator.counting import counted
from sae_kernels import SparseCodes, functional
from sae_kernels.bench.cases import Shape

if TYPE_CHECKING:
    from emulator.counting import Counted

pytestmark = pytest.mark.full
B, F, K = 16, 32, 16
VECTOR_LOAD = "ld.global.v4.b32"  # 16 bytes


@pytest.fixture(autouse=True)
def _eight_entries_a_latent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other token has the even latents, and the rest the odd ones: a ninth costs a round."""
    latents = torch.arange(B)[:, None] % 2 + 2 * torch.arange(K, dtype=torch.int32)
    monkeypatch.setattr(calls, "latents", lambda shape, popularity: latents.to(torch.int32))


def row_grad(dots: bool, monkeypatch: pytest.MonkeyPatch, sm: int, D: int = 256) -> Counted:
    arguments = calls.arguments("row_grad", Shape(B, D, F, K), dots=dots)
    run = calls.implementation("row_grad", "triton").run
    return counted(lambda: run(*arguments), monkeypatch, sm)


@pytest.mark.parametrize("sm", [80, 90])
def test_one_reading_of_the_upstream_rows_serves_both_gradients(
    sm: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, both = (row_grad(dots, monkeypatch, sm) for dots in (False, True))
    # At a width with the same tile in both: one load more, of the latent's own row.
    loads = [each.ptx["_row_grad"].count(VECTOR_LOAD) for each in (alone, both)]
    assert loads[0] > 0
    assert loads[1] == loads[0] + 1


def test_a_decoder_backward_launches_three_kernels_after_the_sort(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    W = torch.randn(F, 64).bfloat16().requires_grad_()
    values, indices = torch.randn(B, K).requires_grad_(), torch.rand(B, F).argsort(1)[:, :K].int()
    codes = SparseCodes(values, indices, F)

    def step() -> None:
        functional.decode(codes, W, backend="triton").sum().backward()

    assert counted(step, monkeypatch, 90).launches == {
        "_decode_kernel": 1,
        "_index_codes": 1,
        "_sum_chunks": 1,
        "_row_grad": 1,
        "_add_products": 1,
    }
    assert W.grad is not None
    assert W.grad.dtype == torch.bfloat16


@pytest.mark.parametrize(("width", "most"), [(768, 2800), (2304, 10500)])
def test_instructions_of_a_row_with_eight_entries(
    width: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row in one block of the next power of two takes 3428 at 768 columns and 14016 at 2304."""
    arguments = calls.arguments("row_update", Shape(B, width, F, K))
    run = calls.implementation("row_update", "triton").run
    found = counted(lambda: run(*arguments), monkeypatch, 90)
    assert found.instructions["_row_update"] <= most * F


def test_instructions_of_a_decoder_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """At D=2304 a latent with eight entries: 4824 in row_grad alone, 2584 more in code_grad."""
    found = row_grad(True, monkeypatch, 90, 2304)
    assert found.instructions["_row_grad"] <= 6700 * F
