"""A stream's sample: from the whole text, without moving the stream."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from causal import CONTEXT, LAYER, D, documents, gpt2, tokenizer

from sae_kernels.config.row_filter import KEEP_ALL
from sae_kernels.harvest import LiveBatches, stream
from sae_kernels.harvest.chunks import cut_documents
from sae_kernels.harvest.spread import some_rows, spread
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = documents(40)
WINDOW = 60
KINDS = [f"w{i}" for i in range(40)]
VOCABULARY = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *KINDS])}
same = partial(assert_bitwise, "rows")


def live(text: Any = TEXT, **options: Any) -> LiveBatches:
    given = {"window_rows": WINDOW, "model_batch_size": 2, "batch_size": 25, **options}
    return LiveBatches(gpt2(), tokenizer(), text, LAYER, context_length=CONTEXT, **given)


def by_source(text: Any, **options: Any) -> LiveBatches:
    """A stream of the embeddings of text in which each source is one word."""
    model = gpt2(vocab_size=len(VOCABULARY))
    given: dict[str, Any] = {"window_rows": WINDOW, "context_length": CONTEXT, **options}
    return LiveBatches(model, tokenizer(VOCABULARY), text, "wte", 25, **given)


def kinds(rows: torch.Tensor) -> set[int]:
    """The sources of embeddings."""
    table = gpt2(vocab_size=len(VOCABULARY)).transformer.wte.weight.detach()
    distance, nearest = torch.cdist(rows, table).min(1)
    assert float(distance.max()) < 1e-3
    return {int(i) - 2 for i in nearest}


def test_text_sorted_by_source_is_sampled_from_all_sources() -> None:
    """40 sources of 300 tokens each, one after the other; a window holds a fifth of one."""
    text = [" ".join([word] * 10) for word in KINDS for _ in range(30)]
    batches = by_source(text)
    sample = batches.sample(400)
    assert sample.shape == (400, D)
    assert kinds(sample) == set(range(40))
    assert kinds(next(batches)) == {0}


def test_a_sample_is_rows_of_the_stream_and_moves_nothing() -> None:
    """In other batches of the model, which rounds them otherwise."""
    rows = torch.cat(list(live(epochs=1, batch_size=1)))
    for n in (1, 100, 10**6):
        batches, twin = live(), live()
        sample = batches.sample(n)
        assert len(sample) == min(n, len(rows))
        assert float(torch.cdist(sample, rows).min(1).values.max()) < 1e-2
        for _ in range(4):
            same(next(batches), next(twin))
        same(batches.sample(n), sample)
        assert batches.state_dict() == twin.state_dict()
        same(next(batches), next(twin))
        same(live().sample(n), sample)
    assert not torch.equal(live(seed=1).sample(100), live().sample(100))


def test_a_short_text_is_sampled_whole() -> None:
    rows = torch.cat(list(live(window_rows=1000, epochs=1, batch_size=1)))
    sample = live(window_rows=1000).sample(10**6)
    assert sorted(sample.tolist()) == sorted(rows.tolist())


def test_endless_text_is_sampled_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_AHEAD", 600)
    read: list[int] = []

    def endless() -> Iterator[str]:
        for number in itertools.count():
            read.append(number)
            yield " ".join([KINDS[number // 6 % 40]] * 10)

    # 600 tokens hold the first 10 sources, of 6 documents each.
    assert kinds(by_source(endless).sample(200)) == set(range(10))
    assert max(read) < 60 + 64  # documents are tokenized 64 at a time
    # max_tokens ends the text before that.
    assert kinds(by_source(endless, max_tokens=300).sample(200)) == set(range(5))


@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 1000, 12345])
def test_a_spread_covers_its_items_evenly(length: int) -> None:
    budget = 8
    taken = spread(range(length), lambda _: 1, budget, seed=0)
    assert taken == sorted(set(taken))
    if length <= budget:
        assert taken == list(range(length))
    else:
        assert budget // 2 <= len(taken) <= budget
        stretch = 1 << ((length - 1) // budget).bit_length()
        gaps = [b - a for a, b in itertools.pairwise([0, *taken, length])]
        assert max(gaps) <= 2 * stretch + 1


def test_every_item_is_as_likely() -> None:
    """Of 64 items, one of each two."""
    counts = torch.zeros(64)
    for seed in range(2000):
        counts[spread(range(64), lambda _: 1, 32, seed)] += 1
    # A proportion of 2000 trials has a standard deviation of at most 0.0112.
    assert float((counts / 2000 - 0.5).abs().max()) < 5 * 0.0112


def test_some_rows_are_drawn_from_all_chunks() -> None:
    chunks = list(cut_documents(tokenizer(), TEXT, CONTEXT, KEEP_ALL))
    total = sum(chunk.rows for chunk in chunks)
    some = some_rows(chunks, 50, seed=3)
    assert sum(chunk.rows for chunk in some) == 50
    assert all(int(chunk.kept.sum()) == chunk.rows > 0 for chunk in some)
    assert len({chunk.document for chunk in some}) > 15
    every = some_rows(chunks, 10 * total, seed=3)
    assert sum(chunk.rows for chunk in every) == total
