"""Loggers: metric lines sent to TensorBoard and Weights & Biases during a run.

A logger that cannot be opened is an error, since the run has not begun; one that fails later is
dropped with a warning, and the run continues.
"""

from __future__ import annotations

import contextlib
import os
import uuid
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from sae_kernels.config.output import check_loggers
from sae_kernels.io.files import write_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

TENSORBOARD_FOLDER, WANDB_ID_FILE = "tensorboard", "wandb_id.txt"
PROJECT = "sae_kernels"
_FLUSH_SECONDS = 10  # the most that a killed run loses of TensorBoard's file
_FINISH_SECONDS = 120.0  # for Weights & Biases to upload the rest; `wandb sync` can do it later


class Logger(Protocol):
    """A receiver of metric lines during a run."""

    def write(self, line: Mapping[str, Any]) -> None:
        """Takes one line; its step is under "step"."""

    def close(self) -> None:
        """Finishes; called once."""


class Loggers:
    """Sends metric lines to several loggers; one that raises is dropped with a warning.

    Args:
        loggers: by name, which the warning uses.

    Example:
        >>> class Kept(list):
        ...     write = list.append
        ...     def close(self): self.write("closed")
        >>> kept = Kept()
        >>> with Loggers({"kept": kept}) as loggers:
        ...     loggers.write({"step": 1, "loss": 0.5})
        >>> kept
        [{'step': 1, 'loss': 0.5}, 'closed']
    """

    def __init__(self, loggers: Mapping[str, Logger]) -> None:
        self._loggers = dict(loggers)

    def write(self, line: Mapping[str, Any]) -> None:
        """Sends a metric line to every open logger."""
        for name, logger in list(self._loggers.items()):
            try:
                logger.write(line)
            except Exception as error:
                del self._loggers[name]
                with contextlib.suppress(Exception):
                    logger.close()
                _warn(name, "write a metric line", error)

    def close(self) -> None:
        """Closes every open logger; a second call does nothing."""
        while self._loggers:
            name, logger = self._loggers.popitem()
            try:
                logger.close()
            except Exception as error:
                _warn(name, "finish", error)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def open_loggers(
    names: Iterable[str], folder: str | Path, settings: Mapping[str, Any], step: int = 0
) -> Loggers:
    """Opens loggers by name.

    Args:
        names: any of "tensorboard" and "wandb"; may be empty.
        folder: the run's; loggers keep their files in it.
        settings: the run's, shown by Weights & Biases. The table "output" may name its
            ``project``.
        step: the checkpoint's step if a run is resumed, 0 for a new one; TensorBoard's lines of
            later steps are dropped.

    Raises:
        ValueError: an unknown name, or a service that cannot be reached.
        ImportError: a package that is not installed; the message says how to get it.
    """
    names = list(dict.fromkeys(names))
    check_loggers(names)
    with contextlib.ExitStack() as stack:
        opened: dict[str, Logger] = {}
        for name in names:
            opened[name] = _OPENERS[name](Path(folder), settings, step)
            stack.callback(opened[name].close)
        stack.pop_all()
    return Loggers(opened)


class _TensorBoard:
    """Writes scalars to an event file; resuming purges those after the checkpoint's step."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        with _installed("tensorboard"):
            from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(
            folder / TENSORBOARD_FOLDER, purge_step=step + 1, flush_secs=_FLUSH_SECONDS
        )

    def write(self, line: Mapping[str, Any]) -> None:
        for name, value in _numbers(line):
            self._writer.add_scalar(name, value, line["step"])

    def close(self) -> None:
        self._writer.close()


class _WeightsAndBiases:
    """Logs to a run of Weights & Biases, resumed under the same id; obeys WANDB_MODE=offline."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], step: int) -> None:
        with _installed("wandb"):
            import wandb

        project = settings.get("output", {}).get("project") or os.environ.get("WANDB_PROJECT")
        try:
            self._run = wandb.init(
                project=project or PROJECT,
                name=folder.resolve().name,
                id=_wandb_id(folder, step),
                resume="allow" if step else None,
                config=dict(settings),
                dir=folder,
                reinit="create_new",  # leaves a run that the caller has open alone
                settings=wandb.Settings(
                    silent=True, console="off", login_timeout=60, finish_timeout=_FINISH_SECONDS
                ),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"wandb: expected a run to open, got {' '.join(str(error).split())} Log in with "
                "`wandb login`, or set WANDB_MODE=offline and upload later with `wandb sync`"
            ) from error

    def write(self, line: Mapping[str, Any]) -> None:
        self._run.log(dict(_numbers(line)), step=line["step"])

    def close(self) -> None:
        self._run.finish()


_OPENERS: dict[str, Callable[[Path, Mapping[str, Any], int], Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WeightsAndBiases,
}


def _numbers(line: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if name != "step" and isinstance(value, int | float) and not isinstance(value, bool):
            yield name, value


def _wandb_id(folder: Path, step: int) -> str:
    path = folder / WANDB_ID_FILE
    if step and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    name = uuid.uuid4().hex[:12]
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(path, name.encode())
    return name


@contextlib.contextmanager
def _installed(package: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f'the logger {package} needs a package: pip install "sae-kernels[{package}]" ({error})'
        ) from error


def _warn(name: str, what: str, error: Exception) -> None:
    reason = " ".join(str(error).split())
    warnings.warn(
        f"logger {name} could not {what} ({type(error).__name__}: {reason:.200}) and is dropped; "
        "training goes on without it",
        RuntimeWarning,
        stacklevel=3,
    )
