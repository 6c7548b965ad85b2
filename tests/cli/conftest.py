"""A small data set, a run trained on it, and the command line in this process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from sae_kernels.cli import main
from sae_kernels.data import ShardWriter
from sae_kernels.nn import TopKConfig, TopKSAE

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

D_IN, TOKENS = 8, 600


class Ran(NamedTuple):
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str

    def records(self) -> list[dict[str, Any]]:
        """Standard output as JSON lines; anything else on it is an error here."""
        return [json.loads(line) for line in self.out.splitlines()]

    def refusal(self) -> str:
        """The one line of a user's error, with nothing on standard output."""
        assert self.code == 2, self
        assert self.out == ""
        assert "Traceback" not in self.err
        assert self.err.count("\n") == 1, self.err
        return self.err


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run(*arguments: object) -> Ran:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capsys.readouterr())

    return run


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    with ShardWriter(folder, D_IN, rows_per_shard=250) as writer:
        writer.write(torch.randn(TOKENS, D_IN, generator=torch.Generator().manual_seed(0)))
    return folder


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    TopKSAE(TopKConfig(D_IN, 32, 4)).save_pretrained(folder)
    return folder


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder, to see that nothing of it changed."""

    def contents(folder: Path) -> dict[str, bytes]:
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.*")}

    return contents


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Documents for the tiny models of ``tests/harvest/causal.py``."""
    from tests.harvest.causal import documents  # which needs transformers

    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in documents(40)))
    return path
