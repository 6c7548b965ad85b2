"""What an adapter of a library is, and the checks of the library before it is touched."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from importlib import metadata
from typing import TYPE_CHECKING, Any

from sae_kernels.errors import AccelerationError
from sae_kernels.integrations.layout import LatentRows
from sae_kernels.integrations.optimizer import FusedAdam
from sae_kernels.integrations.patching import Ledger, Patches

if TYPE_CHECKING:
    import weakref
    from collections.abc import Callable, Iterable, Mapping

    import torch

LEVELS = ("module", "trainer")


class Installation:
    """One accelerated library: its patches, its ledger, and whom they serve.

    Attributes:
        level: "module" or "trainer": how deep the patches go.
        optimizer: "fused" for torch's fused Adam, or None for the library's choice.
        patches, ledger, rows, fused: what adapters work with.
    """

    def __init__(
        self, library: str, version: str, level: str, optimizer: str | None, strict: bool
    ) -> None:
        self.library, self.version = library, version
        self.level, self.optimizer, self.strict = level, optimizer, strict
        self.patches, self.rows = Patches(), LatentRows()
        self.ledger = Ledger(library, strict=strict)
        self.fused = FusedAdam()
        # Of each handle the modules it serves; None for the whole library.
        self.holders: dict[object, weakref.WeakSet[torch.nn.Module] | None] = {}

    @property
    def options(self) -> tuple[str, str | None, bool]:
        """What must be the same of all handles at a time."""
        return self.level, self.optimizer, self.strict

    def fuse(self, optimizer: object) -> None:
        """Fuses an optimizer where ``optimizer="fused"`` was asked for; counts it."""
        if self.optimizer is None:
            return
        why = self.fused.apply(optimizer)
        if why:
            self.ledger.left("optimizer", why)
        else:
            self.ledger.took("fused Adam")

    def covers(self, module: object) -> bool:
        """Whether the calls of this module are to be accelerated."""
        return any(served is None or module in served for served in self.holders.values())

    def undo(self) -> None:
        """Puts back all attributes, then the weights' layout and the optimizers' options."""
        self.patches.undo()
        self.rows.undo()
        self.fused.undo()


@dataclasses.dataclass(frozen=True)
class Adapter:
    """How a library is accelerated.

    Attributes:
        distribution: the name that pip knows.
        tested: versions that the tests ran against; others of the range must have the same seams.
        oldest, below: the range of versions, ``oldest <= version < below``.
        levels: those that it has, shallow first.
        seams: what is replaced, ``"module:Class.function"``, and its parameters' names.
        install: replaces them, in the installation's patches.
        modules_of: the accelerated modules of a trainer or of a module; none for other objects.
        optimizers_of: the optimizers of a trainer that exists already; none of other objects.
    """

    distribution: str
    tested: tuple[str, ...]
    oldest: str
    below: str
    levels: tuple[str, ...]
    seams: Mapping[str, tuple[str, ...]]
    install: Callable[[Installation], None]
    modules_of: Callable[[Any], Iterable[torch.nn.Module]]
    optimizers_of: Callable[[Any], Iterable[torch.optim.Optimizer]]

    def check(self) -> str:
        """Checks that the library is there and one that this adapter knows; returns its version.

        Raises:
            AccelerationError: it is not installed, too old, too new, or has other seams.
        """
        name = self.distribution
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            raise AccelerationError(
                f"{name}: expected the library to be installed, it is not; pip install {name}"
            ) from None
        if not _numbers(self.oldest) <= _numbers(version) < _numbers(self.below):
            raise AccelerationError(
                f"{name}: expected a version from {self.oldest} to below {self.below} (tested: "
                f"{', '.join(self.tested)}), got {version}; install one of these"
            )
        for seam, expected in self.seams.items():
            found = _parameters(seam)
            if found != expected:
                got = "nothing of that name" if found is None else f"({', '.join(found)})"
                raise AccelerationError(
                    f"{name} {version}: expected {seam}({', '.join(expected)}), got {got}; tested "
                    f"are {', '.join(self.tested)}"
                )
        return version


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: (6, 54, 12) of 6.54.12.post1."""
    numbers = []
    for part in version.split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _parameters(seam: str) -> tuple[str, ...] | None:
    module, _, path = seam.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
    except (ImportError, AttributeError):
        return None
    return tuple(inspect.signature(found).parameters)
