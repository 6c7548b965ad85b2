"""Runs the kernels' tests emulated and notes what passed: ``python -m benchmarks.emulated sm_90``.

``benchmarks/results/emulated-sm_90.jsonl`` has the last run's provenance in its first line, then a
line per kernel and backend with its commit; ``python -m benchmarks.gpu_check.page`` puts them on
docs/gpu.md. Where only some tests are named, lines of kernels that none of them tests are kept.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu_check import outcomes
from benchmarks.gpu_check.correctness import by_kernel
from benchmarks.gpu_check.page import RESULTS, ROOT
from sae_kernels.bench.provenance import provenance

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Mapping

TESTS = ("tests/primitives", "tests/functional", "tests/step")


def main() -> None:
    """Writes the file; the exit status is that of the tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", choices=("sm_80", "sm_90"))
    parser.add_argument("tests", nargs="*", default=TESTS, help="default: all tests of kernels")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "outcomes"
        command = [sys.executable, "-m", "pytest", "-p", "benchmarks.gpu_check.outcomes"]
        done = subprocess.run(
            [*command, "--emulate", options.architecture, *options.tests],
            cwd=ROOT,
            env=os.environ | {outcomes.VARIABLE: str(noted)},
        )
        found = by_kernel(outcomes.read(noted).values())
    file = RESULTS / f"emulated-{options.architecture}.jsonl"
    kept = file.read_text() if options.tests is not TESTS else ""
    file.write_text(merged(options.architecture, found, kept))
    raise SystemExit(done.returncode)


def merged(architecture: str, found: Mapping[tuple[str, str], Counter[str]], old: str) -> str:
    """The file's text: what was found, and lines of an older text about other kernels."""
    facts = provenance("python -m benchmarks.emulated")
    ran = {
        (kernel, backend): {"kernel": kernel, "backend": backend}
        | {name: counts[name] for name in ("passed", "failed", "skipped")}
        | {name: facts[name] for name in ("commit", "dirty")}
        for (kernel, backend), counts in found.items()
    }
    before = [json.loads(line) for line in old.splitlines()[1:]]
    every = {(line["kernel"], line["backend"]): line for line in before} | ran
    lines = [{"provenance": facts, "architecture": architecture}, *map(every.get, sorted(every))]
    return "".join(json.dumps(line) + "\n" for line in lines)


if __name__ == "__main__":
    main()
