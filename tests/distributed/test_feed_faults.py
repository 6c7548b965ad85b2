"""A run whose model is in a process of its own, by the command line: whole, and with a fault."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from sae_kernels.runs import checkpoint
from tests.distributed.doomed_runs import assert_same, command, ended, said, weights
from tests.distributed.world import torchrun
from tests.harvest.causal import CONTEXT, LAYER, documents, gpt2, tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    import torch

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
pytestmark = pytest.mark.slow

TIMEOUT = 40  # seconds, for those that train wait while the others load the model


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a tiny model and its text."""
    model = tmp_path_factory.mktemp("model")
    gpt2().save_pretrained(model)
    tokenizer().save_pretrained(model)
    text = model / "text.jsonl"
    text.write_text("\n".join(json.dumps({"text": each}) for each in documents(60)))
    of_model = ["--model", str(model), "--layer", LAYER, "--text", str(text)]
    return [*of_model, "--context-length", str(CONTEXT)]


@pytest.fixture(scope="module")
def straight(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The weights of a run whose two processes do both."""
    out = tmp_path_factory.mktemp("straight") / "run"
    done = torchrun(2, *command(data, out, TIMEOUT))
    assert done.returncode == 0, done.stderr
    return weights(out)


def test_a_model_apart_gives_the_same_bits(
    data: list[str], tmp_path: Path, straight: dict[str, torch.Tensor]
) -> None:
    out = tmp_path / "run"
    done = torchrun(4, *command(data, out, TIMEOUT, harvest_ranks=2))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fvu") == 1, "one process speaks"
    assert "harvest_ranks = 2" in (out / "run.toml").read_text()
    assert_same(out, straight)
    alone = torchrun(1, *command(data, tmp_path / "alone", TIMEOUT, harvest_ranks=1))
    assert "harvest_ranks: expected fewer than the 1 processes" in said(alone)


FAULTS = [
    ("2 18 0 SIGKILL", 15, "rank 2: ended without a message"),
    ("0 18 0 SIGKILL", 15, "rank 0: ended without a message"),
    ("2 18 0 error", 15, "rank 2: Bug: a wrong turn"),
    ("2 18 0 SIGSTOP", TIMEOUT + 15, "rank 2: ended without a message"),
    ("2 17 0 SIGTERM", 15, "stopped, checkpoint of step 18 saved"),
]


@pytest.mark.parametrize(("doom", "within", "words"), FAULTS)
def test_all_stop_and_another_number_goes_on(
    data: list[str],
    tmp_path: Path,
    straight: dict[str, torch.Tensor],
    doom: str,
    within: float,
    words: str,
) -> None:
    out = tmp_path / "run"
    done, seconds = ended(3, command(data, out, TIMEOUT, harvest_ranks=1), doom)
    print(f"{doom}: {seconds:.1f} s")
    assert done.returncode == 1
    assert words in said(done)
    assert seconds < within
    for step in checkpoint.steps(out / checkpoint.CHECKPOINTS):
        checkpoint.verify(checkpoint.path_of(out / checkpoint.CHECKPOINTS, step))
    resumed = torchrun(1 if "18 0 error" in doom else 2, "resume", str(out))
    assert resumed.returncode == 0, resumed.stderr
    assert_same(out, straight)
