"""What an adapter of a library is, and the checks of the library before it is touched."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import inspect
import io
import textwrap
import tokenize
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
        tested: versions that the tests ran against; others of the range must have the same code.
        oldest, below: the range of versions, ``oldest <= version < below``.
        levels: those that it has, shallow first.
        seams: what is replaced or relied on, ``"module:Class.function"``, and the
            :func:`fingerprint` of its code in the tested versions.
        install: replaces them, in the installation's patches.
        modules_of: the accelerated modules of a trainer or of a module; none for other objects.
        optimizers_of: the optimizers of a trainer that exists already; none of other objects.
    """

    distribution: str
    tested: tuple[str, ...]
    oldest: str
    below: str
    levels: tuple[str, ...]
    seams: Mapping[str, str]
    install: Callable[[Installation], None]
    modules_of: Callable[[Any], Iterable[torch.nn.Module]]
    optimizers_of: Callable[[Any], Iterable[torch.optim.Optimizer]]

    def check(self) -> str:
        """Checks that the library is there and one that this adapter knows; returns its version.

        Raises:
            AccelerationError: it is not installed, too old, too new, or has other code.
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
        changed = [seam for seam, code in self.seams.items() if fingerprint(seam) != code]
        if changed:
            raise AccelerationError(
                f"{name} {version}: expected the code of a tested version ("
                f"{', '.join(self.tested)}) in all that is replaced, got another in "
                f"{', '.join(changed)}; install one of these"
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


def fingerprint(seam: str) -> str | None:
    """A short hash of a function's or class's code; None where there is none of that name.

    Comments, docstrings and layout do not count. A formula may change under the same signature, so
    adapters compare this. Replaced functions answer as the library's own.

    Args:
        seam: "module:name" or "module:Class.function".

    Example:
        >>> fingerprint("json:no_such_name") is None
        True
    """
    module, _, path = seam.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(found)))
    except (ImportError, AttributeError, OSError, TypeError):
        return None
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    kept, starts = [], True  # starts: a string here would be a statement, that is a docstring
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in skipped:
            starts = starts or token.type != tokenize.COMMENT
        elif not (starts and token.type == tokenize.STRING):
            kept.append(token.string)
            starts = False
    return hashlib.sha256("".join(kept).encode()).hexdigest()[:12]
