"""Run folders: whose they are, and which settings go on."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config.output import OutputConfig
from sae_kernels.config.toml import read_tables, write_tables
from sae_kernels.errors import DataError
from sae_kernels.runs.checkpoint import CHECKPOINTS, Contents, steps
from sae_kernels.runs.folder import RunFolder, holds_run, is_finished

if TYPE_CHECKING:
    from pathlib import Path

TABLES: dict[str, Any] = {
    "architecture": "topk",
    "train": {"lr": 0.1, "steps": 9, "clip_norm": None},
    "output": {"checkpoint_every": 2},
}
EVERY_TWO = OutputConfig(checkpoint_every=2)


def contents(step: int) -> Contents:
    return Contents({"x.safetensors": {"x": torch.ones(2)}}, {"trainer.json": {"step": step}})


def opened(path: Path, **options: Any) -> RunFolder:
    return RunFolder(path, options.pop("tables", TABLES), EVERY_TWO, **options)


def begun(path: Path, last: int = 5) -> None:
    with opened(path) as folder:
        for step in range(1, last + 1):
            folder.log({"step": step})
            if folder.due(step):
                folder.save(step, contents(step))


def test_a_run_goes_on_from_its_newest_checkpoint(tmp_path: Path) -> None:
    begun(tmp_path)
    assert holds_run(tmp_path)
    assert not is_finished(tmp_path)
    with opened(tmp_path, resume=True) as folder:
        assert folder.step == 4
        assert [line["step"] for line in folder.lines] == [1, 2, 3, 4]  # 5 is made again
        folder.finish({"steps": 9})
    assert is_finished(tmp_path)
    with pytest.raises(DataError, match="it has made all its steps"), opened(tmp_path, resume=True):
        pass


def test_a_run_that_saved_nothing_begins_again(tmp_path: Path) -> None:
    begun(tmp_path, last=1)
    with opened(tmp_path, resume=True) as folder:
        assert (folder.step, folder.checkpoint, folder.lines) == (0, None, [])


def test_resuming_where_there_is_no_run_begins_one(tmp_path: Path) -> None:
    with opened(tmp_path / "new", resume=True) as folder:
        assert folder.step == 0
    assert read_tables(tmp_path / "new" / "run.toml")["train"] == {"lr": 0.1, "steps": 9}


def test_another_run_is_overwritten_only_when_told_to(tmp_path: Path) -> None:
    begun(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    with (
        pytest.raises(DataError, match=r"holds run\.toml, metrics\.jsonl, checkpoints"),
        opened(tmp_path),
    ):
        pass
    assert steps(tmp_path / CHECKPOINTS) == [2, 4]
    with opened(tmp_path, overwrite=True) as folder:
        assert folder.lines == []
    assert steps(tmp_path / CHECKPOINTS) == []
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train": {"lr": 0.2, "steps": 9}}, r"train\.lr was 0\.1, is 0\.2; give the old"),
        ({"architecture": "relu"}, "architecture was 'topk', is 'relu'"),
        (
            {"train": {"lr": 0.1, "steps": 8, "k": 3}},
            r"train\.k was None, is 3; train\.steps was 9, is 8",
        ),
        ({"train": {"lr": 0.1, "steps": 9, "new": 7}}, r"train\.new was 5, is 7"),
    ],
)
def test_changed_settings_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    begun(tmp_path)
    tables = {**TABLES, **change}
    with (
        pytest.raises(DataError, match=message),
        opened(tmp_path, tables=tables, resume=True, defaults={"train.new": 5}),
    ):
        pass


def test_what_changes_nothing_may_change(tmp_path: Path) -> None:
    begun(tmp_path)
    tables = {
        **TABLES,
        "train": {**TABLES["train"], "log_every": 3, "new": 5, "device": "cpu"},
        "output": {"checkpoint_every": 7},
        "data": {"folders": ["moved"]},
    }
    with opened(tmp_path, tables=tables, resume=True, defaults={"train.new": 5}) as folder:
        assert folder.step == 4
    assert read_tables(tmp_path / "run.toml")["output"] == {"checkpoint_every": 7}


def test_one_process_at_a_time(tmp_path: Path) -> None:
    script = (
        "import sys, pathlib\n"
        "from sae_kernels.io.lock import locked\n"
        "with locked(pathlib.Path(sys.argv[1])): print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="another process is writing to it"), opened(tmp_path):
            pass
        other.kill()
        other.wait()
        with opened(tmp_path), pytest.raises(DataError, match="nobody uses"), opened(tmp_path):
            pass  # the dead let go; nor do two runs of one process share it


def test_litter_of_a_killed_process_goes(tmp_path: Path) -> None:
    begun(tmp_path)
    litter = [
        tmp_path / CHECKPOINTS / ".step_00000006.partial-somewhere-1",
        tmp_path / ".run.toml.partial-somewhere-1",
    ]
    litter[0].mkdir()
    (litter[0] / "x.safetensors").touch()
    litter[1].touch()
    with opened(tmp_path, resume=True):
        assert not any(path.exists() for path in litter)


def test_tables_come_back(tmp_path: Path) -> None:
    write_tables(tmp_path / "x.toml", {"a": 1.5, "b": {"c": None, "d": (1, 2), "e": {}}})
    assert read_tables(tmp_path / "x.toml") == {"a": 1.5, "b": {"d": [1, 2]}}
    (tmp_path / "x.toml").write_text("a = ")
    with pytest.raises(DataError, match="expected TOML"):
        read_tables(tmp_path / "x.toml")


def test_the_result_is_json_without_nan(tmp_path: Path) -> None:
    with opened(tmp_path) as folder:
        folder.finish({"loss": float("nan")})
    assert json.loads((tmp_path / "result.json").read_text()) == {"loss": None}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loggers": "tensorbord"}, "got 'tensorbord'; did you mean 'tensorboard'"),
        ({"loggers": 3}, "loggers: expected a list of names, got 3"),
        ({"checkpoint_every": -1}, "checkpoint_every: expected an integer of at least 0, got -1"),
        ({"keep_checkpoints": True}, "keep_checkpoints: expected an integer .*, got True"),
    ],
)
def test_what_cannot_be_written_so_is_refused_before_a_folder_is_made(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OutputConfig(**settings)


def test_a_logger_that_does_not_open_leaves_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it is not there
    options = OutputConfig(loggers=("tensorboard",))
    with pytest.raises(ImportError, match="pip install"), RunFolder(tmp_path, TABLES, options):
        pass
    assert not holds_run(tmp_path)
    assert list(tmp_path.iterdir()) == []
