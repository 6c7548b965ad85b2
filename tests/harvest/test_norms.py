"""Rows of enormous norm are left out, by a bound that the first rows fix."""

from __future__ import annotations

import itertools
import json
import math
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from causal import (
    CONTEXT,
    LAYER,
    VOCABULARY,
    WORDS,
    D,
    Replaced,
    documents,
    gpt2,
    sinking,
    tokenizer,
)
from torch import Tensor

from sae_kernels.config.row_filter import KEEP_ALL, RowFilter
from sae_kernels.data import JointRows, ShardDataset
from sae_kernels.harvest import LiveBatches, harvest, spliced_logits, token_batches
from sae_kernels.harvest.language_model import norm_bound
from sae_kernels.harvest.norms import NormBound
from sae_kernels.harvest.splice import clean_logits, replaced_rows
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = documents(40)
WINDOW, BATCH = 60, 25
SINK = RowFilter(max_norm_multiple=10.0)
same = partial(assert_bitwise, "rows")


def live(model: Any = None, text: Any = TEXT, layer: Any = LAYER, **options: Any) -> LiveBatches:
    given = {"batch_size": BATCH, "window_rows": WINDOW, "model_batch_size": 2, **options}
    model = sinking() if model is None else model
    return LiveBatches(model, tokenizer(), text, layer, context_length=CONTEXT, **given)


def rows_of(batches: LiveBatches) -> list[list[float]]:
    return sorted(torch.cat(list(batches)).tolist())


def test_a_row_is_judged_by_the_median_of_the_first_rows() -> None:
    norms = NormBound(3.0, [2])
    first = torch.tensor([[3.0, 4.0], [0.0, 5.0], [-5.0, 0.0], [9.0, 12.0], [9.0, 12.1]])
    assert norms.waits
    assert norms.kept(first).tolist() == [True, True, True, True, False]
    assert norms.bounds == (15.0,)
    assert not norms.waits
    # Alone in its batch, among larger ones, in another dtype: the row decides.
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert norms.kept(torch.tensor([[100.0, 0.0]], dtype=dtype)).tolist() == [False]
        assert norms.kept(torch.tensor([[14.0, 0.0]], dtype=dtype)).tolist() == [True]
    assert norms.bounds == (15.0,)


def test_a_row_goes_from_all_layers_or_none() -> None:
    norms = NormBound(2.0, [1, 2])
    rows = torch.tensor([[1.0, 10, 0], [1, 0, 10], [3, 10, 0], [1, 20, 1], [2, 20, 0]])
    assert norms.kept(rows).tolist() == [True, True, False, False, True]
    assert norms.bounds == (2.0, 20.0)


def test_zeros_do_not_make_everything_enormous() -> None:
    norms = NormBound(10.0, [1])
    assert norms.kept(torch.tensor([[0.0], [0.0], [0.0], [2.0]])).all()
    assert norms.bounds == (20.0,)
    silent = NormBound(10.0, [1])
    assert silent.kept(torch.zeros(3, 1)).all()
    assert silent.recorded() == [None]
    assert silent.kept(torch.full((2, 1), 1e30)).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_hidden(bad: float) -> None:
    norms = NormBound(10.0, [2])
    rows = torch.ones(5, 2)
    rows[2, 1] = bad
    rows[3] = 1e30  # its square overflows fp32, the number itself is finite
    assert norms.kept(rows).tolist() == [True, True, True, False, True]
    assert norms.bounds == (pytest.approx(10 * 2**0.5),)


def test_nothing_is_left_out_where_nothing_is_asked() -> None:
    norms = NormBound(None, [1])
    assert norms.kept(torch.tensor([[1.0], [1e30]])).all()
    assert norms.recorded() is None
    assert not norms.waits


def test_a_stream_leaves_out_the_sinks() -> None:
    """What is left is what a stream without the filter has, but for the rows above the bound."""
    every = list(live(row_filter=KEEP_ALL, epochs=1, batch_size=1))
    batches = live(row_filter=SINK, epochs=1, batch_size=1)
    given = rows_of(batches)
    first = live(row_filter=KEEP_ALL, batch_size=1)
    window = torch.cat(list(itertools.islice(first, _first_window(first))))
    bound = 10 * float(window.norm(dim=1).median())
    assert batches.facts == {**SINK.to_dict(), "drop_tokens": [], "max_norm": [bound]}
    x = torch.cat(every)
    over = x.norm(dim=1) > bound
    sinks = sum(document.split().count("mat") for document in TEXT)
    assert int(over.sum()) == sinks > 20
    assert given == sorted(x[~over].tolist())
    assert batches.left_out == sinks
    # The batch size changes the batches, not the rows.
    assert {tuple(row) for row in rows_of(live(row_filter=SINK, epochs=1))} <= set(
        map(tuple, given)
    )


