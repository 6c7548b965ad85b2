"""A run: batch after batch, and what is written meanwhile."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from sae_kernels._version import __version__
from sae_kernels.errors import NonFiniteError
from sae_kernels.runs.folder import SAE_FOLDER
from sae_kernels.runs.interrupts import Interrupts
from sae_kernels.training.trainable import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from typing_extensions import Self

    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.runs.folder import RunFolder
    from sae_kernels.training.trainable import Trainable

    OnStep = Callable[[int, dict[str, Any] | None], None]

_Given = TypeVar("_Given", covariant=True)


class Resumable(Protocol[_Given]):
    """A stream of batches that knows where it is."""

    def __next__(self) -> _Given: ...
    def state_dict(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingResult:
    """What a run leaves.

    Attributes:
        sae: trained, in the scale of training (saving folds the scale).
        metrics: the metric lines.
        seconds: of the training, waiting for data included, over all sittings.
        dead: bool [F], latents that have not fired for ``dead_after_tokens`` tokens.
        skipped: steps skipped because something was not finite.
        error: what ended it early, where several train together.
    """

    sae: SparseAutoencoder
    metrics: list[dict[str, Any]]
    seconds: float
    dead: torch.Tensor
    skipped: int
    error: NonFiniteError | None = None


class TrainingRun(Generic[Batch]):
    """One SAE in training, its folder and whoever watches it.

    As a context manager: whatever happens in it, the SAE is left usable, and saved.

    Args:
        training: fresh, or with the state of the folder's checkpoint.
        folder: where it is saved; None keeps everything in memory.
        on_step: called after every step with the step (from 0) and, when one was made, its line.

    Attributes:
        seconds: of training, those of earlier sittings included.
        cursor: the place in the data that :meth:`load` found.
        error: what ended it early.
    """

    def __init__(
        self,
        training: Trainable[Batch],
        folder: RunFolder | None = None,
        on_step: OnStep | None = None,
    ) -> None:
        self.training, self.folder, self.seconds = training, folder, 0.0
        self.cursor: dict[str, Any] | None = None
        self.lines = [] if folder is None else folder.lines
        self.error: NonFiniteError | None = None
        self._result: TrainingResult | None = None
        self._on_step = on_step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._result is None:
            self._leave()

    def load(self) -> None:
        """Takes up the folder's checkpoint; the SAE has its weights already."""
        assert self.folder is not None
        values = self.training.load(self.folder.pop_contents())
        self.seconds, self.cursor = float(values["seconds"]), values["batches"]

    @property
    def active(self) -> bool:
        """Whether it wants another batch."""
        return self.error is None and not self.training.finished

    def step(self, batch: Batch, batches: Resumable[Batch], waited: float) -> None:
        """A step on the batch that was waited for so long, and what is written after it."""
        start = time.perf_counter()
        training = self.training
        try:
            training.step(batch)
        except NonFiniteError as error:
            self.error = error
            return
        self.seconds += waited + time.perf_counter() - start
        line = training.line(self.seconds) if training.due else None
        if line is not None:
            self._log(line)
        if self.folder is not None and self.folder.due(training.made):
            self.save(batches)
        if self._on_step is not None:
            self._on_step(training.made - 1, line)

    def save(self, batches: Resumable[Batch], *, wait: bool = False) -> None:
        """Saves a checkpoint, from which the next step can be made as if nothing had happened."""
        assert self.folder is not None
        more = {"seconds": self.seconds, "batches": batches.state_dict()}
        self.folder.save(self.training.made, self.training.contents(**more), wait=wait)

    def result(self) -> TrainingResult:
        """What the run has come to; with this one that made all its steps is finished."""
        if self._result is None:
            start = time.perf_counter()
            if self.error is None:
                self.training.finalize()
                self.training.sae.metadata |= self._provenance()
            self.seconds += time.perf_counter() - start
            self._leave()
            dead = self.training.training_step.dead.mask().cpu()
            self._result = TrainingResult(
                self.training.sae,
                self.lines,
                self.seconds,
                dead,
                self.training.skipped,
                self.error,
            )
            if self.folder is not None and self.error is None:
                self.folder.finish(self._summary(self._result))
        return self._result

    def _leave(self) -> None:
        """Makes the SAE usable, and saves it."""
        self.training.close()
        if self.folder is not None:
            self.training.sae.save_pretrained(self.folder.path / SAE_FOLDER)

    def _provenance(self) -> dict[str, Any]:
        """What a saved SAE says of its training; the same after a resume, so it has no times."""
        last = self.lines[-1] if self.lines else {}
        figures = {name: last.get(name) for name in ("fvu", "l0", "dead_fraction")}
        data = getattr(getattr(self.training, "source", None), "fingerprint", None)
        return {
            "trained": {
                "tokens": self.training.tokens,
                "steps": self.training.made,
                # JSON has no NaN, which a skipped step may leave here.
                **{k: v for k, v in figures.items() if v is not None and math.isfinite(v)},
            },
            "sae_kernels_version": __version__,
            **({} if data is None else {"data": data}),
        }

    def _summary(self, result: TrainingResult) -> dict[str, Any]:
        config = self.training.sae.config
        return {
            "steps": self.training.made,
            "tokens": self.training.tokens,
            "seconds": result.seconds,
            "skipped": result.skipped,
            "dead_fraction": float(result.dead.float().mean()),
            "activation_scale": config.activation_scale,
            "target_scale": config.target_scale,
            **({"last": self.lines[-1]} if self.lines else {}),
        }

    def _log(self, line: dict[str, Any]) -> None:
        if self.folder is None:
            self.lines.append(line)
        else:
            self.folder.log(line)


def drive(runs: Sequence[TrainingRun[Batch]], batches: Resumable[Batch]) -> None:
    """Hands every batch to all runs that have not had it, until each has made its steps.

    Where there are folders, SIGINT and SIGTERM are taken up after the step: checkpoints are saved,
    and then KeyboardInterrupt or SystemExit is raised. A second signal ends the process at once.

    Raises:
        ValueError: the batches end before the steps do.
    """
    saving = [run for run in runs if run.folder is not None]
    with Interrupts(enabled=bool(saving)) as interrupts:
        position = min((run.training.made for run in runs if run.active), default=0)
        while waiting := [run for run in runs if run.active]:
            start = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                most = max(run.training.config.steps for run in waiting)
                raise ValueError(
                    f"batches: expected one for each of the {most} steps, got {position}; lower "
                    "steps, or give data that are gone through again"
                ) from None
            waited = time.perf_counter() - start
            for run in waiting:
                if run.training.made == position:  # another may be ahead, after a resume
                    run.step(batch, batches, waited)
                if not run.active:  # it need not wait for the others
                    run.result()
            position += 1
            unfinished = [run for run in saving if run.active]
            if interrupts.received and unfinished:
                for run in unfinished:
                    run.save(batches, wait=True)
                interrupts.raise_received(
                    f"checkpoint of step {position} saved; resume goes on from it"
                )
