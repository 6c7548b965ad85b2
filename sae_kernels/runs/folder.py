"""The folder of a run: its settings, metric lines, checkpoints and SAE.

``run.toml`` is written first and ``result.json`` last: a folder with only the first holds a run
that can be resumed.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.config.toml import changes, plain, read_tables, write_tables
from sae_kernels.errors import DataError
from sae_kernels.io.files import json_writer, publish, remove_stale
from sae_kernels.io.lock import locked
from sae_kernels.nn import pretrained
from sae_kernels.runs import checkpoint
from sae_kernels.runs.loggers import TENSORBOARD_FOLDER, WANDB_ID_FILE, open_loggers
from sae_kernels.runs.metrics import MetricLog, jsonable, read_metrics
from sae_kernels.runs.saver import Saver

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Self

    from sae_kernels.config.output import OutputConfig
    from sae_kernels.config.toml import Tables
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.runs.checkpoint import Contents

RUN_FILE, METRICS_FILE, RESULT_FILE = "run.toml", "metrics.jsonl", "result.json"
SAE_FOLDER = "sae"
_MINE = (
    *(RUN_FILE, METRICS_FILE, RESULT_FILE, checkpoint.CHECKPOINTS, SAE_FOLDER),
    *(TENSORBOARD_FOLDER, WANDB_ID_FILE),
)
# Settings that may change on resuming, as they do not affect what is learnt.
_FREE = (
    "output.",
    "data.",
    "train.log_every",
    "train.device",
    "train.on_nonfinite",
    "train.cuda_graph",
    "parallel.latents_over",
    "parallel.tokens_over",
    "parallel.harvest_ranks",
    "parallel.timeout",
)


class RunFolder:
    """The folder of a run in progress, locked against other processes.

    Args:
        path: made when missing.
        tables: the settings, as TOML tables.
        options: how often to save, how many checkpoints to keep, which loggers to open.
        resume: continue from the newest undamaged checkpoint, or from the start if there is none;
            otherwise the folder must not hold a run.
        overwrite: delete the run that the folder holds.
        defaults: values of settings that an older version did not write: ``{"train.lr": None}``.
        saver: makes the saver of its checkpoints, a :class:`~sae_kernels.runs.saver.Saver`.
        read: verifies and reads a checkpoint.

    Attributes:
        path: the folder.
        checkpoint: the checkpoint to continue from, or None.
        step: steps made at that checkpoint, else 0.
        lines: the metric lines so far.
        shared: whether other processes write here too, which may be gone after an error.

    Raises:
        DataError: the folder is in use, holds another run or a finished one, the settings differ
            from those the run began with, or all its checkpoints are damaged.
    """

    shared = False

    def __init__(
        self,
        path: str | Path,
        tables: Tables,
        options: OutputConfig,
        *,
        resume: bool = False,
        overwrite: bool = False,
        defaults: Mapping[str, Any] | None = None,
        saver: Callable[[Path, int, int | None], Saver] = Saver,
        read: Callable[[Path], Contents] = checkpoint.read,
    ) -> None:
        self.path, self.options = Path(path), options
        self.tables: Tables = plain(tables)
        self._resume, self._overwrite = resume, overwrite
        self._make_saver, self._read = saver, read
        self._defaults = plain(dict(defaults or {}))
        self.checkpoint: Path | None = None
        self.step = 0
        self._contents: Contents | None = None
        self.lines: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self.path.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(self.path))
            for folder in (self.path, self._checkpoints):
                remove_stale(folder, of_anyone=True)  # the lock says that nobody else writes here
            self._begin()
            # Before anything is written: a missing package or service fails here.
            self._loggers = stack.enter_context(
                closing(open_loggers(self.options.loggers, self.path, self.tables, self.step))
            )
            write_tables(self.path / RUN_FILE, self.tables)
            self._log = stack.enter_context(MetricLog(self.path / METRICS_FILE, until=self.step))
            self.lines = read_metrics(self.path / METRICS_FILE)
            self._saver = stack.enter_context(
                self._make_saver(
                    self._checkpoints, self.options.keep_checkpoints, self.step or None
                )
            )
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    @property
    def _checkpoints(self) -> Path:
        return self.path / checkpoint.CHECKPOINTS

    def pop_contents(self) -> Contents:
        """The checkpoint's contents, once: they take as much memory as the training itself."""
        assert self._contents is not None
        contents, self._contents = self._contents, None
        return contents

    def log(self, line: dict[str, Any]) -> None:
        """Appends a metric line to the file and hands it to the loggers."""
        self.lines.append(line)
        self._log.write(line)
        self._loggers.write(line)

    def due(self, step: int) -> bool:
        """Whether to save a checkpoint after this step; raises if an earlier save has failed."""
        self._saver.check()
        every = self.options.checkpoint_every
        return every > 0 and step % every == 0

    def save(self, step: int, contents: Contents, *, wait: bool = False) -> None:
        """Writes a checkpoint in the background; ``wait`` returns only when it is on the disk."""
        if self._saver.last != step:
            self._log.sync()
            self._saver.save(step, contents)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Waits until the last checkpoint is on the disk."""
        self._saver.wait()

    @property
    def staged_bytes(self) -> int:
        """Bytes of memory that hold the copy of the last checkpoint."""
        return self._saver.nbytes

    def load_sae(self) -> SparseAutoencoder:
        """The SAE of the checkpoint to continue from, on the CPU."""
        assert self.checkpoint is not None
        return pretrained.load(self.checkpoint)

    def save_sae(self, sae: SparseAutoencoder) -> None:
        """Saves the SAE in the folder."""
        sae.save_pretrained(self.path / SAE_FOLDER)

    def finish(self, result: dict[str, Any]) -> None:
        """Writes result.json, which marks the run as finished."""
        self._saver.wait()
        publish(self.path / RESULT_FILE, json_writer(jsonable(result)))

    def _begin(self) -> None:
        if self._resume and holds_run(self.path):
            self._refuse_changes()
            if (self.path / RESULT_FILE).exists():
                raise DataError(
                    f"{self.path}: expected a run that is to go on, it has made all its steps; "
                    "choose another folder for a new one"
                )
            found = checkpoint.newest(self._checkpoints, self._read)
            if found is not None:
                self.checkpoint, self._contents = found
                self.step = checkpoint.step_of(self.checkpoint)
            return
        held = [name for name in _MINE if (self.path / name).exists()]
        if held and not self._overwrite:
            raise DataError(
                f"{self.path}: expected a folder without a run, it holds {', '.join(held)}; "
                "resume that run, overwrite it, or choose another folder"
            )
        for name in held:
            old = self.path / name
            shutil.rmtree(old) if old.is_dir() else old.unlink()

    def _refuse_changes(self) -> None:
        before = read_tables(self.path / RUN_FILE)
        found = changes(before, self.tables, self._defaults)
        other = {key: both for key, both in found.items() if not key.startswith(_FREE)}
        if other:
            listed = "; ".join(
                f"{key} was {was!r}, is {now!r}" for key, (was, now) in other.items()
            )
            raise DataError(
                f"{self.path}: expected the settings that the run began with: {listed}; give the "
                "old ones, or start another run"
            )


def holds_run(path: Path) -> bool:
    """Whether a folder holds a run, finished or not."""
    return (path / RUN_FILE).is_file()


def is_finished(path: Path) -> bool:
    """Whether a folder holds a run that has made all its steps."""
    return (path / RESULT_FILE).is_file()
