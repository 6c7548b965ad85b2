"""Calls that go straight to their implementation, and those that must meet torch's dispatcher."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from sae_kernels import encode_topk
from sae_kernels.primitives.operator import unobserved
from sae_kernels.primitives.row_grad import row_grad
from sae_kernels.primitives.select_topk import select_topk
from sae_kernels.primitives.terms import Term

if TYPE_CHECKING:
    from collections.abc import Iterator

x, W = torch.randn(5, 8), torch.randn(16, 8)


@pytest.fixture(autouse=True)
def _unrecorded() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def dispatched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes the calls that take the way through the dispatcher."""
    seen = []
    for operator in (select_topk, row_grad):

        def noted(*given: Any, op: Any = operator.op, name: str = operator.name) -> Any:
            seen.append(name)
            return op(*given)

        monkeypatch.setattr(operator, "op", noted)
    return seen


class _Watching(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


class _Own(torch.Tensor):
    pass


def test_both_ways_give_the_same(dispatched: list[str]) -> None:
    direct = select_topk(x, W, None, 3)
    assert dispatched == []
    with torch.enable_grad():
        through = select_topk(x, W, None, 3)
    assert dispatched == ["select_topk"]
    assert all(map(torch.equal, direct, through))


def test_named_tuples_and_lists_of_them_go_straight(dispatched: list[str]) -> None:
    offsets, entries = torch.tensor([0, 2, 2], dtype=torch.int32), torch.arange(2).int()
    term = Term(offsets, entries, entries, torch.ones(2), torch.ones(2, 3))
    assert row_grad([term, term], 2, 3)[0].tolist() == [[4.0] * 3, [0.0] * 3]
    assert dispatched == []


def test_whoever_watches_sees_the_operator(dispatched: list[str]) -> None:
    with _Watching():
        select_topk(x, W, None, 3)
    with torch.profiler.profile() as profile:
        select_topk(x, W, None, 3)
    with torch.autograd.forward_ad.dual_level():
        select_topk(x, W, None, 3)
    with torch.device("cpu"):  # a mode of torch's functions
        select_topk(x, W, None, 3)
    assert dispatched == ["select_topk"] * 4
    assert "sae_kernels::select_topk" in {event.key for event in profile.key_averages()}


@pytest.mark.filterwarnings("ignore:.*batching rule.*")
def test_transforms_meet_the_dispatcher(dispatched: list[str]) -> None:
    # vmap refuses what it has no rule for, or falls back on a loop: not for us to decide.
    with contextlib.suppress(RuntimeError):
        torch.vmap(lambda row: select_topk(row[None], W, None, 3))(x)
    assert dispatched == ["select_topk"]


def test_tensors_that_are_not_what_they_seem_meet_the_dispatcher(dispatched: list[str]) -> None:
    lazily = torch._neg_view(x)
    expected = select_topk(-x, W, None, 3)
    assert all(map(torch.equal, select_topk(lazily, W, None, 3), expected))
    own = select_topk(x.as_subclass(_Own), W, None, 3)
    assert torch.equal(own[1], select_topk(x, W, None, 3)[1])
    with FakeTensorMode() as mode:
        fakes = mode.from_tensor(x), mode.from_tensor(W)
    assert isinstance(select_topk(*fakes, None, 3)[0], FakeTensor)
    assert select_topk(x.to("meta"), W.to("meta"), None, 3)[0].shape == (5, 3)
    assert dispatched == ["select_topk"] * 4


def test_parameters_are_plain_tensors(dispatched: list[str]) -> None:
    select_topk(x, torch.nn.Parameter(W), None, 3)
    assert dispatched == []


def test_a_compiled_graph_holds_the_operator() -> None:
    compiled = torch.compile(lambda x: encode_topk(x, W, None, 3).values, fullgraph=True)
    assert torch.equal(compiled(x), encode_topk(x, W, None, 3).values)


def test_pieces_of_a_broken_graph_meet_the_dispatcher() -> None:
    answers = []

    def piece(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        answers.append(unobserved())
        return x + 1

    @torch.compile(backend="eager")
    def broken(x: torch.Tensor) -> torch.Tensor:
        torch._dynamo.graph_break()
        return piece(x)

    broken(x)
    assert answers == [False]
    assert unobserved()


def test_a_wrong_call_is_wrong_each_time() -> None:
    for _ in range(2):
        select_topk(x, W, None, 3)
        with pytest.raises(TypeError, match="backened"):
            select_topk(x, W, None, 3, backened="cpu")  # type: ignore[call-arg]
        with pytest.raises(ValueError, match="k: expected 1 <= k"):
            select_topk(x, W, None, 17)
        with pytest.raises(TypeError, match="b: expected float32"):
            select_topk(x, W, torch.zeros(16, dtype=torch.float64), 3)


def test_autocast_does_not_reach_an_implementation() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = select_topk(x, W, None, 3, backend="reference")
    assert all(map(torch.equal, inside, select_topk(x, W, None, 3, backend="reference")))
