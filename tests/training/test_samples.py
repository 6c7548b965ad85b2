"""What a training estimates from a sample, what it warns of, and what it records of the rows."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch

import sae_kernels as sk
from sae_kernels.config import TrainConfig
from sae_kernels.config.row_filter import KEEP_ALL, RowFilter
from sae_kernels.data import JointRows, ShardDataset, ShardWriter
from sae_kernels.nn import TopKConfig
from sae_kernels.training import prepare
from tests.harvest.causal import sinking, tokenizer

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

D, F = 8, 32
SETTINGS: dict[str, Any] = {"steps": 3, "batch_size": 32}


def _rows(n: int = 2048, every: int | None = None) -> torch.Tensor:
    """Rows of which one of ``every`` has 100 times the norm."""
    x = torch.randn(n, D, generator=torch.Generator().manual_seed(0))
    if every:
        x[::every] *= 100
    return x


def _stored(folder: Path, x: torch.Tensor, **metadata: Any) -> ShardDataset:
    with ShardWriter(folder, x.shape[1], metadata=metadata, rows_per_shard=5000) as writer:
        writer.write(x)
    return ShardDataset(folder)


@pytest.mark.parametrize("stored", [False, True])
def test_b_dec_is_estimated_on_all_sources(tmp_path: Path, stored: bool) -> None:
    """40 sources, one after the other, each with its own coordinate.

    A window of shuffled rows has 16 blocks of 4096: the mean of its rows lacks most of these.
    """
    kinds, each = 40, 6000
    x = torch.zeros(kinds * each, kinds)
    x[torch.arange(len(x)), torch.arange(len(x)) // each] = 1.0
    config = TrainConfig(init_b_dec="mean", normalize_activations="none", device="cpu")
    source = _stored(tmp_path, x) if stored else x
    sae = prepare(source, TopKConfig(kinds, 2 * kinds, 4), config)
    b_dec = sae.b_dec.detach()
    # 16384 rows of 40 kinds: 410 of each, in runs of 16, a few more or less.
    assert float(b_dec.min()) > 0.8 / kinds
    assert float(b_dec.max()) < 1.2 / kinds


def _tensor(x: torch.Tensor, _: Path) -> Any:
    return x


def _shards(x: torch.Tensor, folder: Path) -> Any:
    return _stored(folder, x)


def _batches(x: torch.Tensor, _: Path) -> Any:
    return list(x.split(32))


@pytest.mark.parametrize("source", [_tensor, _shards, _batches])
def test_a_warning_if_few_rows_carry_most(
    source: Callable[[torch.Tensor, Path], Any], tmp_path: Path
) -> None:
    """16 of 2048 rows have 100 times the norm: nearly half of them carry half of the variance."""
    with pytest.warns(UserWarning, match=r"of 2,048 sampled rows \(0\.\d\d %\) carry half of the "):
        sk.train(TopKConfig(D, F, 4), source(_rows(every=128), tmp_path), **SETTINGS)


def test_a_warning_if_few_rows_of_a_model_carry_most() -> None:
    pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
    from sae_kernels.harvest import LiveBatches

    text = ["the cat sat on a dog and ran far away from one " * 10, "mat"] * 20
    for row_filter, warns in ((KEEP_ALL, True), (RowFilter(), False)):
        batches = LiveBatches(
            sinking(), tokenizer(), text, "h.1", 32, context_length=10, row_filter=row_filter
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            sk.train(TopKConfig(batches.d_in, F, 4), batches, **SETTINGS)
        assert [each.category for each in caught] == [UserWarning] * warns


def test_the_warning_says_what_helps_and_comes_once() -> None:
    config = TrainConfig(**SETTINGS)
    runs = {f"k{k}": (TopKConfig(D, F, k), config) for k in (2, 4)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sk.train_many(runs, _rows(every=128))
    (warning,) = caught
    message = str(warning.message)
    for flag in ("--max-norm-multiple", "--drop-first", "--drop-tokens", "row_filter"):
        assert flag in message


@pytest.mark.parametrize("rows", [_rows(), _rows(64), _rows(every=20), torch.ones(2048, D)])
def test_no_warning_of_ordinary_rows(rows: torch.Tensor) -> None:
    """In the third a twentieth of the rows carries most: no few that could be left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        prepare(rows, TopKConfig(D, F, 4), TrainConfig(**SETTINGS))


def test_what_was_left_out_of_stored_rows_is_in_the_metadata(tmp_path: Path) -> None:
    facts = RowFilter(drop_first=1).to_dict() | {"drop_tokens": []}
    a = _stored(tmp_path / "a", _rows(), **facts, max_norm=20.0, layer="h.1")
    b = _stored(tmp_path / "b", _rows(), **facts, max_norm=30.0, layer="h.2")
    sae = sk.train(TopKConfig(D, F, 4), a, folder=tmp_path / "run", **SETTINGS).sae
    assert sae.metadata["activations"].items() >= {**facts, "max_norm": [20.0]}.items()
    saved = sk.SparseAutoencoder.from_pretrained(tmp_path / "run" / "sae")
    assert saved.metadata["activations"] == sae.metadata["activations"]
    joint = sk.train(TopKConfig(D, F, 4, n_layers=2), JointRows([a, b]), **SETTINGS).sae
    assert joint.metadata["activations"].items() >= {**facts, "max_norm": [20.0, 30.0]}.items()
    unknown = sk.train(TopKConfig(D, F, 4), _rows(), **SETTINGS).sae.metadata
    assert "max_norm" not in unknown.get("activations", {})


def test_an_index_with_a_filter_that_is_none_is_named(tmp_path: Path) -> None:
    data = _stored(tmp_path, _rows(), drop_first=-3)
    with pytest.raises(sk.errors.DataError, match=r"index\.json: drop_first: expected an integer"):
        sk.train(TopKConfig(D, F, 4), data, **SETTINGS)
