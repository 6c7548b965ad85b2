"""What all adapters share: patches that can be undone, the ledger of calls, the report."""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels import backends
from sae_kernels.errors import AccelerationError

if TYPE_CHECKING:
    from collections.abc import Callable

_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_DEVICES = ("cpu", "cuda")


class Patches:
    """Attributes of a library that were replaced, in order, so that all can be put back."""

    def __init__(self) -> None:
        self._saved: list[tuple[Any, str, Any, bool]] = []

    def replace(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        """Sets ``owner.name`` to ``make(original)``; owner is a class, a module or an object.

        An attribute that the owner inherits is inherited again after :meth:`undo`.
        """
        inherited = name not in vars(owner)
        kept = getattr(owner, name) if inherited else vars(owner)[name]  # with its staticmethod
        original = getattr(owner, name)
        new = functools.wraps(original)(make(original))
        bound = isinstance(kept, (staticmethod, classmethod))  # original takes no self
        setattr(owner, name, staticmethod(new) if bound else new)
        self._saved.append((owner, name, kept, inherited))

    def undo(self) -> None:
        """Puts every attribute back, the last replaced first; a second call does nothing."""
        while self._saved:
            owner, name, kept, inherited = self._saved.pop()
            if inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, kept)


@dataclasses.dataclass(frozen=True)
class Left:
    """Calls that stayed with the library: of what, why, and how many."""

    what: str
    why: str
    count: int


@dataclasses.dataclass(frozen=True)
class Report:
    """What ran on the kernels and what was left to the library; print it for a summary.

    Attributes:
        library: the accelerated library.
        version: of the library.
        taken: the number of calls on the kernels, by what was called.
        left: the calls that ran as shipped.
        dense: how often an operation needed codes or pre-activations as a dense tensor, by the
            operation's name.
    """

    library: str
    version: str
    taken: dict[str, int]
    left: tuple[Left, ...]
    dense: dict[str, int]

    def __str__(self) -> str:
        lines = [f"{self.library} {self.version}, accelerated by sae_kernels"]
        lines += [f"  on the kernels  {n:>7} x {what}" for what, n in self.taken.items()]
        lines += [f"  as shipped      {one.count:>7} x {one.what}: {one.why}" for one in self.left]
        lines += [f"  made dense for  {n:>7} x {what}" for what, n in self.dense.items()]
        if len(lines) == 1:
            lines.append("  nothing was called yet")
        return "\n".join(lines)


class Ledger:
    """Counts what was taken and what was left to the library.

    Args:
        library: its name, for messages.
        strict: raise where a call would be left to the library.
    """

    def __init__(self, library: str, *, strict: bool = False) -> None:
        self.library, self.strict = library, strict
        self.taken: Counter[str] = Counter()
        self.refused: Counter[tuple[str, str]] = Counter()
        self.dense: Counter[str] = Counter()

    def took(self, what: str) -> None:
        """Counts a call that runs on the kernels."""
        self.taken[what] += 1

    def left(self, what: str, why: str, *, by_rule: bool = False) -> None:
        """Counts a call that the library runs itself.

        Args:
            what, why: for the report.
            by_rule: the library's way is the faster one here, so strict does not raise.

        Raises:
            AccelerationError: the acceleration is strict.
        """
        self.refused[what, why] += 1
        if self.strict and not by_rule:
            raise AccelerationError(
                f"{self.library}: {what} would run as shipped ({why}), and strict=True asks for an "
                "error instead; change that, or accelerate without strict"
            )

    def takes(self, what: str, why: str | None) -> bool:
        """Counts a call as taken, or as left if there is a reason; whether it was taken."""
        if why:
            self.left(what, why)
            return False
        self.took(what)
        return True

    def made_dense(self, by: str) -> None:
        """Counts an operation that needed a dense tensor in place of entries."""
        self.dense[by] += 1

    def report(self, version: str) -> Report:
        """A copy of the counts."""
        left = tuple(Left(what, why, n) for (what, why), n in self.refused.items())
        return Report(self.library, version, dict(self.taken), left, dict(self.dense))


def unfit(*tensors: torch.Tensor) -> str | None:
    """Why the kernels cannot take these tensors, or None.

    Under torch.compile, functorch transforms and with tensor subclasses (DTensor, fake tensors) the
    library's own code runs.
    """
    if torch.compiler.is_compiling():
        return "torch.compile traces it"
    level = getattr(torch._C._functorch, "maybe_current_level", None)
    if level is not None and level() is not None:
        return "a torch.func transform is at work"
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            return f"a tensor of type {type(tensor).__name__}"
        if tensor.dtype not in _DTYPES:
            return f"dtype {tensor.dtype}"
        if tensor.device.type not in _DEVICES:
            return f"device {tensor.device.type}"
    if len({tensor.device for tensor in tensors}) > 1:
        return "tensors on several devices"
    return _no_kernels(tensors[0].device.type, tensors[0].dtype)


@functools.cache
def _no_kernels(device: str, dtype: torch.dtype) -> str | None:
    """Why only the reference could run here, which is slower than the library; or None."""
    found = backends.candidates("select_topk", torch.device(device), dtype)
    fast = [each for each in found if each.backend != "reference"]
    if any(each.reason is None for each in fast):
        return None
    reasons = "; ".join(f"{each.backend}: {each.reason}" for each in fast)
    return f"no kernels for {dtype} on {device} ({reasons})"


def hooked(module: Any) -> bool:
    """Whether somebody watches a module (a hook point, for instance) from outside."""
    names = (
        "_forward_hooks",
        "_forward_pre_hooks",
        "_backward_hooks",
        "_backward_pre_hooks",
    )
    return any(getattr(module, name, None) for name in names)
