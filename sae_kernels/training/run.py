"""The training loop: hands batches to runs and writes metric lines and checkpoints."""

from __future__ import annotations

import dataclasses
import math
import time
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from sae_kernels._version import __version__
from sae_kernels.errors import NonFiniteError
from sae_kernels.runs.interrupts import Interrupts
from sae_kernels.training.origin import record
from sae_kernels.training.trainable import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import torch
    from typing_extensions import Self

    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.runs.folder import RunFolder
    from sae_kernels.training.trainable import Trainable

    OnStep = Callable[[int, dict[str, Any] | None], None]

_Given = TypeVar("_Given", covariant=True)


class Resumable(Protocol[_Given]):
    """A stream of batches that can save its position."""

    def __next__(self) -> _Given: ...
    def state_dict(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class TrainingResult:
    """Result of a training run.

    Attributes:
        sae: the trained SAE, in the scale of training (saving folds the scale).
        metrics: the metric lines.
        seconds: time of training and of waiting for data, including time before a resume.
        dead: bool [F], latents that have not fired for ``dead_after_tokens`` tokens.
        skipped: steps skipped because the loss or a gradient was not finite.
        error: the error that ended the run early, if several train together; else None.
    """

    sae: SparseAutoencoder
    metrics: list[dict[str, Any]]
    seconds: float
    dead: torch.Tensor
    skipped: int
    error: NonFiniteError | None = None


class TrainingRun(Generic[Batch]):
    """One run of the loop: an SAE in training, its folder and its callback.

    As a context manager it leaves the SAE usable whatever happens inside, and saved; but after an
    error not in a folder of several processes, since the others may be gone.

    Args:
        training: fresh, or to be restored by :meth:`load`.
        folder: where the run is saved; None keeps everything in memory.
        on_step: called after every step with the 0-based step and its metric line or None.
        place: whose activations these are, from `origin`, for the SAE's metadata.

    Attributes:
        seconds: time of training, including time before a resume.
        cursor: position in the data, from :meth:`load`.
        error: the error that ended the run early.
    """

    def __init__(
        self,
        training: Trainable[Batch],
        folder: RunFolder | None = None,
        on_step: OnStep | None = None,
        place: Mapping[str, Any] | None = None,
    ) -> None:
        self.training, self.folder, self.seconds = training, folder, 0.0
        record(training.sae.metadata, place or {})
        self.cursor: dict[str, Any] | None = None
        self.lines = [] if folder is None else folder.lines
        self.error: NonFiniteError | None = None
        self._result: TrainingResult | None = None
        self._on_step = on_step

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._result is None:
            failed = kind is not None and issubclass(kind, Exception)
            self._leave(save=not (failed and self.folder is not None and self.folder.shared))

    def load(self) -> None:
        """Restores the folder's checkpoint; the SAE has its weights already."""
        assert self.folder is not None
        values = self.training.load(self.folder.pop_contents())
        self.seconds, self.cursor = float(values["seconds"]), values["batches"]

    @property
    def active(self) -> bool:
        """Whether the run needs another batch."""
        return self.error is None and not self.training.finished

    def step(self, batch: Batch, batches: Resumable[Batch], waited: float) -> None:
        """Makes one step, then logs and saves what is due; ``waited`` is in seconds."""
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
        """Saves a checkpoint from which training continues bit for bit."""
        assert self.folder is not None
        more = {"seconds": self.seconds, "batches": batches.state_dict()}
        self.folder.save(self.training.made, self.training.contents(**more), wait=wait)

    def result(self) -> TrainingResult:
        """Finishes the run, once, and returns its result."""
        if self._result is None:
            start = time.perf_counter()
            if self.error is None:
                self.training.finalize()
                self.training.sae.metadata |= self._provenance()
            self.seconds += time.perf_counter() - start
            self._leave()
            dead = self.training.training_step.dead.mask().cpu()
            self._result = TrainingResult(
                self.training.sae, self.lines, self.seconds, dead, self.training.skipped, self.error
            )
            if self.folder is not None and self.error is None:
                self.folder.finish(self._summary(self._result))
        return self._result

    def _leave(self, save: bool = True) -> None:
        """Restores the SAE's own weights and saves it."""
        self.training.close()
        if self.folder is not None and save:
            self.folder.save_sae(self.training.sae)

    def _provenance(self) -> dict[str, Any]:
        """Metadata of the saved SAE about its training, without times, which a resume changes."""
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
            "dead_fraction": self.training.dead_fraction,
            "activation_scale": config.activation_scale,
            "target_scale": config.target_scale,
            **self.training.launching,
            **({"last": self.lines[-1]} if self.lines else {}),
        }

    def _log(self, line: dict[str, Any]) -> None:
        if self.folder is None:
            self.lines.append(line)
        else:
            self.folder.log(line)


def drive(
    runs: Sequence[TrainingRun[Batch]],
    batches: Resumable[Batch],
    on_any_rank: Callable[[bool], bool] = bool,
) -> None:
    """Trains all runs on one stream of batches until each has made its steps.

    With folders, SIGINT and SIGTERM take effect after the step: checkpoints are saved, then
    KeyboardInterrupt or SystemExit is raised. A second signal ends the process at once.

    Args:
        runs: all on these batches.
        batches: one for each step.
        on_any_rank: whether something is true on one of the ranks that train together, which
            stop after the same step.

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
                if run.training.made == position:  # after a resume some runs may be ahead
                    run.step(batch, batches, waited)
                if not run.active:  # it need not wait for the others
                    run.result()
            position += 1
            unfinished = [run for run in saving if run.active]
            if unfinished and on_any_rank(interrupts.received is not None):
                for run in unfinished:
                    run.save(batches, wait=True)
                interrupts.raise_received(
                    f"checkpoint of step {position} saved; resume goes on from it"
                )
