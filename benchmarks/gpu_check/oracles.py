"""Every kernel once against its oracle, the reference implementation, on small tensors.

Shapes are no multiples of any tile, so that masks have something to hide. ``python -m
benchmarks.gpu_check.oracles PRIMITIVE BACKEND`` runs one kernel bare: what compute-sanitizer
watches.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import calls
from benchmarks.gpu_check.bench import Bench
from sae_kernels.bench.cases import Shape

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu_check.bench import Record

SHAPES = (Shape(67, 200, 1031, 5), Shape(33, 768, 4099, 32))
# With many latents pick_dead launches other kernels, encoders with few tokens.
_FEW = tuple(Shape(B, 768, 4099, 32) for B in (1, 4, 16))
MORE = {
    "pick_dead": (Shape(3, 16, 40_001, 4),),
    **dict.fromkeys(("select_topk", "select_topk_routed", "select_threshold"), _FEW),
}
# bf16 results: one unit in the last place. Of fp32 ones the order of sums differs, and what was
# rounded to bf16 on the way may be its neighbour.
TOLERANCE = 2.0**-7


def shapes(primitive: str) -> tuple[Shape, ...]:
    """The shapes at which a primitive is compared."""
    return SHAPES + MORE.get(primitive, ())


def arguments(bench: Bench, primitive: str, shape: Shape) -> tuple[Any, ...]:
    """The same every time, with scores whose sums are exact: no order of summation moves a choice.

    Multiples of 1/16 below 4 and of 1/512 below 1/4 are bf16 numbers, and sums of their products
    have 24 bits.
    """
    torch.manual_seed(0)
    made = bench.inputs(primitive, shape)
    for name, unit, bound in (("x", 2**-4, 4.0), ("W", 2**-9, 0.25), ("W_enc", 2**-9, 0.25)):
        tensor = calls.flat(primitive, made).get(name)
        if isinstance(tensor, torch.Tensor):
            tensor.div_(unit).round_().mul_(unit).clamp_(-bound + unit, bound - unit)
    return made


def compared(bench: Bench, primitive: str, backend: str) -> Iterator[Record]:
    """Results, and what is written into arguments, against the reference's."""
    for wanted in SHAPES[:1] if bench.dry else shapes(primitive):
        shape = bench.cut(wanted)
        ours, exact = (arguments(bench, primitive, shape) for _ in range(2))
        if backend not in calls.runnable(primitive, ours, (backend,)):
            why = calls.reason(primitive, ours, backend)
            yield {"kind": "not available", "what": f"{primitive} on {backend}", "why": why}
            return
        with torch.no_grad():
            came = calls.implementation(primitive, backend).run(*ours)
            if bench.compiling:
                continue
            known = calls.implementation(primitive, "reference").run(*exact)
        why = difference([came, ours], [known, exact])
        found = {"kind": "oracle", "kernel": primitive, "backend": backend, "shape": [*shape]}
        yield {**found, "ok": not why, "why": why}


def tensors(value: Any) -> list[torch.Tensor]:
    """All tensors of arguments or results, in order."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, (tuple, list)):
        return [tensor for part in value for tensor in tensors(part)]
    return []


def difference(came: Any, wanted: Any) -> str:
    """The first difference in words: integers are equal, others within `TOLERANCE`; or ""."""
    pairs = zip(tensors(came), tensors(wanted), strict=True)
    for i, (actual, exact) in enumerate(pairs):
        if (actual.shape, actual.dtype) != (exact.shape, exact.dtype):
            return (
                f"tensor {i} is {actual.dtype} {[*actual.shape]}, expected {exact.dtype} "
                f"{[*exact.shape]}"
            )
        if not exact.is_floating_point():
            different = int((actual != exact).sum())
            if different:
                return f"tensor {i}: {different} of {exact.numel()} integers differ"
        elif exact.numel():
            error = float((actual.double() - exact.double()).abs().max())
            bound = TOLERANCE * float(exact.abs().max())
            if not error <= bound:
                return f"tensor {i}: an error of {error:.3g}, expected at most {bound:.3g}"
    return ""


def main() -> None:
    """Runs a kernel on the GPU and prints its shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("primitive")
    parser.add_argument("backend")
    options = parser.parse_args()
    bench = Bench(torch.device("cuda"), dry=False)
    for shape in shapes(options.primitive):
        with torch.no_grad():
            run = calls.implementation(options.primitive, options.backend).run
            run(*arguments(bench, options.primitive, shape))
        torch.cuda.synchronize()
        print(*shape, flush=True)


if __name__ == "__main__":
    main()
