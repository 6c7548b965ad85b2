"""Providers: ours, plain torch, the peer packages, and reference rates of the machine."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels import machine
from sae_kernels.bench import environments
from sae_kernels.bench.contestants.contestant import Task
from sae_kernels.errors import name_hint
from sae_kernels.integrations.adapters import LEVELS
from sae_kernels.step.base import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from sae_kernels.bench.cases import Case


class Provider(NamedTuple):
    """A library in a dtype with options, which takes part in a benchmark."""

    name: str
    dtype: str  # "float32", or "bfloat16" products with fp32 weights
    module: str  # of the folder ``contestants``, or any one by its dotted name
    options: dict[str, Any]  # for the module
    as_shipped: bool = False  # what its user gets without asking for another dtype
    operations: tuple[str, ...] = ("encode", "decode", "sae", "step")
    devices: tuple[str, ...] = ("cpu", "cuda")
    operation: str | None = None  # done in the place of the case's: a rate of the machine

    @property
    def key(self) -> str:
        """The unique key of a provider: its name and dtype."""
        return f"{self.name} {self.dtype}"

    @property
    def python(self) -> Path | str | None:
        """The Python interpreter with its package; None if that is not installed."""
        peer = self.module in environments.PEERS
        return environments.python_of(self.module) if peer else sys.executable

    def unable(self, case: Case, device: str) -> str | None:
        """The reason why it cannot run a case, or None."""
        if device not in self.devices:
            return f"it runs on {' and '.join(self.devices)} only"
        if case.operation not in self.operations:
            alike = "the same as at level module: the trainer level is of training steps"
            return alike if self.accelerated else f"it has no {case.operation}"
        if self.python is None:
            return f"not installed; sae-kernels bench --setup-peers {self.module} installs it"
        if device == "cpu" and self.dtype == "bfloat16" and not self._own_products:
            slowdown = machine.bf16_slowdown()
            if slowdown > _MOST_SLOWDOWN:
                return (
                    f"left out: torch's bfloat16 product takes {slowdown:.1f} times as long as its "
                    "float32 one on this CPU"
                )
        return None

    @property
    def _own_products(self) -> bool:
        """Whether its products are this package's kernels and not torch's."""
        ours = self.module == "ours" and self.options.get("backend") != "reference"
        return ours or self.accelerated

    @property
    def accelerated(self) -> bool:
        """Whether it is another library, of the name of its module, on our kernels."""
        return "accelerate" in self.options

    def task(self, case: Case, device: str, options: dict[str, float]) -> Task:
        """The contestant's task for a case, with the options of the case's data."""
        what = self.operation or case.operation, "inference" if self.operation else case.mode
        own = {**options, **self.options}
        return Task(*what, case.architecture, case.shape.K, self.dtype, device, own)


# Of torch's bf16 product on a CPU, in times of the fp32 one (2.5 to 5 where there is AVX2 alone).
# Nobody trains in bf16 where it is so slow, and who did would take the time of all others.
_MOST_SLOWDOWN = 1.5


def _both(
    name: str, module: str, *dtypes: str, options: dict[str, Any] | None = None, **more: Any
) -> list[Provider]:
    return [Provider(name, dtype, module, options or {}, **more) for dtype in dtypes]


_OURS, _THEIRS = ("bfloat16", "float32"), ("float32", "bfloat16")  # what is shipped comes first
_GPU: dict[str, Any] = {"devices": ("cuda",)}
_RATE: dict[str, Any] = {"operations": ("encode", "sae", "step"), "operation": "product"}


def _accelerated(peer: str) -> list[Provider]:
    """A peer as it comes, and at each level of the acceleration."""
    found = _both(peer, peer, *_THEIRS)
    for level in LEVELS:
        more: dict[str, Any] = {"operations": ("step",)} if level == "trainer" else {}
        more["options"] = {"accelerate": level}
        found += _both(f"{peer}+ours:{level}", peer, *_THEIRS, **more)
    return found


# In the order in which tables show them.
GROUPS: dict[str, list[Provider]] = {
    "ours": [
        *_both("ours", "ours", *_OURS),
        *_both("product", "rates", *_OURS, **_RATE),
        *_both("copy", "rates", "int8", operation="copy"),
    ],
    "ours-reference": _both("ours-reference", "ours", *_OURS, options={"backend": "reference"}),
    "ours-triton": _both("ours-triton", "ours", *_OURS, options={"backend": "triton"}, **_GPU),
    "dense": _both("dense", "dense", *_THEIRS),
    "dense_compile": _both("dense_compile", "dense", "bfloat16", options={"compile": 1}),
    "cusparse": _both("cusparse", "cusparse", "float32", operations=("decode",), **_GPU),
    **{peer: _both(peer, peer, *_THEIRS) for peer in environments.PEERS},
    **{f"{peer}+ours": _accelerated(peer) for peer in environments.PEERS},
}


def chosen(against: Iterable[str], device: str) -> list[Provider]:
    """Our providers and those of the named groups, for a device ("cpu", "cuda").

    Raises:
        ValueError: an unknown name.
    """
    names = ["ours", *against]
    for name in names:
        if name not in GROUPS:
            raise ValueError(f"--against: no provider {name!r}; {name_hint(name, GROUPS)}")
    auto = str(compute_dtype("auto", torch.device(device))).removeprefix("torch.")
    shipped = {"ours": auto}
    if device == "cuda":  # where it puts its forward pass under autocast whatever it is told
        shipped["sparsify"] = "bfloat16"
    found = {p.key: p for group in GROUPS if group in names for p in GROUPS[group]}
    return [
        p._replace(
            as_shipped=not (p.operation or p.accelerated)
            and p.dtype == shipped.get(p.module, "float32")
        )
        for p in found.values()
    ]
