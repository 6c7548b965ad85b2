"""A harvest of several layers at once: what each would be alone, however often it stops."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config.row_filter import KEEP_ALL
from sae_kernels.data import JointRows, ShardDataset
from sae_kernels.errors import DataError
from sae_kernels.io.files import publish
from tests.harvest.causal import gpt2, sinking
from tests.harvest.stopped import LAYERS, begin, contents, counted, until
from tests.training.same_runs import Stop

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
pytestmark = pytest.mark.usefixtures("one_thread")


def test_several_layers_are_each_what_it_would_be_alone(tmp_path: Path) -> None:
    model = gpt2()
    computed = counted(model)
    n = begin(tmp_path / "all", layer=LAYERS, model=model)
    both = list(computed)
    computed.clear()
    for layer in LAYERS:
        begin(tmp_path / layer, layer=layer)
        assert contents(tmp_path / "all" / layer) == contents(tmp_path / layer)
    begin(tmp_path / "one", layer=LAYERS[:1], model=model)
    assert contents(tmp_path / "one" / "h.0") == contents(tmp_path / "h.0")
    assert computed == both  # the model ran as often for two layers as for one
    with pytest.raises(DataError, match=r"it holds data sets, name one of them: h\.0, h\.1"):
        ShardDataset(tmp_path / "all")
    joint = JointRows([ShardDataset(tmp_path / "all" / layer) for layer in LAYERS])
    assert joint.rows(0, n).activations.shape == (n, 32)


def test_several_layers_go_on_together(tmp_path: Path) -> None:
    begin(tmp_path / "straight", layer=LAYERS)
    for n in (130, 330):
        until(tmp_path / "stopped", n, layer=LAYERS, resume=True)
    stopped = tmp_path / "stopped"
    (stopped / "h.1" / ".shard_00004.safetensors.partial-elsewhere-1").touch()
    n = begin(stopped, layer=LAYERS, resume=True)
    (stopped / "h.1" / ".shard_00004.safetensors.partial-elsewhere-1").unlink()
    assert contents(stopped) == contents(tmp_path / "straight")
    assert begin(stopped, layer=LAYERS, resume=True) == n
    (stopped / "h.0" / "index.json").unlink()  # nothing says whose the other one is
    with pytest.raises(DataError, match="holds a data set already"):
        begin(stopped, layer=LAYERS, resume=True)
    with pytest.raises(ValueError, match="expected layers that differ"):
        begin(tmp_path / "new", layer=["h.0", "h.0"])


@pytest.mark.parametrize("rows", [100, 1000])
def test_several_may_end_between_their_indexes(
    tmp_path: Path, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(tmp_path / "straight", layer=LAYERS, rows_per_shard=rows)
    with monkeypatch.context() as patch:

        def once(path: Path, write: Any) -> None:
            publish(path, write)
            raise Stop

        patch.setattr("sae_kernels.data.shard_index.publish", once)
        with pytest.raises(Stop):
            begin(tmp_path / "stopped", layer=LAYERS, rows_per_shard=rows)
    assert len(list(tmp_path.glob("stopped/*/index.json"))) == 1
    begin(tmp_path / "stopped", layer=LAYERS, rows_per_shard=rows, resume=True)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")


def test_sinks_are_left_out_alike_however_often_it_stops(tmp_path: Path) -> None:
    """Of two layers with a bound each: the same bytes, and a row goes from both or none."""
    model = sinking()
    n = begin(tmp_path / "straight", layer=LAYERS, model=model)
    for stop in (1, 130, 330):
        until(tmp_path / "stopped", stop, layer=LAYERS, model=model, resume=True)
    assert begin(tmp_path / "stopped", layer=LAYERS, model=model, resume=True) == n
    assert contents(tmp_path / "stopped") == contents(tmp_path / "straight")
    every = begin(tmp_path / "every", layer=LAYERS, model=model, row_filter=KEEP_ALL)
    sets = [ShardDataset(tmp_path / "straight" / layer) for layer in LAYERS]
    whole = [ShardDataset(tmp_path / "every" / layer).rows(0, every) for layer in LAYERS]
    over = torch.zeros(every, dtype=torch.bool)
    for data, rows in zip(sets, whole, strict=True):
        over |= rows.activations.norm(dim=1) > data.metadata["max_norm"]
        assert data.metadata["rows_above_max_norm"] == every - n > 20
    for data, rows in zip(sets, whole, strict=True):
        assert torch.equal(data.rows(0, n).activations, rows.activations[~over])
        assert rows.tokens is not None
        assert torch.equal(data.rows(0, n).tokens, rows.tokens[~over])
    assert JointRows(sets).facts["max_norm"] == [data.metadata["max_norm"] for data in sets]
