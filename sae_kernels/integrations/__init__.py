"""Runs trainers of other libraries on these kernels, and takes the change back again.

Adapters: ``sae_lens``, ``sparsify``, ``dictionary_learning`` and ``circuit_tracer``. Importing this
changes nothing.
"""

from __future__ import annotations

import importlib
import itertools
import weakref
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import AccelerationError, name_hint
from sae_kernels.integrations.adapters import LEVELS, Installation
from sae_kernels.integrations.patching import unfit

if TYPE_CHECKING:
    from types import TracebackType

    import torch

    from sae_kernels.integrations.adapters import Adapter
    from sae_kernels.integrations.patching import Report

__all__ = ["Acceleration", "accelerate"]

_LIBRARIES = ("circuit_tracer", "dictionary_learning", "sae_lens", "sparsify")
_installed: dict[str, Installation] = {}


class Acceleration:
    """The handle of one :func:`accelerate`; as a context manager it undoes itself at the end.

    Attributes:
        library: "sae_lens", "sparsify", "dictionary_learning" or "circuit_tracer".
        level: "module" or "trainer".
    """

    def __init__(self, installation: Installation) -> None:
        self.library, self.level = installation.library, installation.level
        self._installation = installation

    def report(self) -> Report:
        """What ran on the kernels and what was left to the library, and why; printable.

        The counts are those of the library: handles that exist at the same time share them.
        """
        return self._installation.ledger.report(self._installation.version)

    def undo(self) -> None:
        """Takes this handle back; with a library's last handle every attribute is restored.

        A second call does nothing. Trainers go on as shipped, with the weights and optimizer states
        that they have.
        """
        installation = self._installation
        if installation.holders.pop(self, self) is self or installation.holders:
            return
        if _installed.get(self.library) is installation:
            del _installed[self.library]
        installation.undo()

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def accelerate(
    target: Any, *, level: str | None = None, optimizer: str | None = None, strict: bool = False
) -> Acceleration:
    """Runs another library's SAEs and trainers on these kernels, with the same results.

    Functions of the library are replaced by ones that call the kernels where the call is one that
    they serve, and the library's own function where it is not (hooks on pre-activations, unknown
    subclasses, other dtypes or devices, torch.compile). ``report()`` of the returned handle says
    which and why. Results agree within the rounding of the arithmetic.

    Accelerating twice is one: a second call returns a handle of its own on the same replaced
    functions, and the last handle to be undone restores them.

    Args:
        target: "sae_lens", "sparsify", "dictionary_learning" or "circuit_tracer" for all of a
            library, or a trainer or an SAE of it, for that one alone.
        level: "module" replaces encoders, decoders and losses, under any training loop and
            optimizer; "trainer" the trainer's inner step as well. None: the deepest that there is.
        optimizer: "fused" switches the trainers' Adam to torch's fused one; None leaves it.
        strict: raise AccelerationError where a call would be left to the library.

    Returns:
        The handle: ``report()``, ``undo()``, and a context manager.

    Raises:
        AccelerationError: the library is not installed or of an unknown version, the target is none
            of its objects or lies on a device that is not served, or the library is accelerated
            already with other options.
        ValueError: an unknown library, level or optimizer.

    Example:
        With SAELens installed, ``with sk.accelerate("sae_lens") as run: trainer.fit()``, and then
        ``print(run.report())``.

        >>> import sae_kernels as sk
        >>> sk.accelerate("sae_lense")
        Traceback (most recent call last):
        ValueError: target: no adapter for 'sae_lense'; did you mean 'sae_lens'?
    """
    if optimizer not in (None, "fused"):
        raise ValueError(f"optimizer: expected 'fused' or None, got {optimizer!r}")
    if level not in (None, *LEVELS):
        raise ValueError(f"level: expected 'module', 'trainer' or None, got {level!r}")
    library = target if isinstance(target, str) else _library_of(target)
    if library not in _LIBRARIES:
        raise ValueError(f"target: no adapter for {library!r}; {name_hint(library, _LIBRARIES)}")
    adapter: Adapter = importlib.import_module(f"{__name__}.{library}").ADAPTER
    version = adapter.check()
    if level is not None and level not in adapter.levels:
        raise AccelerationError(
            f"{library}: expected level {' or '.join(map(repr, adapter.levels))}, got {level!r}"
        )
    level = level or adapter.levels[-1]
    served = None if isinstance(target, str) else _modules(adapter, target)
    options = (level, optimizer, strict)
    installation = _installed.get(library)
    fresh = installation is None
    if installation is not None and installation.options != options:
        raise AccelerationError(
            f"{library} is accelerated already, with (level, optimizer, strict) = "
            f"{installation.options}, and {options} was asked for; undo the other handle first"
        )
    if installation is None:
        installation = _installed[library] = Installation(library, version, *options)
    handle = Acceleration(installation)
    installation.holders[handle] = served
    try:
        if fresh:
            adapter.install(installation)
        if served is not None:
            for each in adapter.optimizers_of(target):
                installation.fuse(each)
    except BaseException:
        handle.undo()
        raise
    return handle


def _library_of(target: object) -> str:
    roots = (kind.__module__.partition(".")[0] for kind in type(target).__mro__)
    found = next((root for root in roots if root in _LIBRARIES), None)
    if found is None:
        raise AccelerationError(
            f"target: expected a trainer or an SAE of {', '.join(_LIBRARIES)}, or one of these "
            f"names, got {type(target).__name__}"
        )
    return found


def _modules(adapter: Adapter, target: object) -> weakref.WeakSet[torch.nn.Module]:
    """The modules of a target, checked to lie on a device that is served."""
    served = weakref.WeakSet(adapter.modules_of(target))
    if not served:
        raise AccelerationError(
            f"{adapter.distribution}: expected one of its trainers or SAEs, got "
            f"{type(target).__name__}, which has none"
        )
    for p in itertools.chain.from_iterable(module.parameters() for module in served):
        why = unfit(p)
        if why:
            raise AccelerationError(
                f"{type(target).__name__}: expected weights that the kernels take, got {why}"
            )
    return served
