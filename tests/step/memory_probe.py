"""How much memory a script takes at its highest, in a process of its own.

Each case runs in a process of its own, which resets its high-water mark (VmHWM) by writing 5 to
/proc/self/clear_refs once everything that is not the step's own is resident: the libraries and
thread pools (a step of a tiny SAE pays for them), weights, compute copies, Adam states (written
once, as fresh zeros occupy no memory) and the batch. What it reports is VmHWM after the work less
VmRSS before: every buffer of the step itself counts, also those torch's allocator keeps.
"""

from __future__ import annotations

import subprocess
import sys

_PRELUDE = """
import torch
from sae_kernels.functional import encode_topk
from sae_kernels.nn import TopKSAE
from sae_kernels.config import OptimizerConfig
from sae_kernels.step import FusedStep

torch.set_num_threads(2)

def memory(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1024 for line in status if line.startswith(field))

def start():
    with open("/proc/self/clear_refs", "w") as control:
        control.write("5")
    return memory("VmRSS")

BF16 = OptimizerConfig(compute="bfloat16")
tiny = FusedStep(TopKSAE(64, 256, k=8), optimizer=BF16)
for _ in range(2):
    tiny(torch.randn(256, 64), lr=1e-3)
"""


def mebibytes(script: str, **values: object) -> float:
    """What the script prints, run after the prelude with these values in the place of names."""
    for name, value in values.items():
        script = script.replace(name, str(value))
    done = subprocess.run(
        [sys.executable, "-c", _PRELUDE + script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout)
