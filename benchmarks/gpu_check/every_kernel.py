"""Every kernel once, on small tensors: what compute-sanitizer watches.

``python -m benchmarks.gpu_check.every_kernel`` runs the GPU's kernels where there is one, else the
host's. Shapes are no multiples of any tile, so that masks have something to hide.
"""

from __future__ import annotations

import torch

from benchmarks import calls
from sae_kernels import primitives
from sae_kernels.bench.cases import Shape

_SHAPES = (Shape(67, 200, 1031, 5), Shape(33, 768, 4099, 32))


def main() -> None:
    """Runs and names each kernel; a failure ends it."""
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    wanted = calls.GPU_BACKENDS if on_gpu else ("cpu",)
    for primitive in primitives.NAMES:
        for shape in _SHAPES:
            inputs = calls.arguments(primitive, shape, device="cuda" if on_gpu else "cpu")
            for backend in calls.runnable(primitive, inputs, wanted):
                with torch.no_grad():
                    calls.implementation(primitive, backend).run(*inputs)
                if on_gpu:
                    torch.cuda.synchronize()
                print(primitive, backend, *shape, flush=True)


if __name__ == "__main__":
    main()
