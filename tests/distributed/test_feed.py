"""Ranks that run a model for others, which train: the batches and the bits of one process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh

from sae_kernels.config.parallel import ParallelConfig
from sae_kernels.distributed.feed import Feed
from sae_kernels.distributed.team import Team
from tests.distributed import live_ranks, runs
from tests.distributed.world import TIMEOUT, on_ranks
from tests.harvest.causal import CONTEXT, documents
from tests.threads import one_thread

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

STEPS = 40  # more than an epoch of batches of 25
ORDERS: list[dict[str, Any]] = [  # in a window, and over several
    {"batch_size": 25},
    {"batch_size": 130, "sinks": True, "dtype": torch.bfloat16},
]


def fed(group: Any, harvest: int, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Batches with the state after each where this rank trains; what it cost where it does not."""
    mesh = DeviceMesh.from_group(group, "cpu")
    parallel = ParallelConfig(harvest_ranks=harvest, timeout=TIMEOUT)
    return [one_fed(mesh, parallel, **case) for case in cases]


def one_fed(
    mesh: DeviceMesh,
    parallel: ParallelConfig,
    n: int,
    start: dict[str, Any] | None = None,
    sample: int = 30,
    **order: Any,
) -> dict[str, Any]:
    feed, ran, most = Feed(mesh, parallel), [0], [0]
    if feed.runs_model:
        stream: Any = live_ranks.stream(**order)

        def count(_module: Any, _args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            ran[0] += first.shape[:2].numel()
            memory = stream._window._here, stream._window._next
            most[0] = max(most[0], sum(len(each._all) for each in memory))

        stream._read[0].transformer.h[1].register_forward_hook(count)
        feed.serve(stream)
        sent = feed._collectives.sent["activations"]
        return {"ran": ran[0], "most": most[0], "sent": sent}
    rows, states = [], []
    with feed.batches() as batches, batches.spread_over(Team(feed.mesh, TIMEOUT)):
        found = {"sample": batches.sample(sample)} if sample else {}
        if start is not None:
            batches.load_state_dict(start)
        for _ in range(n):
            rows.append(next(batches))
            states.append(json.loads(json.dumps(batches.state_dict())))
    return {**found, "rows": rows, "states": states}


SPLITS = [(3, 1), *(pytest.param(*split, marks=pytest.mark.full) for split in ((2, 1), (4, 3)))]


@pytest.mark.parametrize(("size", "harvest"), SPLITS)
def test_batches_are_those_of_one_process(size: int, harvest: int) -> None:
    """From the start, and from where one process stood; each row travels once."""
    cases: list[dict[str, Any]] = [{"n": STEPS, **order} for order in ORDERS]
    with one_thread():
        one = [live_ranks.given(None, **case) for case in cases]
    straight = one[0]
    start = straight["states"][6]
    assert start["offset"] > 0
    one.append({name: straight[name][7:] for name in ("rows", "states")})
    then = {"n": STEPS - 7, "start": start, "sample": 0, **ORDERS[0]}
    found = on_ranks(size, fed, harvest, [*cases, then])
    for number, expected in enumerate(one):
        for each in [rank[number] for rank in found[: size - harvest]]:
            assert each["states"] == expected["states"]
            for x, y in zip(each["rows"], expected["rows"], strict=True):
                assert torch.equal(x, y)
            assert "sample" not in each or torch.equal(each["sample"], expected["sample"])
        sent = sum(rank[number]["sent"] for rank in found[size - harvest :])
        assert sent == sum(x.numel() * x.element_size() for x in expected["rows"])


@pytest.mark.full
def test_a_rank_that_runs_the_model_holds_two_windows_at_most() -> None:
    window = 600
    case: dict[str, Any] = {
        "n": 20,
        "sample": 0,
        "text": documents(300),
        "batch_size": 64,
        "window_rows": window,
    }
    found = on_ranks(3, fed, 2, [case])
    for (each,) in found[1:]:
        assert 0.8 * window < each["most"] <= 2 * (window / 2 + 2 * CONTEXT)


def ahead(group: Any) -> int:
    """How many tokens the model reads for one batch of a window of 60 rows."""
    stream, ran = live_ranks.stream(), [0]

    def count(_module: Any, inputs: Any, _output: Any) -> None:
        ran[0] += inputs[0].shape[:2].numel()

    model: Any = stream._read[0]
    model.transformer.h[1].register_forward_hook(count)
    with stream.spread_over(Team(DeviceMesh.from_group(group, "cpu"), TIMEOUT), ahead=True):
        stream.part()
        job = stream._window._ahead
        assert job is not None
        job[1].result()
    return ran[0]


@pytest.mark.full
def test_the_model_runs_on_the_next_window_while_one_is_handed_out() -> None:
    (ran,) = on_ranks(1, ahead)
    assert ran > 1.5 * 60


def run(group: Any, folder: str | None, harvest: int, options: dict[str, Any]) -> dict[str, Any]:
    runs_model = group.rank() in ParallelConfig(harvest_ranks=harvest).model_ranks(group.size())
    stream = live_ranks.stream(batch_size=runs.SETTINGS["batch_size"]) if runs_model else None
    try:
        return runs.run(group, folder, source=stream, harvest_ranks=harvest, **options)
    except RuntimeError:
        if not (runs_model and options.get("stop_after")):
            raise
        return {}  # those that train are gone


@pytest.mark.full
@pytest.mark.parametrize(("first", "then"), [((3, 1), (3, 2)), ((3, 2), (4, 2))])
def test_a_run_goes_on_under_other_ranks_with_the_same_bits(
    tmp_path: Path, first: tuple[int, int], then: tuple[int, int]
) -> None:
    straight, folder = tmp_path / "straight", str(tmp_path / "run")
    on_ranks(1, run, str(straight), 0, {"blocks": 8})
    on_ranks(first[0], run, folder, first[1], {"blocks": 8, "stop_after": 6})
    found = on_ranks(then[0], run, folder, then[1], {"blocks": 8, "resume": True})
    assert [len(each["lines"]) for each in found[-then[1] :]] == [0] * then[1]
    expected = load_file(straight / "sae" / "sae.safetensors")
    for name, tensor in load_file(tmp_path / "run" / "sae" / "sae.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def refused(group: Any, fault: str) -> str:
    """The error of this rank of three, of which the last two run the model."""
    last = group.rank() == group.size() - 1
    text = documents(39 if last and fault == "text" else 40)
    options: dict[str, Any] = {"epochs": 1} if fault == "end" else {}
    stream: Any = live_ranks.stream(text=text, batch_size=51, **options)
    if last and fault == "nan":
        stream._read[0].transformer.h[1].mlp.c_proj.bias.data[3] = float("nan")
    if fault == "stored":
        stream = runs.activations()
    given: dict[str, Any] = {
        "harvest_ranks": 3 if fault == "all" else 2,
        "lr": 2e-3 if last and fault == "settings" else 1e-3,
        "layout": {"latents": 1, "tokens": 3} if fault == "mesh" else None,
    }
    try:
        runs.run(group, None, source=stream, **given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


NAN = "rank 2: window 0: expected activations that are finite"
REFUSED = {
    "text": ["RankError: rank 1: text up to", *["ValueError: text up to window 0: expected"] * 2],
    "nan": [f"RankError: {NAN}", f"RankError: {NAN}", "NonFiniteError: window 0: expected"],
    "stored": ["RankError: rank 1: activations: expected LiveBatches with harvest_ranks, got Te"],
    "settings": ["ValueError: train: expected the same on all ranks"] * 3,
    "all": ["ValueError: harvest_ranks: expected fewer than the 3 processes"] * 3,
    "mesh": ["ValueError: mesh: expected one dimension with harvest_ranks"] * 3,
    "end": ["ValueError: batches: expected one for each of the 12 steps"],
}


@pytest.mark.full
@pytest.mark.parametrize("fault", REFUSED)
def test_what_befalls_one_rank_is_an_error_of_all(fault: str) -> None:
    found = on_ranks(3, refused, fault)
    for message, words in zip(found, REFUSED[fault], strict=False):
        assert message.startswith(words)
    assert "no error" not in found
