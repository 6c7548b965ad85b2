"""What is asked of the kernels, task by task and in the order of `stages`.

A task is a generator of records that runs in a process of its own, with a time limit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from benchmarks import calls
from benchmarks.gpu_check import epilogue, kernels, oracles, screens, steps
from sae_kernels import primitives

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu_check.bench import Bench, Record


class Task(NamedTuple):
    """One question.

    Attributes:
        run: yields its records.
        limit_s: it is killed after so long.
        least_s: not begun with less time than this left.
    """

    run: Callable[[Bench], Iterator[Record]]
    limit_s: float = 60
    least_s: float = 8


def _task(run: Callable[..., Iterator[Record]], *arguments: object, **times: float) -> Task:
    return Task(lambda bench: run(bench, *arguments), **times)


def _oracle(primitive: str, backend: str) -> dict[str, Task]:
    name = f"oracle {primitive} {backend}"
    return {name: _task(oracles.compared, primitive, backend, limit_s=20)}


ORACLES: dict[str, Task] = {}
GLUON: dict[str, Task] = {}  # apart: what it asks of the hardware is the least tried
for _primitive, _backend in calls.kernels():
    (GLUON if _backend == "gluon" else ORACLES).update(_oracle(_primitive, _backend))

RATES = {"rates": _task(kernels.device_rates)}
SELECT = {
    f"select {name} {backend}": _task(kernels.select, name, backend)
    for name in ("gpu-small", "gpu-mid")
    for backend in ("triton", "cuda", "gluon")
} | {f"few tokens {n}": _task(kernels.few_tokens, "gpu-small", n) for n in (1, 4, 16)}
SCREEN = {
    f"screen {primitive} {name}": _task(screens.screened, primitive, name, limit_s=90)
    for primitive, name in (
        ("select_topk", "gpu-small"),
        ("select_topk", "gpu-mid"),
        ("select_threshold", "gpu-small"),
        ("select_batch_topk", "gpu-small"),
    )
}
STEP = {f"step {name}": _task(steps.step, name) for name in ("gpu-small", "gpu-mid")}
DECODE = {"decode": _task(kernels.decode_both_ways)}
HOT = {"hot latents": _task(steps.hot)}
REPEATS = {
    **{f"repeats {name}": _task(kernels.repeats, name) for name in primitives.NAMES},
    "repeats step": _task(steps.repeats),
}
MORE = {
    "routed 8": _task(kernels.routed, "gpu-small", 8),
    "routed 32": _task(kernels.routed, "gpu-small", 32),
    "wide split-master": _task(steps.wide, "split-master", limit_s=90, least_s=30),
    "dense gpu-small": _task(steps.dense, "gpu-small", limit_s=90, least_s=30),
    "dense gpu-mid": _task(steps.dense, "gpu-mid", limit_s=90, least_s=30),
    "eager gpu-small": _task(steps.eager, "gpu-small"),
    "epilogue gpu-small": _task(epilogue.costs, "gpu-small"),
    "epilogue gpu-mid": _task(epilogue.costs, "gpu-mid"),
    "residual": _task(kernels.decode_residual),
    "rows": _task(kernels.rows),
    "transpose": _task(kernels.transpose),
    "topk gpu-small": _task(kernels.torch_topk, "gpu-small"),
    "topk gpu-mid": _task(kernels.torch_topk, "gpu-mid"),
    # Nobody's call is screened in bf16 yet: whether it should be is what these are for.
    **{
        f"screen select_threshold {name} bf16": _task(
            screens.screened, "select_threshold", name, torch.bfloat16, limit_s=90, least_s=30
        )
        for name in ("gpu-small", "gpu-wide")
    },
    "wide encoder-copy": _task(steps.wide, "encoder-copy-only", limit_s=90, least_s=30),
}
TASKS = {
    **ORACLES,
    **GLUON,
    **RATES,
    **SELECT,
    **STEP,
    **SCREEN,
    **DECODE,
    **HOT,
    **REPEATS,
    **MORE,
}
