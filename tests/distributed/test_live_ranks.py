"""A model that feeds several ranks: the batches of one process, from a share of its work each."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from sae_kernels.nn import SparseAutoencoder
from tests.distributed import live_ranks, runs
from tests.distributed.live_ranks import given
from tests.distributed.world import on_ranks, torchrun
from tests.harvest.causal import CONTEXT, LAYER, D, documents, gpt2, tokenizer
from tests.threads import one_thread

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

STEPS = 40  # more than an epoch of batches of 25
ORDERS = [{"batch_size": 25}, {"batch_size": 130, "sinks": True}]  # in a window, and over several


def all_given(group: Any, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [given(group, **case) for case in cases]


def assert_same(found: dict[str, Any], one: dict[str, Any]) -> None:
    for x, expected in zip(found["rows"], one["rows"], strict=True):
        assert torch.equal(x, expected)
    assert found["states"] == one["states"]


SIZES = [2, *(pytest.param(size, marks=pytest.mark.full) for size in (3, 4))]


@pytest.mark.parametrize("size", SIZES)
def test_batches_are_those_of_one_process(size: int) -> None:
    """From the start, and from where one process stood in the middle of a window."""
    cases = [{"n": STEPS, **order} for order in ORDERS]
    with one_thread():
        one = all_given(None, cases)
    straight = one[0]
    assert straight["states"][-1]["epoch"] > 0
    assert one[1]["states"][-1]["left_out"] > 0
    start = straight["states"][6]
    assert start["offset"] > 0
    one.append({name: straight[name][7:] for name in ("rows", "states")})
    then = {"n": STEPS - 7, "start": start, "sample": 0, **ORDERS[0]}
    found = on_ranks(size, all_given, [*cases, then])
    for number, expected in enumerate(one):
        every = [each[number] for each in found]
        for each in every:
            assert_same(each, expected)
            assert "sample" not in each or torch.equal(each["sample"], expected["sample"])
        if "ran" in expected:  # each batch of the model in one rank
            assert sum(each["ran"] for each in every) == expected["ran"]


@pytest.mark.full
def test_one_process_goes_on_with_the_batches_of_ranks() -> None:
    first = on_ranks(3, given, 7)[0]
    with one_thread():
        straight, then = given(None, STEPS), given(None, STEPS - 7, first["states"][-1])
    assert_same(then, {name: straight[name][7:] for name in ("rows", "states")})


WINDOW, BATCH = 600, 64


def much(group: Any, n: int) -> dict[str, Any]:
    return given(group, n, sample=0, text=documents(300), batch_size=BATCH, window_rows=WINDOW)


@pytest.mark.full
@pytest.mark.parametrize("size", [2, 4])
def test_a_rank_holds_and_sends_its_share(size: int) -> None:
    steps = 20
    found = on_ranks(size, much, steps)
    # Batches of the model, of at most 2 chunks of full length, are dealt out in turn.
    assert max(each["most"] for each in found) <= WINDOW / size + 2 * CONTEXT
    norms = 4 * WINDOW * (found[0]["states"][-1]["window"] + 1)
    for each in found:
        # A rank sends as many rows as the one with most: four deviations of its share more.
        share = BATCH / size
        rows = share + 4 * (share * (1 - 1 / size)) ** 0.5
        assert each["sent"] >= (size - 1) * steps * share * D * 4
        assert each["sent"] <= (size - 1) * (steps * rows * D * 4 + norms)


@pytest.mark.full
def test_what_befalls_one_rank_is_an_error_of_all() -> None:
    for rank, (other_text, nan) in enumerate(on_ranks(2, live_ranks.refusals)):
        assert other_text.startswith("ValueError: text up to window"), other_text
        said = "window 0: expected activations that are finite"
        assert nan.startswith(f"NonFiniteError: {said}" if rank else f"RankError: rank 1: {said}")


def run(group: Any, folder: str, **options: Any) -> dict[str, Any]:
    source = live_ranks.stream(batch_size=runs.SETTINGS["batch_size"])
    return runs.run(group, folder, source=source, **options)


def run_with(group: Any, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    return run(group, folder, **options)


@pytest.mark.parametrize(("first", "then"), [(2, 1), pytest.param(4, 2, marks=pytest.mark.full)])
def test_a_run_goes_on_with_other_ranks_with_the_same_bits(
    tmp_path: Path, first: int, then: int
) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "run"
    on_ranks(1, run_with, str(straight), {"blocks": 8})
    on_ranks(first, run_with, str(folder), {"blocks": 8, "stop_after": 6})
    on_ranks(then, run_with, str(folder), {"blocks": 8, "resume": True})
    expected = load_file(straight / "sae" / "sae.safetensors")
    for name, tensor in load_file(folder / "sae" / "sae.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.full
def test_a_run_is_that_of_one_process(tmp_path: Path) -> None:
    with one_thread():
        alone = run(None, str(tmp_path / "one"))
    for found in on_ranks(3, run_with, str(tmp_path / "many"), {}):
        for line, expected in zip(found["lines"], alone["lines"], strict=True):
            assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    one, many = (SparseAutoencoder.from_pretrained(tmp_path / n / "sae") for n in ("one", "many"))
    assert one.metadata["activations"] == many.metadata["activations"]


@pytest.mark.slow
def test_the_command_line_with_a_model(tmp_path: Path) -> None:
    model, text, out = tmp_path / "model", tmp_path / "text.jsonl", tmp_path / "run"
    gpt2().save_pretrained(model)
    tokenizer().save_pretrained(model)
    text.write_text("\n".join(json.dumps({"text": each}) for each in documents(60)))
    flags = {
        "model": model,
        "layer": LAYER,
        "text": text,
        "context-length": CONTEXT,
        "latents-over": 2,
        "n-latents": 96,
        "k": 6,
        "steps": 9,
        "batch-size": 64,
    }
    arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = torchrun(2, "train", "--out", str(out), *arguments)
    assert done.returncode == 0, done.stderr
    (out / "result.json").unlink()
    resumed = torchrun(1, "resume", str(out))
    assert resumed.returncode == 0, resumed.stderr
    assert (out / "result.json").exists()
