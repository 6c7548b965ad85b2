"""Which implementation of a primitive runs, and why.

Order of precedence: the ``backend=`` argument, the :func:`use` context manager, the environment
variable ``SAE_KERNELS_BACKEND``, and last the automatic choice. An explicit choice never falls
back: it runs or it raises :class:`~sae_kernels.errors.BackendUnavailableError` with the reasons.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.backends import cpu, reference
from sae_kernels.errors import BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

    import torch

# In order of preference; each module's `reason` says why it cannot run something, or None.
_BACKENDS = {"cpu": cpu, "reference": reference}
NAMES = tuple(_BACKENDS)
ENVIRONMENT_VARIABLE = "SAE_KERNELS_BACKEND"
_chosen: ContextVar[str | None] = ContextVar("sae_kernels_backend", default=None)


class Candidate(NamedTuple):
    """A backend and why it cannot run a call (``None``: it can)."""

    backend: str
    reason: str | None


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Runs every primitive inside the ``with`` block on one backend.

    Example:
        >>> import torch, sae_kernels
        >>> with sae_kernels.use_backend("reference"):
        ...     codes = sae_kernels.encode_topk(torch.eye(2), torch.eye(2), None, k=1)
        >>> codes.indices.tolist()
        [[0], [1]]
    """
    _check_name(backend, "use_backend()")
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def candidates(primitive: str, device: torch.device, dtype: torch.dtype) -> list[Candidate]:
    """Every backend in order of preference with its reason for not running the call."""
    return [Candidate(name, _reason(name, primitive, device, dtype)) for name in NAMES]


def requested(argument: str | None = None) -> tuple[str | None, str]:
    """The explicitly chosen backend, if any, and where the choice came from."""
    environment = os.environ.get(ENVIRONMENT_VARIABLE)
    for choice, origin in (
        (argument, "the backend argument"),
        (_chosen.get(), "use_backend()"),
        (environment, f"the environment variable {ENVIRONMENT_VARIABLE}"),
    ):
        if choice:
            _check_name(choice, origin)
            return choice, origin
    return None, "automatic choice"


def implementation(
    primitive: str, device: torch.device, dtype: torch.dtype, argument: str | None
) -> ModuleType:
    """The module that runs ``primitive`` for tensors of this device and dtype."""
    choice, origin = requested(argument)
    for name in (choice,) if choice else NAMES:
        module = _module(primitive, name)
        if module is not None and _reason(name, primitive, device, dtype) is None:
            return module
    lines = [
        f"{c.backend}: {c.reason or 'available'}" for c in candidates(primitive, device, dtype)
    ]
    raise BackendUnavailableError(
        f"{primitive} on {device} in {dtype} cannot run on {choice or 'any backend'} "
        f"({origin}); " + "; ".join(lines)
    )


def _check_name(name: str, origin: str) -> None:
    if name not in _BACKENDS:
        raise ValueError(f"{origin}: expected a backend among {', '.join(NAMES)}, got {name!r}")


def _reason(backend: str, primitive: str, device: torch.device, dtype: torch.dtype) -> str | None:
    if _module(primitive, backend) is None:
        return f"{primitive} is not written for it"
    reason: str | None = _BACKENDS[backend].reason(device, dtype)
    return reason


@functools.cache
def _module(primitive: str, backend: str) -> ModuleType | None:
    name = f"sae_kernels.primitives.{primitive}.{backend}"
    return importlib.import_module(name) if importlib.util.find_spec(name) else None
