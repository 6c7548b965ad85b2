"""Activations on disk: what is written comes back, and what is damaged is refused."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_kernels.data import ShardDataset, ShardWriter, ShuffledBatches, estimate_scale
from sae_kernels.errors import DataError, NonFiniteError
from tests.data.made_shards import D, named_rows, write

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_written_rows_come_back(tmp_path: Path, dtype: torch.dtype) -> None:
    x = write(tmp_path, dtype=dtype, metadata={"layer": "h.3"}).to(dtype)
    data = ShardDataset(tmp_path)
    data.verify()
    assert (data.n_tokens, data.d_in, data.dtype) == (25, D, dtype)
    assert data.metadata == {"layer": "h.3"}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "index.json",
        *(f"shard_0000{i}.safetensors" for i in range(3)),
    ]
    for start, stop in ((0, 25), (3, 8), (9, 11), (10, 20), (24, 25), (7, 7)):
        rows = data.rows(start, stop)
        assert rows.activations.dtype == dtype
        assert torch.equal(rows.activations, x[start:stop])
        assert rows.tokens is not None
        assert rows.tokens.tolist() == list(range(100 + start, 100 + stop))
        assert rows.documents is not None
        assert rows.documents.tolist() == [i // 4 for i in range(start, stop)]


def test_rows_inside_a_shard_are_views_of_the_file(tmp_path: Path) -> None:
    write(tmp_path)
    data = ShardDataset(tmp_path)
    first, second = data.rows(0, 5).activations, data.rows(2, 9).activations
    assert second.data_ptr() == first.data_ptr() + 2 * D * 4


def test_other_tools_read_a_shard(tmp_path: Path) -> None:
    x = write(tmp_path)
    tensors = load_file(tmp_path / "shard_00001.safetensors")
    assert torch.equal(tensors["activations"], x[10:20])


def test_only_activations(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, D) as writer:
        writer.write(named_rows(3))
    assert ShardDataset(tmp_path).rows(0, 3)[1:] == (None, None)


def test_an_empty_data_set_opens_and_cannot_be_trained_on(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, D):
        pass
    data = ShardDataset(tmp_path)
    assert data.rows(0, 0).activations.shape == (0, D)
    with pytest.raises(ValueError, match="at least one batch"):
        ShuffledBatches(data, 1)


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_exception_keeps_finished_shards_and_leaves_no_index(
    tmp_path: Path, overwrite: bool
) -> None:
    x = named_rows(25)
    if overwrite:
        write(tmp_path, n=15)

    def interrupted() -> None:
        with ShardWriter(tmp_path, D, rows_per_shard=10, overwrite=overwrite) as writer:
            writer.write(x)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "shard_00000.safetensors",
        "shard_00001.safetensors",
    ]
    assert torch.equal(load_file(tmp_path / "shard_00001.safetensors")["activations"], x[10:20])
    with pytest.raises(DataError, match=r"not a data set: it has no index\.json"):
        ShardDataset(tmp_path)
    write(tmp_path, n=5)
    assert not (tmp_path / "shard_00001.safetensors").exists()
    assert ShardDataset(tmp_path).n_tokens == 5


def test_a_failed_write_of_a_file_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sae_kernels.data.shard_writer.save_file", full)
    with pytest.raises(OSError, match="No space"):
        write(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_data_set_is_not_overwritten_unasked(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(DataError, match="overwrite=True"):
        ShardWriter(tmp_path, D)
    write(tmp_path, n=12, overwrite=True)
    assert ShardDataset(tmp_path).n_tokens == 12
    assert len(list(tmp_path.iterdir())) == 3


def test_the_writer_holds_one_shard(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, D, rows_per_shard=10) as writer:
        for _ in range(100):
            writer.write(named_rows(7))
            assert sum(t.numel() for t in writer._buffer.values()) == 10 * D
    assert ShardDataset(tmp_path).n_tokens == 700


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: w.write(torch.ones(3, D + 1)), ValueError, r"\[n, 5\], got \[3, 6\]"),
        (lambda w: w.write(torch.ones(3, D, dtype=torch.int32)), TypeError, "floating point"),
        (lambda w: w.write(named_rows(3), torch.ones(3)), TypeError, "integer tokens"),
        (lambda w: w.write(named_rows(3), torch.arange(4)), ValueError, r"tokens \[3\]"),
        (lambda w: w.write(named_rows(1), torch.tensor([2**31])), ValueError, "fit int32"),
        (lambda w: w.write(named_rows(3)), ValueError, "columns of the first write"),
        (lambda w: w.write(named_rows(3) / 0, torch.arange(3)), NonFiniteError, "finite"),
        (
            lambda w: w.write(named_rows(3) * 1e5, torch.arange(3)),
            NonFiniteError,
            "=torch.bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_refused(
    tmp_path: Path, call: Callable[[ShardWriter], None], error: type[Exception], message: str
) -> None:
    with ShardWriter(tmp_path, D, dtype=torch.float16) as writer:
        writer.write(named_rows(2), tokens=torch.arange(2))
        with pytest.raises(error, match=message):
            call(writer)
    assert ShardDataset(tmp_path).n_tokens == 2
    with pytest.raises(ValueError, match="`with` block"):
        writer.write(named_rows(2))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"dtype": torch.float64}, TypeError),
        ({"rows_per_shard": 0}, ValueError),
        ({"metadata": {"x": torch.ones(1)}}, TypeError),
        ({"metadata": {"x": math.nan}}, ValueError),
    ],
)
def test_the_writer_refuses_options_at_once(
    tmp_path: Path, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        ShardWriter(tmp_path / "new", D, **options)
    assert not (tmp_path / "new").exists()


def _cut(folder: Path) -> None:
    path = folder / "shard_00001.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def _garble(folder: Path) -> None:
    path = folder / "shard_00001.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)


def _lie(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        record = json.loads((folder / "index.json").read_text())
        change(record)
        (folder / "index.json").write_text(json.dumps(record))

    return apply


def _other_content(folder: Path) -> None:
    path = folder / "shard_00001.safetensors"
    tensors = load_file(path)
    tensors["tokens"], tensors["documents"] = tensors["documents"], tensors["tokens"].float()
    save_file(tensors, path)
    _lie(lambda r: r["shards"][1].update(bytes=path.stat().st_size))(folder)


def _link_out(folder: Path) -> None:
    path = folder / "shard_00001.safetensors"
    path.rename(folder.parent / "outside")
    path.symlink_to(folder.parent / "outside")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "shard_00001.safetensors").unlink(), "shard_00001.safetensors is missing"),
        (_cut, "bytes, got .* cut or replaced"),
        (_garble, "no safetensors file"),
        (_other_content, "F32.*index.json says"),
        (_link_out, "leaves the folder"),
        (lambda f: (f / "index.json").unlink(), "has no index.json"),
        (lambda f: (f / "index.json").write_text("{"), "cannot be read"),
        (lambda f: (f / "index.json").write_text("[" * 100_000), "cannot be read"),
        (lambda f: (f / "index.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda f: (f / "index.json").write_text("[]"), "JSON object"),
        (_lie(lambda r: r.update(version=2)), "version 2"),
        (_lie(lambda r: r.update(format="other")), "got 'other'"),
        (_lie(lambda r: r.update(count=26)), "25 rows of its shards as count, got 26"),
        (_lie(lambda r: r.update(d_in=6)), r"10, 6.*got"),
        (_lie(lambda r: r.update(d_in=True)), "d_in of type int, got True"),
        (_lie(lambda r: r.update(d_in=0)), "d_in of at least 1"),
        (_lie(lambda r: r.update(dtype="bfloat16")), "BF16"),
        (_lie(lambda r: r.update(dtype="float8")), "dtype one of"),
        (_lie(lambda r: r.update(columns=["activations", "tokens"])), "documents"),
        (_lie(lambda r: r.update(columns=["tokens"])), "a column activations"),
        (_lie(lambda r: r.update(columns=["activations", ["x"]])), "columns among"),
        (_lie(lambda r: r.pop("metadata")), "metadata of type dict, got None"),
        (_lie(lambda r: r["shards"].append("x")), "JSON object for each shard"),
        (_lie(lambda r: r["shards"].append(r["shards"][0])), "named once"),
        (_lie(lambda r: r["shards"][0].update(count=-1)), "at least one row"),
        (_lie(lambda r: r["shards"][0].update(count=9, x=r.update(count=24))), "10, 5"),
        (_lie(lambda r: r["shards"][0].update(file="../../etc/passwd")), "plain name"),
        (_lie(lambda r: r["shards"][0].update(file="/etc/passwd")), "plain name"),
        (_lie(lambda r: r["shards"][0].update(file="a\\b")), "plain name"),
        (_lie(lambda r: r["shards"][0].update(file="..")), "plain name"),
        (_lie(lambda r: r["shards"][0].update(file="x\0")), "plain name"),
        (_lie(lambda r: r["shards"][0].update(sha256=None)), "sha256 of type str"),
    ],
)
def test_damage_shows_on_opening(
    tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    folder = tmp_path / "data"
    write(folder)
    damage(folder)
    with pytest.raises(DataError, match=message):
        ShardDataset(folder)


def test_a_cut_shows_wherever_it_is(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "shard_00000.safetensors"
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 16):
        path.write_bytes(whole[:size])
        # The index lies along, so that the header alone must tell.
        _lie(lambda r, size=size: r["shards"][0].update(bytes=size))(tmp_path)
        with pytest.raises(DataError, match="no safetensors file"):
            ShardDataset(tmp_path)


def test_a_flipped_bit_shows_in_verify(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / "shard_00001.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)
    data = ShardDataset(tmp_path)
    with pytest.raises(DataError, match=r"shard_00001\.safetensors changed since written"):
        data.verify()


def test_rows_out_of_range(tmp_path: Path) -> None:
    write(tmp_path)
    for start, stop in ((-1, 3), (0, 26), (5, 4)):
        with pytest.raises(ValueError, match="<= 25 rows"):
            ShardDataset(tmp_path).rows(start, stop)


def test_scale_gives_rows_norm_sqrt_d(tmp_path: Path) -> None:
    x = write(tmp_path, n=30)
    scale = estimate_scale(ShardDataset(tmp_path), n=20)
    norms = (x[:20].double() * scale).norm(dim=1)
    assert norms.mean().item() == pytest.approx(math.sqrt(D), rel=1e-6)
    for bad in (torch.zeros(3, D), torch.empty(0, D), torch.full((2, D), math.nan)):
        with pytest.raises(ValueError, match="expected"):
            estimate_scale(bad)
