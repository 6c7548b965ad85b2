"""Checkpoints: what was saved comes back, and nothing else is believed."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file

from sae_kernels.errors import DataError
from sae_kernels.io.files import digest, publish
from sae_kernels.runs import checkpoint
from sae_kernels.runs.checkpoint import Contents
from sae_kernels.runs.saver import Saver
from sae_kernels.runs.staging import Staging
from sae_kernels.testing import assert_bitwise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TENSORS = {
    "a.safetensors": {
        "W": torch.randn(5, 7),
        "half": torch.randn(3, 2).bfloat16(),
        "counts": torch.arange(4),
        "scalar": torch.tensor(2.5, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "mask": torch.tensor([True, False, True]),
        "strided": torch.randn(6, 4).T,
    },
    "b.safetensors": {"bytes": torch.arange(256).to(torch.uint8)},
}
VALUES = {"trainer.json": {"step": 7, "factor": 0.1 + 0.2, "name": "größe"}}


def saved(parent: Path, *steps: int, keep: int = 0) -> list[Path]:
    with Saver(parent, keep) as saver:
        for step in steps:
            saver.save(step, Contents(TENSORS, VALUES))
    return [checkpoint.path_of(parent, step) for step in steps]


def test_what_is_saved_comes_back(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 7)
    assert path.name == "step_00000007"
    contents = checkpoint.read(path)
    assert contents.values == VALUES
    for file, tensors in TENSORS.items():
        assert contents.tensors[file].keys() == tensors.keys()
        for name, tensor in tensors.items():
            back = contents.tensors[file][name]
            assert back.shape == tensor.shape
            assert_bitwise(name, back.reshape(-1), tensor.reshape(-1))


def test_the_copy_is_that_of_the_moment(tmp_path: Path) -> None:
    x = torch.zeros(1 << 20)
    with Saver(tmp_path, 0) as saver:
        for step in range(1, 4):
            x.fill_(step)
            saver.save(step, Contents({"x.safetensors": {"x": x}}, {}))
            x.fill_(-1)  # while the thread writes
        assert x.nbytes < saver.nbytes <= x.nbytes + 8192  # one buffer for all
    for step in range(1, 4):
        kept = load_file(checkpoint.path_of(tmp_path, step) / "x.safetensors")["x"]
        assert kept.unique().tolist() == [step]


def test_a_buffer_that_was_larger_does_not_show(tmp_path: Path) -> None:
    staging = Staging()
    staging.fill({"x": torch.ones(100)})
    staging.fill({"x": torch.zeros(3)})
    written = staging.write(tmp_path / "x.safetensors")
    assert load_file(tmp_path / "x.safetensors")["x"].tolist() == [0, 0, 0]
    assert written.bytes == (tmp_path / "x.safetensors").stat().st_size < 200


@pytest.mark.parametrize("refused", ["open", "write"])
def test_a_file_system_without_direct_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    """Some refuse them at opening, some at the first write."""
    real_open, real_write, asked = os.open, os.write, []

    def open_(path: Any, flags: int, *more: Any, **others: Any) -> int:
        if refused == "open" and flags & os.O_DIRECT:
            asked.append("open")
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_open(path, flags, *more, **others)

    def write(descriptor: int, block: Any) -> int:
        if refused == "write" and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            asked.append("write")
            raise OSError(errno.EINVAL, "Invalid argument")
        return real_write(descriptor, block)

    monkeypatch.setattr(os, "open", open_)
    monkeypatch.setattr(os, "write", write)
    staging = Staging()
    x = torch.randn(3_000_001)  # three blocks, the last of them no whole page
    staging.fill({"x": x})
    written = staging.write(tmp_path / "x.safetensors")
    monkeypatch.undo()
    assert asked == [refused]
    assert_bitwise("x", load_file(tmp_path / "x.safetensors")["x"], x)
    assert written.sha256 == digest(tmp_path / "x.safetensors")


@pytest.mark.parametrize(("keep", "left"), [(0, [1, 2, 3, 4]), (1, [4]), (3, [2, 3, 4])])
def test_so_many_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    saved(tmp_path, 1, 2, 3, 4, keep=keep)
    assert checkpoint.steps(tmp_path) == left


def test_a_future_that_was_left_goes_with_the_next_save(tmp_path: Path) -> None:
    saved(tmp_path, 10, 20, 30)
    saved(tmp_path, 21, keep=2)
    assert checkpoint.steps(tmp_path) == [20, 21]
    saved(tmp_path, 21, keep=2)  # the same step again
    assert checkpoint.steps(tmp_path) == [20, 21]
    checkpoint.verify(checkpoint.path_of(tmp_path, 21))


def _flip(path: Path, at: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << bit
    path.write_bytes(content)


def test_every_cut_and_every_flip_shows(tmp_path: Path) -> None:
    (path,) = saved(tmp_path, 7)
    drawn = random.Random(0)
    tried = 0
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for part in range(16):
            file.write_bytes(whole[: len(whole) * part // 16])
            with pytest.raises(DataError):
                checkpoint.read(path)
            tried += 1
        for _ in range(25):
            file.write_bytes(whole)
            _flip(file, drawn.randrange(len(whole)), drawn.randrange(8))
            if file.name == checkpoint.MANIFEST and _same(file, whole):
                continue  # a flip of white space, or of the case of a hexadecimal digit's key
            with pytest.raises(DataError):
                checkpoint.read(path)
            tried += 1
        file.write_bytes(whole)
    assert tried > 140
    assert checkpoint.read(path).values == VALUES


def _same(file: Path, whole: bytes) -> bool:
    try:
        return bool(json.loads(file.read_bytes()) == json.loads(whole))
    except ValueError:
        return False


def _manifest(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        record = json.loads((path / checkpoint.MANIFEST).read_text())
        change(record)
        (path / checkpoint.MANIFEST).write_text(json.dumps(record))

    return damage


def _link(path: Path) -> None:
    (path / "b.safetensors").rename(path.parent / "elsewhere")
    (path / "b.safetensors").symlink_to(path.parent / "elsewhere")


def _fifo(path: Path) -> None:
    (path / "b.safetensors").unlink()
    os.mkfifo(path / "b.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: (p / checkpoint.MANIFEST).unlink(), "manifest.json: expected the manifest"),
        (lambda p: (p / "b.safetensors").unlink(), "b.safetensors: expected a file of the"),
        (_link, "b.safetensors: expected a file of the checkpoint"),
        (_fifo, "b.safetensors: expected a file of the checkpoint"),
        (_manifest(lambda r: r.update(version=9)), "version 1, got .* version 9"),
        (_manifest(lambda r: r.update(format="x")), "got 'x' version 1"),
        (_manifest(lambda r: r.update(step=8)), "expected the step of step_00000007, got 8"),
        (_manifest(lambda r: r.update(step="7")), "got '7'"),
        (_manifest(lambda r: r.update(files=[])), r"the files of a checkpoint, got \[\]"),
        (_manifest(lambda r: r.update(files={str(i): {} for i in range(9999)})), "the files of"),
        (_manifest(lambda r: r["files"].update({"../x": {"bytes": 1, "sha256": ""}})), "got ../x"),
        (_manifest(lambda r: r["files"].update({"/etc/x": {"bytes": 1, "sha256": ""}})), "/etc/x"),
        (_manifest(lambda r: r["files"].update({"x": 3})), "size and SHA-256, got x"),
        (_manifest(lambda r: r["files"]["b.safetensors"].update(bytes=2**80)), "expected 12089"),
        (lambda p: (p / checkpoint.MANIFEST).write_text("[" * 100_000), "cannot be read"),
        (lambda p: os.truncate(p / checkpoint.MANIFEST, 1 << 40), "of at most 67108864 bytes"),
    ],
)
def test_what_is_strange_is_refused(
    tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    (path,) = saved(tmp_path, 7)
    damage(path)
    with pytest.raises(DataError, match=message):
        checkpoint.read(path)


def test_the_newest_that_is_whole_is_used(tmp_path: Path) -> None:
    paths = saved(tmp_path, 10, 20, 30)
    (tmp_path / "step_x").mkdir()
    (tmp_path / "notes.txt").touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert checkpoint.newest(tmp_path)[0] == paths[2]
    os.truncate(paths[2] / "a.safetensors", 10)
    (paths[1] / checkpoint.MANIFEST).unlink()
    with pytest.warns(RuntimeWarning, match="passed over, step_00000010 before it is used") as told:
        assert checkpoint.newest(tmp_path)[0] == paths[0]
    assert len(told) == 2
    shutil.rmtree(paths[0])
    with pytest.raises(DataError, match=r"all are damaged: .*step_00000030.*step_00000020"):
        checkpoint.newest(tmp_path)
    assert checkpoint.newest(tmp_path / "nothing") is None


def test_a_failed_write_is_told_of_and_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (old,) = saved(tmp_path, 10)
    calls = []

    def broken(descriptor: int) -> None:
        calls.append(descriptor)
        raise OSError(5, "Input/output error")

    saver = Saver(tmp_path, 1)
    monkeypatch.setattr(os, "fsync", broken)
    saver.save(20, Contents(TENSORS, VALUES))
    with pytest.raises(OSError, match="Input/output error"):
        saver.wait()
    monkeypatch.undo()
    assert calls
    assert saver.last is None
    assert [path.name for path in tmp_path.iterdir()] == [old.name]  # no litter either
    checkpoint.verify(old)
    saver.save(30, Contents(TENSORS, VALUES))  # the next one is not lost for it
    saver.wait()
    assert checkpoint.steps(tmp_path) == [30]


def test_what_replaces_a_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError):
        publish(path, lambda partial: partial.write_text("new") // 0)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_litter_of_the_dead_is_swept(tmp_path: Path) -> None:
    import socket

    host = socket.gethostname()
    dead = os.fork()
    if not dead:
        os._exit(0)
    os.waitpid(dead, 0)
    names = {
        f".x.partial-{host}-{dead}": False,
        f".x.partial-{host}-{os.getppid()}": True,  # alive
        f".x.partial-elsewhere-{dead}": True,  # who knows
        f".y.partial-{host}-{dead}": True,  # another file's
        ".x.partial": True,  # not one of ours
    }
    for name in names:
        (tmp_path / name).touch()
    publish(tmp_path / "x", lambda partial: partial.write_text("new"))
    left = {path.name for path in tmp_path.iterdir()} - {"x"}
    assert left == {name for name, stays in names.items() if stays}
