"""What a worker tells of an accelerated library, and where it cannot be accelerated."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import sae_kernels.bench
from sae_kernels.bench.contestants.accelerated import accelerated, calls
from sae_kernels.bench.contestants.contestant import Unable
from sae_kernels.bench.environments import PEERS
from sae_kernels.bench.providers import chosen
from sae_kernels.integrations.patching import Ledger


def test_a_report_becomes_counts() -> None:
    ledger = Ledger("sae_lens")
    ledger.took("encode")
    ledger.took("encode")
    ledger.left("decode", "hooks")
    ledger.made_dense("max")
    assert calls(ledger.report("6.54.12")) == {
        "taken": {"encode": 2},
        "left": {"decode (hooks)": 1},
        "dense": {"max": 1},
    }


@pytest.mark.parametrize("library", PEERS)
def test_a_library_that_is_not_there_makes_the_contestant_unable(library: str) -> None:
    if find_spec(library) is not None:
        pytest.skip(f"{library} is installed here")
    name = PEERS[library].partition("==")[0]
    with (
        pytest.raises(Unable, match=f"{name}: expected the library to be installed"),
        accelerated(library, "module"),
    ):
        pass


def test_without_the_package_on_the_path_it_is_found_by_its_place() -> None:
    """As in a peer's environment, where the contestants' folder alone is on the path."""
    bench = Path(sae_kernels.bench.__path__[0]).resolve()
    script = (
        f"import sys; sys.path.append({str(bench)!r})\n"
        "from contestants import accelerated\n"
        "assert 'sae_kernels' not in sys.modules\n"
        "found = accelerated._sae_kernels()\n"
        "print(found.__path__[0], found.accelerate)\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{bench.parent} <function accelerate")


def test_the_library_alone_is_as_shipped_and_none_that_is_accelerated() -> None:
    for device, dtype in (("cpu", "float32"), ("cuda", "bfloat16")):
        who = [p for p in chosen(["sparsify+ours"], device) if p.module == "sparsify"]
        assert [p.key for p in who if p.as_shipped] == [f"sparsify {dtype}"]
        assert len({p.key for p in who}) == 6
