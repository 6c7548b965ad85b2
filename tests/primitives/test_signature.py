"""The operator and every implementation follow the signature of the primitive's function."""

import importlib
import inspect
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import torch

from sae_kernels import backends, primitives
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.signature import columns, parameters, schema
from sae_kernels.testing import assert_bitwise


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor | None


class Sum(NamedTuple):
    pairs: Sequence[Pair]
    scale: torch.Tensor


def declared(
    x: torch.Tensor,
    total: Sum,
    others: Sequence[Pair],
    k: int,
    rates: Sequence[float] = (1.0, 2.0),
    *,
    exact: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    raise NotImplementedError


def test_a_schema_spells_every_argument() -> None:
    assert schema(declared, writes=("x", "scale")) == (
        "declared(Tensor(a0!) x, Tensor[] pairs_left, Tensor?[] pairs_right, Tensor(a3!) scale,"
        " Tensor[] others_left, Tensor?[] others_right, SymInt k, float[] rates, bool exact,"
        " str? backend) -> (Tensor, Tensor)"
    )


def test_a_function_without_a_result_has_an_empty_one() -> None:
    def quiet(x: torch.Tensor) -> None: ...

    def single(x: torch.Tensor) -> torch.Tensor: ...  # type: ignore[empty-body]

    assert schema(quiet) == "quiet(Tensor x) -> ()"
    assert schema(single) == "single(Tensor x) -> (Tensor)"


def test_what_no_operator_takes_is_refused() -> None:
    def bad(x: Sequence[set[int]]) -> None: ...

    with pytest.raises(TypeError, match=r"expected Tensor, .* got set\[int\]"):
        schema(bad)


def test_arguments_come_back_from_their_columns() -> None:
    x, y = torch.zeros(1), torch.ones(1)
    total = Sum([Pair(x, None), Pair(y, x)], y)
    for value in (total, Sum([], y)):
        kind = parameters(declared)[1].kind
        flat: list[Any] = []
        kind.flatten(value, flat)
        assert len(flat) == len(columns(parameters(declared)[1:2])) == 3
        again = kind.unflatten(iter(flat))
        assert isinstance(again, Sum)
        assert again.scale is y
        assert [tuple(map(id, pair)) for pair in again.pairs] == [
            tuple(map(id, pair)) for pair in value.pairs
        ]


def _function(primitive: str) -> Any:
    return getattr(importlib.import_module(f"sae_kernels.primitives.{primitive}"), primitive)


@pytest.mark.parametrize("primitive", primitives.NAMES)
def test_implementations_take_the_declared_arguments(primitive: str) -> None:
    names = list(inspect.signature(_function(primitive)).parameters)
    assert names[-1] == "backend"
    written = 0
    for backend in backends.NAMES:
        name = f"sae_kernels.primitives.{primitive}.{backend}"
        if importlib.util.find_spec(name) is None:
            continue
        if backend in ("triton", "gluon"):
            pytest.importorskip("triton", minversion="3.6")
        written += 1
        taken = inspect.signature(importlib.import_module(name).run).parameters.values()
        own = [p.name.removeprefix("_") for p in taken]
        assert own[: len(names) - 1] == names[:-1], name
        # An implementation may take more for its own kind of callers, but the operator gives none.
        assert all(p.default is not p.empty for p in list(taken)[len(names) - 1 :]), name
    assert written >= 2


@pytest.mark.parametrize("primitive", primitives.NAMES)
def test_every_argument_is_documented(primitive: str) -> None:
    text = inspect.getdoc(_function(primitive)) or ""
    for name in inspect.signature(_function(primitive)).parameters:
        assert f" {name}:" in text or f" {name}," in text or f", {name}:" in text, name


def test_arguments_may_be_given_by_name() -> None:
    x, W, scale = torch.randn(3, 4), torch.randn(9, 4), torch.rand(9) + 0.5
    expected = select_topk(x, W, None, 2, scale)
    came = select_topk(k=2, rank_scale=scale, W=W, x=x, b=None, backend="cpu")
    assert_bitwise("values", came[0], expected[0])
    assert_bitwise("indices", came[1], expected[1])


def test_missing_and_unknown_arguments_are_pythons_own_errors() -> None:
    x, W = torch.randn(3, 4), torch.randn(9, 4)
    with pytest.raises(TypeError, match="missing 1 required positional argument: 'k'"):
        select_topk(x, W, None)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="unexpected keyword argument 'scale'"):
        select_topk(x, W, None, 2, scale=None)  # type: ignore[call-arg]


def test_a_call_looks_like_its_function() -> None:
    assert row_grad.__name__ == "row_grad"
    assert list(inspect.signature(row_grad).parameters) == [
        "terms",
        "n_latents",
        "width",
        "dtype",
        "W",
        "backend",
    ]
