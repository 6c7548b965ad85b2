"""How much of pick_dead one block does alone, by counting."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks import calls
from emulator.counting import counted

if TYPE_CHECKING:
    from emulator.counting import Counted

pytestmark = pytest.mark.full
F, AT_MOST = 65536, 8192


def pick(after: int, monkeypatch: pytest.MonkeyPatch) -> Counted:
    ages = torch.randint(0, 10**6, (F,)) * 100
    run = calls.implementation("pick_dead", "triton").run
    return counted(lambda: run(ages, after, AT_MOST), monkeypatch, 90)


def test_one_block_does_little_however_many_are_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """One block that does everything takes 589,696 instructions."""
    found = pick(10**6, monkeypatch)
    assert found.launches == {"_sort_chunks": 1, "_divide": 1, "_write_chunks": 1}
    assert found.instructions["_divide"] <= 4000
    assert found.instructions.total() <= 22 * F
    # No atomics, whose order would be another each time.
    assert not any(re.search(r"\b(atom|red)\.(global|shared)", ptx) for ptx in found.ptx.values())


def test_nothing_is_sorted_while_nothing_is_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick(10**8, monkeypatch).instructions["_sort_chunks"] <= F // 2
