"""The package's own exceptions, for errors that are not a plain ValueError or TypeError."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class SaeKernelsError(Exception):
    """Base class of all exceptions of this package."""


class AccelerationError(SaeKernelsError, RuntimeError):
    """A library, one of its trainers or one of its calls cannot be accelerated."""


class BackendUnavailableError(SaeKernelsError, NotImplementedError):
    """No backend can run the call; the message lists each candidate with its reason."""


class DataError(SaeKernelsError, ValueError):
    """A file or folder of data is missing, damaged or contradicts itself."""


class ModelError(SaeKernelsError, ValueError):
    """A model or one of its layers cannot be found, loaded or used."""


class NonFiniteError(SaeKernelsError, ArithmeticError):
    """A batch, a loss or a gradient norm holds NaN or infinity."""

    @classmethod
    def in_step(cls, i: int) -> NonFiniteError:
        """The error that stops a run whose 0-based step i is not finite."""
        return cls(
            f"step {i + 1}: expected a finite loss and gradient norm, got NaN or infinity (a batch "
            "that is not finite, or a diverged run); the weights are those before it. Lower the "
            "learning rate, mend the data or choose on_nonfinite 'skip'"
        )


class RankError(SaeKernelsError, RuntimeError):
    """Another process of a run failed, ended or does not answer; the message names its rank.

    Args:
        message: rank and cause.
        said: whether another process of the run prints it.
    """

    def __init__(self, message: str, said: bool = False) -> None:
        super().__init__(message)
        self.said = said


def name_hint(name: str, known: Iterable[str]) -> str:
    """The remedy for an unknown name in an error message: the nearest known name, or all of them.

    Example:
        >>> name_hint("n_latent", ["d_in", "n_latents"])
        "did you mean 'n_latents'?"
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
