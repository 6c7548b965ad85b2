"""Every optional argument of every GPU kernel, given and left out, as the schemas have them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import calls
from benchmarks.gpu_check import oracles
from emulator import cuda_kernels, triton_driver
from sae_kernels.bench.cases import Shape
from sae_kernels.primitives.row_update import halves

SHAPE = Shape(17, 64, 320, 5)  # more than a few tokens, whose kernels have fewer forms
CASES = [
    (primitive, backend, options)
    for primitive, backend in calls.kernels()
    for options in calls.forms(primitive) or [{}]
]


def name(case: tuple[str, str, dict[str, Any]]) -> str:
    primitive, backend, options = case
    words = "-".join(f"{key}={value}" for key, value in options.items()) or "all"
    return f"{primitive}-{backend}-{words}"


def inputs(primitive: str, options: dict[str, Any]) -> tuple[Any, ...]:
    """The same every time."""
    torch.manual_seed(0)
    return calls.arguments(primitive, SHAPE, torch.bfloat16, **options)


@pytest.mark.parametrize("primitive", sorted({primitive for primitive, _ in calls.kernels()}))
def test_the_cases_give_and_leave_out_every_optional_column(primitive: str) -> None:
    given: dict[str, set[bool]] = {column: set() for column in calls.optional(primitive)}
    for options in calls.forms(primitive):
        columns = calls.flat(primitive, inputs(primitive, options))
        for column, seen in given.items():
            value = columns[column]
            seen.add((value[0] if isinstance(value, list) else value) is not None)
    assert all(seen == {True, False} for seen in given.values()), given


@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=name)
def test_against_the_reference(case: tuple[str, str, dict[str, Any]]) -> None:
    primitive, backend, options = case
    architecture = 90 if backend == "gluon" else 80
    arguments, expected = inputs(primitive, options), inputs(primitive, options)
    with triton_driver.emulated(architecture), cuda_kernels.emulated(architecture):
        if backend == "cuda" and cuda_kernels.unavailable():
            pytest.skip(str(cuda_kernels.unavailable()))
        refuses = getattr(calls.implementation(primitive, backend), "refuses", None)
        if refuses is not None and refuses(*arguments):
            pytest.skip(str(refuses(*arguments)))
        came = calls.implementation(primitive, backend).run(*arguments)
    wanted = calls.implementation(primitive, "reference").run(*expected)
    if options.get("split") and primitive == "row_update":
        # Low halves mean nothing alone, and a high half may be the next one.
        joined = [halves.joined(row.copy, row.param) for row in (arguments[0], expected[0])]
        arguments = (joined[0], *arguments[0][1:3])
        expected = (joined[1], *expected[0][1:3])
    assert oracles.difference([came, arguments], [wanted, expected]) == ""
