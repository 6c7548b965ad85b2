"""TOML as editors leave it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sae_kernels.config.toml import read_tables

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"])
def test_a_mark_and_ends_of_lines(tmp_path: Path, mark: bytes, end: bytes) -> None:
    (tmp_path / "run.toml").write_bytes(mark + end.join([b"[sae]", b"k = 3"]))
    assert read_tables(tmp_path / "run.toml") == {"sae": {"k": 3}}
