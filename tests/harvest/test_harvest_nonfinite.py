"""Rows of a harvest that are not finite: it stops at them, or leaves them out alike."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config.row_filter import KEEP_ALL
from sae_kernels.data import ShardDataset
from sae_kernels.errors import NonFiniteError
from sae_kernels.harvest.progress import HarvestProgress
from tests.harvest.causal import gpt2, tokenizer
from tests.harvest.stopped import LAYERS, TEXT, begin, contents, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
pytestmark = pytest.mark.usefixtures("one_thread")


@contextmanager
def spoilt(model: Any, layer: int, word: str, value: float) -> Iterator[Any]:
    """A model whose block puts out a value at every token of a word."""
    seen: list[torch.Tensor] = []
    number = tokenizer().convert_tokens_to_ids(word)

    def note(_module: Any, arguments: Any) -> None:
        seen[:] = [arguments[0]]

    def spoil(_module: Any, _arguments: Any, output: Any) -> Any:
        x = output[0] if isinstance(output, tuple) else output
        at = (seen[0] == number)[..., None] & (torch.arange(x.shape[-1]) == 3)
        x = x.masked_fill(at, value)
        return (x, *output[1:]) if isinstance(output, tuple) else x

    handles = [
        model.transformer.wte.register_forward_pre_hook(note),
        model.transformer.h[layer].register_forward_hook(spoil),
    ]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


RARE = ["dog cat" if i == 31 else text.replace("dog", "cat") for i, text in enumerate(TEXT)]


def test_a_row_that_is_not_finite_stops_and_loses_nothing(tmp_path: Path) -> None:
    with spoilt(gpt2(), 1, "dog", torch.nan) as model:
        with pytest.raises(
            NonFiniteError, match=r"h\.1, document 31: .*got nan; look for"
        ) as caught:
            begin(tmp_path, RARE, model=model)
        assert "--resume" in str(caught.value)
        assert "--on-nonfinite skip" in str(caught.value)
        stood = HarvestProgress.read(tmp_path)
        assert stood is not None
        assert stood.stored >= 300
        n = begin(tmp_path, RARE, model=model, resume=True, on_nonfinite="skip")
        begin(tmp_path / "straight", RARE, model=model, on_nonfinite="skip")
    assert contents(tmp_path / "straight").items() <= contents(tmp_path).items()
    data = ShardDataset(tmp_path)
    assert data.metadata["nonfinite_rows"] == 1
    begin(tmp_path / "sound", RARE)
    sound = ShardDataset(tmp_path / "sound")
    rows, whole = data.rows(0, n), sound.rows(0, n + 1)
    dog = whole.tokens != tokenizer().convert_tokens_to_ids("dog")
    assert sound.metadata["nonfinite_rows"] == 0
    for name in ("activations", "tokens", "documents"):
        assert torch.equal(getattr(rows, name), getattr(whole, name)[dog])


def test_stopped_between_rows_that_are_left_out(tmp_path: Path) -> None:
    """The rows of a window that are left out are none of those in finished shards."""
    options = {"on_nonfinite": "skip", "resume": True}
    with spoilt(gpt2(), 1, "cat", torch.inf) as model:
        begin(tmp_path / "straight", model=model, **options)
        for n in (120, 240, 260, 400):
            until(tmp_path / "stopped", n, model=model, **options)
        begin(tmp_path / "stopped", model=model, **options)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")
    assert ShardDataset(tmp_path / "stopped").metadata["nonfinite_rows"] > 20


def test_an_overflow_is_named_as_one(tmp_path: Path) -> None:
    with spoilt(gpt2(), 1, "dog", 7e4) as model:
        options: dict[str, Any] = {"model": model, "dtype": torch.float16}
        with pytest.raises(NonFiniteError, match=r"got 70000.0; torch\.float16 ends at 65504"):
            begin(tmp_path / "16", RARE, **options)
        assert begin(tmp_path / "skip", RARE, on_nonfinite="skip", **options) > 400
        options = {"model": model, "dtype": torch.bfloat16, "row_filter": KEEP_ALL}
        n = begin(tmp_path / "b16", RARE, **options)
    assert ShardDataset(tmp_path / "b16").rows(0, n).activations.amax() == 70144  # 7e4 in bfloat16


def test_nothing_but_rows_that_are_left_out(tmp_path: Path) -> None:
    with (
        spoilt(gpt2(), 1, "dog", torch.nan) as model,
        pytest.raises(NonFiniteError, match="none of the 3 rows is finite"),
    ):
        begin(tmp_path, ["dog dog", "dog"], model=model, on_nonfinite="skip")
    with pytest.raises(ValueError, match="on_nonfinite: expected stop or skip, got 'ignore'"):
        begin(tmp_path, on_nonfinite="ignore")


def test_what_one_layer_leaves_out_all_do(tmp_path: Path) -> None:
    with spoilt(gpt2(), 1, "dog", torch.inf) as model:
        with pytest.raises(NonFiniteError, match=r"h\.1, document 31"):
            begin(tmp_path, RARE, layer=LAYERS, model=model)
        n = begin(tmp_path, RARE, layer=LAYERS, model=model, on_nonfinite="skip", resume=True)
    rows = [ShardDataset(tmp_path / layer).rows(0, n) for layer in LAYERS]
    for name in ("tokens", "documents"):
        assert torch.equal(*(getattr(each, name) for each in rows))
    whole = begin(tmp_path / "sound", RARE, layer="h.0")
    assert whole == n + 1
