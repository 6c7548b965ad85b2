"""Batches straight from a model: which rows come, in which order, and what they cost."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from causal import CONTEXT, LAYER, D, documents, gpt2, tokenizer
from torch import Tensor, nn

from sae_kernels.config.row_filter import RowFilter
from sae_kernels.data.shards import ShardDataset
from sae_kernels.errors import ModelError, NonFiniteError
from sae_kernels.harvest import LiveBatches, collect, harvest
from sae_kernels.harvest.chunks import cut_documents, windows
from sae_kernels.harvest.model import layer_outputs
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from collections.abc import Iterator

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = documents(40)
WINDOW, BATCH = 60, 25
same = partial(assert_bitwise, "rows")
SMALL: dict[str, Any] = {"window_rows": WINDOW, "model_batch_size": 2, "context_length": CONTEXT}


@pytest.fixture(scope="module")
def model() -> Any:
    return gpt2()


def live(model: Any, text: Any = TEXT, layer: Any = LAYER, **options: Any) -> LiveBatches:
    given = {"batch_size": BATCH, **SMALL, **options}
    return LiveBatches(model, tokenizer(), text, layer, **given)


def harvested(model: Any, layer: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """All rows in the order of the text, the model's batches those of the windows here."""
    monkeypatch.setattr(collect, "_WINDOW_ROWS", WINDOW)
    options: dict[str, Any] = {"batch_size": 2, "context_length": CONTEXT}
    n = harvest(model, tokenizer(), TEXT, layer, folder, **options)
    return ShardDataset(folder).rows(0, n).activations.clone()


def ordered(rows: Tensor) -> Tensor:
    """In an order that depends on the rows alone."""
    return torch.tensor(sorted(rows.tolist()))