def _first_window(batches: LiveBatches) -> int:
    chunks = batches._text.window(0)
    assert chunks is not None
    return sum(chunk.rows for chunk in chunks)


def test_several_layers_stay_paired() -> None:
    joint = live(layer=["h.0", "h.2"], row_filter=SINK, epochs=1, batch_size=1)
    x = torch.cat(list(joint))
    plain = torch.cat(list(live(layer=["h.0", "h.2"], row_filter=KEEP_ALL, epochs=1, batch_size=1)))
    low, high = joint.facts["max_norm"]
    over = (plain[:, :D].norm(dim=1) > low) | (plain[:, D:].norm(dim=1) > high)
    assert 0 < int(over.sum()) == joint.left_out
    assert sorted(x.tolist()) == sorted(plain[~over].tolist())


@pytest.mark.parametrize("batch_size", [7, 130])
def test_a_resumed_stream_goes_on_with_the_same_rows(batch_size: int) -> None:
    """At every position: the same rows, count and bound, with the model on one window alone."""
    model = sinking()
    straight = live(model, batch_size=batch_size)
    states = [json.loads(json.dumps(straight.state_dict()))]
    batches: list[Tensor] = []
    for x in itertools.islice(straight, 1000 // batch_size):
        batches.append(x)
        states.append(json.loads(json.dumps(straight.state_dict())))
    assert states[-1]["epoch"] > 0
    assert states[-1]["left_out"] > states[1]["left_out"] >= 0
    ran: list[int] = []
    model.transformer.h[1].register_forward_hook(lambda *args: ran.append(1))
    for position, state in enumerate(states):
        resumed = live(model, batch_size=batch_size)
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        ran.clear()
        for x in batches[position : position + 1]:
            same(next(resumed), x)
            assert resumed.state_dict() == states[position + 1]
    assert resumed.facts == straight.facts


@pytest.mark.parametrize("damage", [[], [1.0, 2.0], [-1.0], [True], ["10"], 3.0, "x"])
def test_a_damaged_bound_is_refused(damage: object) -> None:
    batches = live()
    next(batches)
    state = batches.state_dict() | {"max_norm": damage}
    with pytest.raises(ValueError, match="max_norm: expected a list of a positive number for"):
        live().load_state_dict(state)


def test_a_sample_has_no_sinks_and_finds_the_streams_own_bound() -> None:
    batches, twin = live(), live()
    sample = batches.sample(10**6)
    (bound,) = batches.facts["max_norm"]
    assert float(sample.norm(dim=1).max()) <= bound
    words = sum(len(document.split()) for document in TEXT)
    assert len(sample) == words - sum(document.split().count("mat") for document in TEXT)
    for _ in range(10):
        same(next(batches), next(twin))
    assert batches.state_dict() == twin.state_dict()


def test_a_model_without_sinks_loses_nothing() -> None:
    assert WORDS[5] == "mat"
    assert rows_of(live(gpt2(), epochs=1)) == rows_of(live(gpt2(), epochs=1, row_filter=KEEP_ALL))


def test_stored_rows_are_those_of_the_stream(tmp_path: Path) -> None:
    """The first window of both is the whole text, so that they have one bound."""
    options: dict[str, Any] = {"batch_size": 2, "context_length": CONTEXT}
    n = harvest(sinking(), tokenizer(), TEXT, LAYER, tmp_path, **options)
    data = ShardDataset(tmp_path)
    batches = live(row_filter=SINK, window_rows=65536, epochs=1, batch_size=1)
    rows = rows_of(batches)
    assert sorted(data.rows(0, n).activations.tolist()) == rows
    assert data.facts == batches.facts
    assert data.metadata["max_norm"] == batches.facts["max_norm"][0]
    assert data.metadata["rows_above_max_norm"] == batches.left_out > 0
    tokens = data.rows(0, n).tokens
    assert tokens is not None
    assert VOCABULARY["mat"] not in tokens.tolist()


def test_what_is_stored_does_not_depend_on_shards_or_batches(tmp_path: Path) -> None:
    stored = []
    for i, rows_per_shard in enumerate((40, 65536)):
        options: dict[str, Any] = {"context_length": CONTEXT, "batch_size": 3 * i + 1}
        folder = tmp_path / str(i)
        n = harvest(
            sinking(), tokenizer(), TEXT, LAYER, folder, rows_per_shard=rows_per_shard, **options
        )
        tokens = ShardDataset(folder).rows(0, n).tokens
        assert tokens is not None
        stored.append(tokens)
    same(*stored)


def test_facts_of_layers_side_by_side(tmp_path: Path) -> None:
    folders = {}
    for layer in ("h.0", "h.1"):
        folders[layer] = tmp_path / layer
        harvest(gpt2(), tokenizer(), TEXT, layer, folders[layer], context_length=CONTEXT)
    a, b = (ShardDataset(folder) for folder in folders.values())
    assert JointRows([a, b]).facts == {
        **RowFilter().to_dict(),
        "drop_tokens": [],
        "max_norm": [a.metadata["max_norm"], b.metadata["max_norm"]],
    }
    assert JointRows([a, torch.zeros(a.n_tokens, 2)]).facts == {}
    other = tmp_path / "other"
    harvest(gpt2(), tokenizer(), TEXT, "h.0", other, context_length=CONTEXT, row_filter=KEEP_ALL)
    assert ShardDataset(other).facts["max_norm"] is None
    assert JointRows([a, ShardDataset(other)]).facts == {}


def test_a_splice_keeps_what_is_above_the_bound() -> None:
    """By hand: the reconstruction where the norm is small, the model's own elsewhere."""
    model = sinking()
    batches = list(token_batches(model, tokenizer(), TEXT, context_length=CONTEXT, batch_size=4))
    bound = norm_bound(model, batches, LAYER, 10.0)
    assert bound is not None
    seen: list[Tensor] = []

    def bent(x: Tensor) -> Tensor:
        seen.append(x)
        return 0.5 * x.sin()

    def by_hand(x: Tensor) -> Tensor:
        return torch.where(x.norm(dim=-1, keepdim=True) > bound, x, 0.5 * x.sin())

    other = sinking()
    other.transformer.h[1] = Replaced(other.transformer.h[1], by_hand)
    for batch in batches:
        with torch.no_grad():
            got = spliced_logits(model, batch, LAYER, bent, max_norm=bound)
            want = clean_logits(other, batch)
        mask = batch.attention_mask
        torch.testing.assert_close(got[mask], want[mask])
    assert float(torch.cat(seen).norm(dim=1).max()) <= bound
    assert norm_bound(model, batches, LAYER, None) is None


def test_the_tokens_that_are_replaced_are_those_that_are_stored() -> None:
    row_filter = RowFilter(drop_first=2, drop_tokens=(VOCABULARY["cat"],), max_norm_multiple=None)
    model = gpt2()
    options: dict[str, Any] = {"context_length": CONTEXT}
    batches = list(
        token_batches(model, tokenizer(), TEXT, row_filter=row_filter, batch_size=2, **options)
    )
    replaced = torch.cat(list(replaced_rows(model, batches, LAYER)))
    stored = torch.cat(list(live(model, row_filter=row_filter, epochs=1, batch_size=1)))
    assert len(replaced) == len(stored) > 100
    assert float(torch.cdist(replaced, stored).min(1).values.max()) < 1e-2
    whole = list(token_batches(model, tokenizer(), TEXT, batch_size=2, **options))
    for a, b in zip(batches, whole, strict=True):
        same(a.input_ids, b.input_ids)
        same(a.attention_mask, b.attention_mask)
        same(b.replaced, b.attention_mask)
        cats = a.input_ids == VOCABULARY["cat"]
        same(a.replaced, b.keeping_first(2).replaced & ~cats)
    # The limit counts the tokens that the model reads.
    some = token_batches(model, tokenizer(), TEXT, row_filter=row_filter, max_tokens=37, **options)
    assert sum(int(batch.attention_mask.sum()) for batch in some) == 37
