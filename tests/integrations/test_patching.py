"""Patches, the ledger and the report: what is replaced comes back, what happened is counted."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from sae_kernels import backends
from sae_kernels.backends import Candidate
from sae_kernels.errors import AccelerationError
from sae_kernels.integrations import patching
from sae_kernels.integrations.layout import LatentRows
from sae_kernels.integrations.optimizer import FusedAdam
from sae_kernels.integrations.patching import Ledger, Left, Patches, hooked, unfit

if TYPE_CHECKING:
    from collections.abc import Iterator


class Base:
    def f(self) -> str:
        """Docs."""
        return "base"

    @staticmethod
    def g() -> str:
        return "static"

    @classmethod
    def c(cls) -> str:
        return cls.__name__


class Child(Base):
    pass


def test_what_is_replaced_comes_back_in_reverse() -> None:
    module: Any = types.ModuleType("theirs")
    module.h = lambda: "h"
    owners = (Base, Child, module)
    before = [dict(vars(owner)) for owner in owners]
    patches = Patches()

    def adding(suffix: str) -> Any:
        return lambda original: lambda *arguments: original(*arguments) + suffix

    for suffix in "12":
        for owner, name in ((Base, "f"), (Child, "f"), (Base, "g"), (Base, "c"), (module, "h")):
            patches.replace(owner, name, adding(suffix))
    assert (Base().f(), Child().f(), module.h()) == ("base12", "base112", "h12")
    assert (Base().g(), Base.g(), Base().c()) == ("static12", "static12", "Base12")
    assert Base.f.__doc__ == "Docs."
    patches.undo()
    assert [dict(vars(owner)) for owner in owners] == before
    assert "f" not in vars(Child), "inherited again"
    patches.undo()
    assert Base().g() == "static"


def test_an_object_of_its_own_can_be_patched() -> None:
    one, other = Base(), Base()
    patches = Patches()
    patches.replace(one, "f", lambda original: lambda: original() + "!")
    assert (one.f(), other.f()) == ("base!", "base")
    patches.undo()
    assert vars(one) == {}


def test_the_ledger_counts_and_the_report_is_plain_data() -> None:
    ledger = Ledger("theirs")
    assert str(ledger.report("1.0")).splitlines()[1:] == ["  nothing was called yet"]
    ledger.took("encode")
    ledger.took("encode")
    ledger.left("decode", "dtype torch.int8")
    ledger.made_dense("max")
    report = ledger.report("1.0")
    ledger.took("encode")
    assert report.taken == {"encode": 2}, "a copy"
    assert report.left == (Left("decode", "dtype torch.int8", 1),)
    assert report.dense == {"max": 1}
    assert (report.library, report.version) == ("theirs", "1.0")
    words = "theirs 1.0", "2 x encode", "1 x decode: dtype torch.int8", "1 x max"
    assert all(word in str(report) for word in words)


def test_strict_raises_but_not_where_the_rule_chooses() -> None:
    ledger = Ledger("theirs", strict=True)
    ledger.left("encode", "half of the latents fire", by_rule=True)
    with pytest.raises(AccelerationError, match=r"theirs: decode would run as shipped \(why\)"):
        ledger.left("decode", "why")
    assert [one.count for one in ledger.report("1").left] == [1, 1]


def test_tensors_that_the_kernels_do_not_take() -> None:
    class Mine(torch.Tensor):
        pass

    x = torch.zeros(2, 2)
    assert unfit(x, torch.nn.Parameter(x), x.half()) is None
    assert unfit(x, x.long()) == "dtype torch.int64"
    assert unfit(x.to("meta")) == "device meta"
    assert unfit(x.as_subclass(Mine)) == "a tensor of type Mine"
    seen = []
    torch.vmap(lambda row: (seen.append(unfit(x)), row)[1])(x)
    assert seen == ["a torch.func transform is at work"]


def test_where_only_the_reference_runs_the_library_is_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patching._no_kernels.cache_clear()
    found = [Candidate("triton", "old"), Candidate("reference", None)]
    monkeypatch.setattr(backends, "candidates", lambda *_: found)
    assert unfit(torch.zeros(2)) == "no kernels for torch.float32 on cpu (triton: old)"
    patching._no_kernels.cache_clear()


def test_hooked_modules() -> None:
    module = torch.nn.Identity()
    assert not hooked(module)
    for name in ("register_forward_hook", "register_forward_pre_hook"):
        handle = getattr(module, name)(lambda *_: None)
        assert hooked(module)
        handle.remove()
    handle = module.register_full_backward_hook(lambda *_: None)
    assert hooked(module)
    handle.remove()
    assert not hooked(module)


# Weights [D, F] laid latent by latent.


def adam_step(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer, i: int) -> None:
    weight.grad = None
    generator = torch.Generator().manual_seed(i)
    (weight * torch.randn(weight.shape, generator=generator)).sum().backward()
    optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("first", [False, True], ids=["a fresh optimizer", "a running one"])
def test_a_turned_weight_is_trained_like_any(fused: bool, first: bool) -> None:
    # torch's fused Adam goes through memory, whatever the strides of weight, gradient and state.
    def run(turns: bool) -> tuple[torch.Tensor, Any]:
        weight = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4))
        optimizer = torch.optim.Adam([weight], lr=0.1, fused=fused)
        rows = LatentRows()
        if first:
            adam_step(weight, optimizer, 0)
        if turns:
            turned = rows.of(weight)
            assert turned.is_contiguous()
            assert torch.equal(turned, weight.T)
            assert rows.of(weight).data_ptr() == turned.data_ptr(), "once"
        adam_step(weight, optimizer, 1)
        assert weight.shape == weight.grad.shape == (3, 4)
        rows.undo()
        assert weight.is_contiguous()
        assert all(s.is_contiguous() for s in optimizer.state[weight].values())
        adam_step(weight, optimizer, 2)
        return weight.detach(), optimizer.state[weight]

    (expected, states), (found, mine) = run(False), run(True)
    assert torch.equal(found, expected)
    assert all(torch.equal(mine[name], states[name]) for name in states)


def test_a_fused_step_copies_nothing() -> None:
    # On a CPU it copies what is not contiguous: 25 times the time of the step itself.
    weight = torch.nn.Parameter(torch.ones(30, 40))
    optimizer = torch.optim.Adam([weight], fused=True)
    rows = LatentRows()
    rows.of(weight)
    adam_step(weight, optimizer, 0)
    weight.grad = torch.ones_like(weight)
    with torch.profiler.profile(record_shapes=True) as profiler:
        optimizer.step()
    rows.undo()
    copies = [event.input_shapes for event in profiler.events() if event.name == "aten::copy_"]
    assert not [shapes for shapes in copies if [30, 40] in shapes or [40, 30] in shapes]


def test_a_step_that_raises_leaves_the_weight_as_it_was() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = torch.optim.Adam([weight], fused=True)
    rows = LatentRows()
    rows.of(weight)

    def fails() -> float:
        raise KeyError

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert rows.of(weight).shape == (4, 3)
    assert weight.shape == (3, 4)
    rows.undo()


@pytest.fixture
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Product(torch.nn.Module):
    """x W of a weight as an adapter reads it: one stored [D, F] and one [F, D], as a transpose."""

    def __init__(self, rows: LatentRows | None) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.tall = torch.nn.Parameter(torch.randn(3, 4, generator=generator))
        self.straight = torch.nn.Parameter(torch.randn(3, 4, generator=generator).T)
        self.rows = rows

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.rows is None:
            tall, straight = self.tall.T, self.straight
        else:
            tall, straight = self.rows.of(self.tall), self.rows.straight(self.straight)
            assert tall.is_contiguous()
            assert straight.is_contiguous()
        return ((x @ tall.T).relu() * (x @ straight.T)).sum()


@pytest.mark.usefixtures("one_rank")
@pytest.mark.parametrize("unused", [False, True], ids=["buckets built anew", "buckets kept"])
@pytest.mark.parametrize("laid", ["before wrapping", "while wrapped"])
def test_gradients_of_a_wrapped_weight_are_its_own(unused: bool, laid: str) -> None:
    # DistributedDataParallel reads its buckets with the strides that a weight has after a backward
    # pass, and writes them with those that it had when it was wrapped.
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(1))
    rows = LatentRows()
    own, alone = Product(rows), Product(None)
    if laid == "before wrapping":
        own(x)
    wrapped = DistributedDataParallel(own, find_unused_parameters=unused)
    for _ in range(3):
        own.zero_grad()
        alone.zero_grad()
        wrapped(x).backward()
        alone(x).backward()
        for one, two in zip(own.parameters(), alone.parameters(), strict=True):
            assert torch.allclose(one.grad, two.grad, rtol=1e-5)
    if laid == "before wrapping":
        with pytest.warns(UserWarning, match="wrap it again"):
            rows.undo()
    else:
        rows.undo()


def test_a_view_of_a_larger_buffer_is_not_laid_anew() -> None:
    flat = torch.zeros(20)
    assert LatentRows().why_not(flat[:12].view(3, 4)) == "a weight that is part of a larger buffer"
    assert LatentRows().why_not(torch.zeros(3, 4)) is None


def test_a_weight_turned_in_inference_mode_can_be_trained() -> None:
    rows, weight = LatentRows(), torch.nn.Parameter(torch.ones(3, 4))
    with torch.inference_mode():
        rows.of(weight)
    (weight * weight).sum().backward()
    with torch.inference_mode():
        rows.undo()
    weight.grad = None
    (weight * weight).sum().backward()


def test_the_optimizer_hook_goes_with_the_last_turn() -> None:
    from torch.optim import optimizer

    before = len(optimizer._global_optimizer_pre_hooks)
    rows = LatentRows()
    rows.of(torch.nn.Parameter(torch.zeros(2, 3)))
    assert len(optimizer._global_optimizer_pre_hooks) == before + 1
    rows.undo()
    assert len(optimizer._global_optimizer_pre_hooks) == before
    assert not optimizer._global_optimizer_post_hooks


def test_fused_adam_is_taken_back() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    adam, sgd = torch.optim.Adam([weight], lr=0.1), torch.optim.SGD([weight], lr=0.1)
    before = dict(adam.param_groups[0])
    fused = FusedAdam()
    assert fused.apply(adam) is None
    assert adam.param_groups[0]["fused"]
    assert "fused" in str(fused.apply(adam)), "already"
    assert fused.apply(sgd) == "an optimizer of type SGD"
    fused.undo()
    assert dict(adam.param_groups[0]) == before