def test_an_epoch_is_what_harvest_stores_but_for_the_last_rows(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = harvested(model, LAYER, tmp_path, monkeypatch)
    assert len(stored) % BATCH
    for batch_size in (1, BATCH, 2 * WINDOW + 1):
        batches = list(live(model, batch_size=batch_size, epochs=1))
        assert len(batches) == len(stored) // batch_size
        assert {tuple(x.shape) for x in batches} == {(batch_size, D)}
        given = {tuple(row) for row in torch.cat(batches).tolist()}
        assert given <= {tuple(row) for row in stored.tolist()}
    same(ordered(torch.cat(list(live(model, batch_size=1, epochs=1)))), ordered(stored))


def test_rows_are_shuffled_inside_their_window_and_anew_each_epoch(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = harvested(model, LAYER, tmp_path, monkeypatch)
    n = len(stored)
    rows = torch.cat(list(itertools.islice(live(model, batch_size=1), 2 * n)))
    first, second = rows[:n], rows[n:]
    other = torch.cat(list(live(model, batch_size=1, epochs=1, seed=1)))
    for a, b in itertools.combinations((stored, first, second, other), 2):
        assert not torch.equal(a, b)
        same(ordered(a), ordered(b))
    chunks = cut_documents(tokenizer(), TEXT, CONTEXT, RowFilter())
    start = 0
    for window in windows((chunk for chunk in chunks if chunk.rows), WINDOW):
        stop = start + sum(chunk.rows for chunk in window)
        same(ordered(first[start:stop]), ordered(stored[start:stop]))
        same(ordered(second[start:stop]), ordered(stored[start:stop]))
        start = stop
    assert start == n


def test_batches_can_be_trained_on(model: Any) -> None:
    x = next(live(model))
    assert not x.is_inference()
    (x.clone().requires_grad_() @ torch.randn(D, 3)).sum().backward()
    assert next(live(model, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert live(model).d_in == D
    y = next(live(model, autocast=torch.bfloat16))
    assert y.dtype == torch.float32
    assert 0 < (y - x).norm() < 0.03 * x.norm()


def test_layers_lie_side_by_side(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = ["h.2", "h.0", "h.0.ln_2"]
    stored = [harvested(model, name, tmp_path / name, monkeypatch) for name in layers]
    joint = live(model, layer=layers, batch_size=1, epochs=1)
    assert (joint.widths, joint.d_in) == ((D, D, D), 3 * D)
    same(ordered(torch.cat(list(joint))), ordered(torch.cat(stored, dim=1)))


def test_a_layer_keeps_its_output_where_a_later_one_writes_on_it() -> None:
    module = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True), nn.Identity(), nn.Identity())
    ran: list[str] = []
    module[3].register_forward_hook(lambda *_: ran.append("3"))
    first, second = layer_outputs(module, [module[0], module[2]], input=torch.tensor([-1.0, 1.0]))
    assert first.tolist() == [-1, 1]
    assert second.tolist() == [0, 1]
    assert not ran


def test_a_text_of_one_window_runs_the_model_once(model: Any) -> None:
    runs: list[int] = []
    handle = model.transformer.h[0].register_forward_hook(lambda *_: runs.append(1))
    batches = live(model, window_rows=1000)
    next(batches)
    once = len(runs)
    for _ in range(60):
        next(batches)
    handle.remove()
    assert once > 1
    assert len(runs) == once


def test_a_text_without_end_has_epochs_of_max_tokens(model: Any) -> None:
    def endless() -> Iterator[str]:
        return itertools.cycle(TEXT)

    assert len(list(live(model, endless, max_tokens=3 * BATCH, epochs=2))) == 6


def test_iterating_again_after_the_end_or_a_close(model: Any) -> None:
    batches, twin = live(model, epochs=1), live(model, epochs=1)
    batches.sample(3)
    batches.close()
    first = next(batches)
    same(first, next(twin))
    batches.close()
    same(next(batches), next(twin))
    rest = list(batches)
    assert len(rest) == len(list(twin))
    assert list(batches) == []


def test_an_interrupted_batch_comes_whole_the_next_time(model: Any) -> None:
    interrupt = [False]

    def text() -> Iterator[str]:
        for number, document in enumerate(TEXT * 4):
            if interrupt[0] and number > 64:
                raise KeyboardInterrupt
            yield document

    batches, twin = live(model, text, epochs=1), live(model, TEXT * 4, epochs=1)
    interrupt[0] = True
    got = []
    with pytest.raises(KeyboardInterrupt):
        got.extend(iter(batches.__next__, None))
    interrupt[0] = False
    for x, y in zip(batches, list(twin)[batches.position :], strict=True):
        same(x, y)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused_and_the_place_stays(value: float) -> None:
    model = gpt2()
    batches, twin = live(model), live(gpt2())
    same(next(batches), next(twin))
    bias = model.transformer.h[1].mlp.c_proj.bias
    before = bias.detach().clone()
    bias.data[3] = value
    with pytest.raises(NonFiniteError, match=r"window 1: .* look for NaN in the model"):
        list(batches)
    with pytest.raises(NonFiniteError):
        batches.sample(2 * WINDOW)
    bias.data.copy_(before)
    list(itertools.islice(twin, batches.position - 1))
    same(next(batches), next(twin))


def test_overflow_of_a_narrow_dtype_is_refused() -> None:
    model = gpt2()
    model.transformer.h[1].mlp.c_proj.bias.data[3] = 1e6
    next(live(model))
    with pytest.raises(NonFiniteError, match=r"finite in torch\.float16"):
        next(live(model, dtype=torch.float16))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"text": iter(TEXT)}, TypeError, "gone through once only"),
        (
            {"text": partial(lambda source: source, iter(TEXT))},
            TypeError,
            "a fresh iterator at each call",
        ),
        ({"text": "the cat"}, TypeError, "put it in a list"),
        ({"layer": "h.9"}, ModelError, r"nearest: h\."),
        ({"layer": [LAYER, "wte.9"]}, ModelError, "wte"),
        ({"layer": []}, ValueError, "at least one module"),
        ({"layer": ["h.0", "h"]}, ModelError, "runs and puts out a tensor"),
        ({"batch_size": 0}, ValueError, "batch_size of at least 1"),
        ({"epochs": 0}, ValueError, "epochs of at least 1"),
        ({"window_rows": CONTEXT - 1}, ValueError, f"window_rows of at least {CONTEXT}"),
        ({"context_length": 21}, ValueError, "from 1 to 20"),
        ({"model_batch_size": 0}, ValueError, "batch_size"),
        ({"max_tokens": 0}, ValueError, "max_tokens"),
        ({"dtype": torch.int64}, ValueError, "floating point dtype"),
    ],
)
def test_refusals(
    model: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        live(model, **options)


@pytest.mark.parametrize("text", [[], ["", " "]])
def test_an_empty_text_is_refused(model: Any, text: list[str]) -> None:
    with pytest.raises(ValueError, match="at least one token, got none"):
        next(live(model, text))
    with pytest.raises(ValueError, match="at least one token, got none"):
        live(model, text).sample(3)


def test_a_text_of_less_than_a_batch_is_refused(model: Any) -> None:
    with pytest.raises(ValueError, match="one batch of 25 rows, got 3 rows in all"):
        next(live(model, ["the cat sat"]))
    with pytest.raises(ValueError, match="n of at least 1"):
        live(model).sample(0)


_MEASURED = """
import itertools, json, sys
sys.path.insert(0, sys.argv[1])
from causal import gpt2, tokenizer, WORDS
from sae_kernels.harvest import LiveBatches

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

text = lambda: itertools.repeat(" ".join(WORDS * 2)[:90])
model = gpt2(n_embd=256, n_layer=1)
options = dict(model_batch_size=16, context_length=20)
next(LiveBatches(model, tokenizer(), text, "h.0", 1024, window_rows=1024, **options))
before = resident()
batches = LiveBatches(model, tokenizer(), text, "h.0", 1024, window_rows=16384, **options)
after = []
for _ in range(4):
    for _ in range(16):
        next(batches)
    after.append(resident())
print(json.dumps([16384 * 256 * 4, before, *after]))
"""


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_stays_within_two_windows() -> None:
    command = [sys.executable, "-c", _MEASURED, str(Path(__file__).parent)]
    # Freed blocks go back at once: what is resident is what is held.
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "262144", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True, timeout=300)
    window, before, *after = json.loads(done.stdout)
    # One window is held; batches, tokens and the allocator's slack are less than another.
    assert max(after) - before < 2 * window
    # Three windows later nothing has been kept of them.
    assert max(after) - after[0] < window / 4
