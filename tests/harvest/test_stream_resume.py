"""A stream that goes on from a saved state gives what the first one would have given."""

from __future__ import annotations

import itertools
import json
from functools import partial
from typing import Any

import pytest
import torch
from causal import CONTEXT, LAYER, documents, gpt2, tokenizer

from sae_kernels.config.row_filter import RowFilter
from sae_kernels.harvest import LiveBatches
from sae_kernels.testing import assert_bitwise

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = documents(40)
BATCH = 25
same = partial(assert_bitwise, "rows")
SMALL: dict[str, Any] = {"window_rows": 60, "model_batch_size": 2, "context_length": CONTEXT}


def live(text: Any = TEXT, model: Any = None, **options: Any) -> LiveBatches:
    given = {"layer": LAYER, "batch_size": BATCH, **SMALL, **options}
    return LiveBatches(gpt2() if model is None else model, tokenizer(), text, **given)


def saved(batches: LiveBatches) -> dict[str, Any]:
    """The state as it comes back from a file."""
    state: dict[str, Any] = json.loads(json.dumps(batches.state_dict()))
    return state


def per_epoch(**options: Any) -> int:
    return len(list(live(epochs=1, **options)))


@pytest.mark.sampled(1)
@pytest.mark.parametrize("batch_size", [7, BATCH, 130])
def test_resumed_is_straight_at_every_position(batch_size: int) -> None:
    """Batches inside a window, over the edge of one, over several, and over epochs."""
    steps = 2 * per_epoch(batch_size=batch_size) + 3
    straight = live(batch_size=batch_size)
    states, batches = [saved(straight)], []
    for x in itertools.islice(straight, steps):
        batches.append(x)
        states.append(saved(straight))
    assert {state["epoch"] for state in states} == {0, 1, 2}
    model = gpt2()
    for position, state in enumerate(states):
        resumed = live(model=model, batch_size=batch_size)
        resumed.load_state_dict(state)
        assert saved(resumed) == state
        for x, y in zip(batches[position : position + 3], resumed, strict=False):
            same(y, x)
        assert resumed.position == min(position + 3, steps)


def test_resume_runs_the_model_on_one_window_alone() -> None:
    straight = live()
    list(itertools.islice(straight, per_epoch() - 1))
    model = gpt2()
    resumed = live(model=model)
    tokens: list[int] = []
    model.transformer.h[1].register_forward_hook(lambda *args: tokens.append(args[2][0].shape[0]))
    resumed.load_state_dict(saved(straight))
    assert not tokens
    assert straight.state_dict()["window"] > 5
    same(next(resumed), next(straight))
    chunks = sum(tokens)
    assert chunks <= 2 * 60


def test_a_used_stream_can_go_back_and_forth() -> None:
    batches = live()
    start = saved(batches)
    got = list(itertools.islice(batches, 6))
    later = saved(batches)
    seventh = next(batches)
    batches.load_state_dict(start)
    for x in got:
        same(next(batches), x)
    batches.load_state_dict(start)
    batches.load_state_dict(later)
    same(next(batches), seventh)


def test_the_end_is_kept_and_more_epochs_go_on() -> None:
    ended = live(epochs=1)
    n = len(list(ended))
    state = saved(ended)
    resumed = live(epochs=1)
    resumed.load_state_dict(state)
    assert list(resumed) == []
    longer, straight = live(epochs=2), live(epochs=2)
    longer.load_state_dict(state)
    for x, y in zip(longer, list(straight)[n:], strict=True):
        same(x, y)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"batch_size": 9}, "batch_size was 25 and is 9"),
        ({"window_rows": 61}, "window_rows was 60 and is 61"),
        ({"model_batch_size": 3}, "model_batch_size was 2 and is 3"),
        ({"context_length": 11}, "context_length was 10 and is 11"),
        ({"layer": "h.0"}, r"layer was \['h.1'\] and is \['h.0'\]"),
        ({"dtype": torch.float64}, r"dtype was 'torch\.float32' and is 'torch\.float64'"),
        ({"autocast": torch.bfloat16}, "autocast was None and is 'torch.bfloat16'"),
        (
            {"row_filter": RowFilter(drop_special_tokens=False)},
            "drop_special_tokens was True and is False",
        ),
        ({"max_tokens": 500}, "max_tokens was None and is 500"),
        ({"text": ["a dog", *TEXT[1:]]}, "this one differs within its first"),
        ({"text": TEXT[:2]}, "this one differs within its first"),
    ],
)
def test_another_stream_is_refused_by_what_differs(changes: dict[str, Any], message: str) -> None:
    first = live()
    list(itertools.islice(first, 5))
    state = saved(first)
    other = live(**changes)
    before = saved(other)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(state)
    assert saved(other) == before


def test_a_model_that_was_trained_on_is_refused() -> None:
    model = gpt2()
    model.transformer.h[0].ln_1.weight.data[0] += 1e-3
    with pytest.raises(ValueError, match="weights was"):
        live(model=model).load_state_dict(live().state_dict())


def test_text_that_is_new_after_the_place_is_welcome() -> None:
    first, longer = live(TEXT[:30]), live(TEXT)
    expected = list(itertools.islice(live(TEXT), 8))
    list(itertools.islice(first, 5))
    longer.load_state_dict(saved(first))
    for x in expected[5:]:
        same(next(longer), x)


@pytest.mark.parametrize(
    "damage",
    [
        {"position": -1},
        {"offset": 1.5},
        {"epoch": True},
        {"window": None},
        {"text": 3},
        {"settings": []},
        {"offset": 10**9},
        {"window": 10**15},
    ],
)
def test_a_damaged_state_is_refused(damage: dict[str, Any]) -> None:
    batches = live()
    next(batches)
    state = saved(batches)
    with pytest.raises(ValueError, match=r"expected the (state of a LiveBatches|text that)"):
        live().load_state_dict(state | damage)
    with pytest.raises(ValueError, match="got nothing"):
        live().load_state_dict({})
