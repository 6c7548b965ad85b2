"""Runs the kernels' tests emulated and notes what passed: ``python -m benchmarks.emulated sm_90``.

``benchmarks/results/emulated-sm_90.jsonl`` has the provenance in its first line, then a line per
kernel and backend; ``python -m benchmarks.gpu_check.page`` puts them on docs/gpu.md.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.gpu_check import outcomes
from benchmarks.gpu_check.correctness import by_kernel
from benchmarks.gpu_check.page import RESULTS, ROOT
from sae_kernels.bench.provenance import provenance

TESTS = ("tests/primitives", "tests/functional", "tests/step")


def main() -> None:
    """Writes the file; the exit status is that of the tests."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", choices=("sm_80", "sm_90"))
    architecture = parser.parse_args().architecture
    with tempfile.TemporaryDirectory() as folder:
        noted = Path(folder) / "outcomes"
        options = ["-p", "benchmarks.gpu_check.outcomes", "--emulate", architecture]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, *TESTS],
            cwd=ROOT,
            env=os.environ | {outcomes.VARIABLE: str(noted)},
        )
        found = outcomes.read(noted).values()
    lines: list[dict[str, object]] = [
        {"provenance": provenance("python -m benchmarks.emulated"), "architecture": architecture}
    ]
    for (kernel, backend), counts in sorted(by_kernel(found).items()):
        numbers = {name: counts[name] for name in ("passed", "failed", "skipped")}
        lines.append({"kernel": kernel, "backend": backend, **numbers})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (RESULTS / f"emulated-{architecture}.jsonl").write_text(text)
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
