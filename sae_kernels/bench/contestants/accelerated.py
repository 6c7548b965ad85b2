"""A peer with these kernels under it: its contestant as it is, within ``sk.accelerate``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .contestant import Unable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PACKAGE = Path(__file__).resolve().parents[2]
Calls = dict[str, dict[str, int]]


@contextmanager
def accelerated(library: str, level: str) -> Iterator[Callable[[], Calls]]:
    """Accelerates a library within the block.

    Yields:
        A function that tells what became of the calls since it was last asked (:func:`calls`).

    Raises:
        Unable: the library cannot be accelerated here; the message says why.
    """
    sk = _sae_kernels()
    try:
        handle = sk.accelerate(library, level=level)
    except sk.errors.AccelerationError as error:
        raise Unable(str(error)) from None
    before: Calls = {}

    def since() -> Calls:
        nonlocal before
        now, earlier = calls(handle.report()), before
        before = now
        return {kind: dict(Counter(n) - Counter(earlier.get(kind, {}))) for kind, n in now.items()}

    with handle:
        yield since


def calls(report: Any) -> Calls:
    """A report of the acceleration as counts by text.

    Of calls on the kernels ("taken"), of calls that ran as shipped, with the reason ("left"), and
    of operations that needed codes or pre-activations as a dense tensor ("dense").
    """
    left = {f"{one.what} ({one.why})": one.count for one in report.left}
    return {"taken": dict(report.taken), "left": left, "dense": dict(report.dense)}


def _sae_kernels() -> Any:
    """This package, by its place: a peer's environment has none, and must get no other."""
    name = _PACKAGE.name
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _PACKAGE / "__init__.py")
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
