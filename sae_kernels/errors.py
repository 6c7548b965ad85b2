"""What this package raises when it is not a plain ValueError or TypeError."""

from __future__ import annotations


class SaeKernelsError(Exception):
    """Base of the errors below: catch it to catch them all."""


class BackendUnavailableError(SaeKernelsError, NotImplementedError):
    """No backend can run the call; the message lists each candidate with its reason."""


class DataError(SaeKernelsError, ValueError):
    """A file or folder of data is missing, damaged or contradicts itself."""


class ModelError(SaeKernelsError, ValueError):
    """A model or one of its layers cannot be had."""


class NonFiniteError(SaeKernelsError, ArithmeticError):
    """A batch, a loss or a gradient norm holds NaN or infinity."""
