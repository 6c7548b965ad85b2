"""Choosing the backend that runs a primitive, with a reason for each that cannot.

Order of precedence: the ``backend=`` argument, the :func:`use` context manager, the environment
variable ``SAE_KERNELS_BACKEND``, and last the automatic choice. A choice is a backend or several in
order of preference, ``"gluon,triton"``, as not every backend implements every primitive. An
explicit choice never falls back on a backend that it does not name: it runs or raises
:class:`~sae_kernels.errors.BackendUnavailableError` with the reasons.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
from contextvars import ContextVar
from typing import TYPE_CHECKING, NamedTuple

from sae_kernels.backends import cpu, cuda, gluon, reference, triton
from sae_kernels.errors import BackendUnavailableError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType
    from typing import Any

    import torch

# In order of preference; each module's `reason` says why it cannot run something, or None. triton
# is before cuda because a pass of select_topk is one persistent product, not two launches a tile.
_BACKENDS = {"cpu": cpu, "triton": triton, "cuda": cuda, "gluon": gluon, "reference": reference}
# Preferred to those before it: its sort moves 8 bytes an entry twice, torch's moves 12 four times.
_FIRST = {"transpose_codes": "cuda"}
NAMES = tuple(_BACKENDS)
ENVIRONMENT_VARIABLE = "SAE_KERNELS_BACKEND"
_chosen: ContextVar[str | None] = ContextVar("sae_kernels_backend", default=None)


class Candidate(NamedTuple):
    """A backend and the reason why it cannot run a call; None if it can."""

    backend: str
    reason: str | None


@contextlib.contextmanager
def use(backend: str) -> Iterator[None]:
    """Runs every primitive inside the ``with`` block on this backend (or several, "gluon,triton").

    Raises:
        ValueError: an unknown name.

    Example:
        >>> import torch, sae_kernels
        >>> with sae_kernels.use_backend("reference"):
        ...     codes = sae_kernels.encode_topk(torch.eye(2), torch.eye(2), None, k=1)
        >>> codes.indices.tolist()
        [[0], [1]]
    """
    _check_choice(backend, "use_backend()")
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)


def candidates(
    primitive: str, device: torch.device, dtype: torch.dtype, arguments: Sequence[Any] = ()
) -> list[Candidate]:
    """All backends in order of preference, each with its reason for not running the call.

    Without ``arguments`` the answer is about calls of this device and dtype in general; an
    implementation may still refuse some of them.
    """
    names = _in_order(primitive)
    return [Candidate(name, _reason(name, primitive, device, dtype, arguments)) for name in names]


def note(primitive: str, backend: str, dtype: torch.dtype) -> str | None:
    """What an implementation says about how it runs calls of this dtype, or None."""
    says = getattr(_module(primitive, backend), "note", None)
    return None if says is None else says(dtype)


def requested(argument: str | None = None) -> tuple[str | None, str]:
    """The backend that was chosen explicitly, or None, and where the choice came from."""
    choice, origin = argument, "the backend argument"
    if not choice:
        choice, origin = _chosen.get(), "use_backend()"
    if not choice:
        choice = os.environ.get(ENVIRONMENT_VARIABLE)
        origin = f"the environment variable {ENVIRONMENT_VARIABLE}"
    if not choice:
        return None, "automatic choice"
    _check_choice(choice, origin)
    return choice, origin


def implementation(
    primitive: str,
    device: torch.device,
    dtype: torch.dtype,
    argument: str | None,
    arguments: Sequence[Any] = (),
) -> ModuleType:
    """The module that runs ``primitive`` for tensors of this device and dtype.

    Raises:
        BackendUnavailableError: no allowed backend can; lists each with its reason.
        ValueError: a choice that names an unknown backend.
    """
    choice, origin = requested(argument)
    for name in _in_order(primitive) if choice is None else _names(choice):
        if _reason(name, primitive, device, dtype, arguments) is None:
            return _module(primitive, name)
    lines = [
        f"{c.backend}: {c.reason or 'available'}"
        for c in candidates(primitive, device, dtype, arguments)
    ]
    raise BackendUnavailableError(
        f"{primitive} on {device} in {dtype} cannot run on {choice or 'any backend'} "
        f"({origin}); " + "; ".join(lines)
    )


@functools.cache
def _in_order(primitive: str) -> tuple[str, ...]:
    return tuple(sorted(NAMES, key=lambda name: name != _FIRST.get(primitive)))


@functools.cache
def _names(choice: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in choice.split(","))


def _check_choice(choice: str, origin: str) -> None:
    if not set(_names(choice)) <= set(NAMES):
        raise ValueError(
            f"{origin}: expected a backend among {', '.join(NAMES)} (or several, separated by "
            f"commas), got {choice!r}"
        )


def _reason(
    backend: str,
    primitive: str,
    device: torch.device,
    dtype: torch.dtype,
    arguments: Sequence[Any],
) -> str | None:
    if not _written(primitive, backend):
        return f"{primitive} is not written for it"
    reason: str | None = _BACKENDS[backend].reason(device, dtype)
    if reason is not None or not arguments:
        return reason
    # An implementation may have limits besides device and dtype.
    refuses = getattr(_module(primitive, backend), "refuses", None)
    return None if refuses is None else refuses(*arguments)


@functools.cache
def _written(primitive: str, backend: str) -> bool:
    return importlib.util.find_spec(f"sae_kernels.primitives.{primitive}.{backend}") is not None


@functools.cache
def _module(primitive: str, backend: str) -> ModuleType:
    return importlib.import_module(f"sae_kernels.primitives.{primitive}.{backend}")
