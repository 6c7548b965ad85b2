"""GraphedStep: what may be captured, and that replaying is stepping.

Here no GPU captures anything. `Recording` stands in for a CUDA graph: it notes what torch is asked
for and asks for it again, on the same memory and with the host's numbers of the first time, undoes
what the noting did, and refuses what a capture refuses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sae_kernels.config import TrainConfig
from sae_kernels.nn import TopKConfig, TopKSAE, objective
from sae_kernels.nn import build as build_sae
from sae_kernels.step import FusedStep
from sae_kernels.testing import assert_bitwise
from sae_kernels.training import train
from sae_kernels.training.graphed_step import (
    STEADY,
    Captured,
    GraphedStep,
    changing_reason,
    eager_reason,
)
from sae_kernels.training.start import make_step
from tests.step.architectures import ARCHITECTURES, B
from tests.step.harness import stepping

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.step import StepResult

CAPTURED = (
    "topk",
    "topk-relu-none",
    "multi-topk",
    "matryoshka-topk-mean",
    "switch",
    "switch-shared",
    "skip-transcoder-multi",
    "crosscoder-mixed",
)


class Recording(TorchDispatchMode):
    """The calls of torch's operators below autograd, to be made again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, ...]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        declared = {argument.name: argument for argument in func._schema.arguments}
        named = dict(zip(declared, args, strict=False)) | kwargs
        for name, value in named.items():
            alias = declared[name].alias_info
            if alias is not None and alias.is_write:
                self.before += [
                    (t.detach(), t.clone()) for t in tree_leaves(value) if t is not None
                ]
        out = func(*args, **kwargs)
        if torch.Tag.inplace_view not in func.tags:
            # Their memory: the shapes of the tensors themselves may yet be changed in place.
            parts = func, args, kwargs, out
            self.calls.append(tree_map_only(torch.Tensor, torch.Tensor.detach, parts))
        return out

    def undo(self) -> None:
        """Gives what was written its old values."""
        for tensor, old in reversed(self.before):
            tensor.copy_(old)

    @torch.no_grad()
    def replay(self) -> None:
        """Makes the calls again; what they return goes where it went."""
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recorded(call: Callable[[], StepResult]) -> Captured:
    """Stands in for `captured`."""
    recording = Recording()
    try:
        with recording:
            result = call()
    finally:
        with torch.no_grad():
            recording.undo()
    return Captured(recording.replay, result)


def started(name: str) -> FusedStep:
    """A step that picks dead latents as on a GPU, without asking how many there are."""
    case = ARCHITECTURES[name]
    sae = build_sae(case.sae)
    with torch.no_grad():  # the first steps of some start at zero
        generator = torch.Generator().manual_seed(3)
        for parameter in sae.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    step = stepping(FusedStep, sae, case.settings())
    step.dead.padded = True
    step.dead.since_fired[-2:] = step.dead.after
    return step


def batch(step: FusedStep, seed: int) -> dict[str, Tensor | None]:
    generator = torch.Generator().manual_seed(seed)
    config = step.sae.config
    x = torch.randn(B, config.input_width, generator=generator)
    target = torch.randn(B, config.output_width, generator=generator)
    return {"x": x, "target": target if config.transcodes else None}


def assert_same(graphed: GraphedStep, eager: FusedStep) -> None:
    """All that the next step depends on is the same, bit for bit."""
    assert graphed.step.schedule.step == eager.schedule.step
    mine, theirs = ({**step.weights(), **step.state().tensors} for step in (graphed, eager))
    for what, tensor in theirs.items():
        assert_bitwise(what, mine[what].flatten(), tensor.flatten())


@pytest.mark.parametrize("name", CAPTURED)
def test_replaying_is_stepping(name: str) -> None:
    eager, own = started(name), started(name)
    graphed = GraphedStep(own, recorded)
    replayed = 0
    for i in range(STEADY + 6):
        lr, given = 1e-3 * (i + 1), batch(eager, i)
        expected = eager(**given, lr=lr)  # type: ignore[arg-type]
        result = graphed(**given, lr=lr)  # type: ignore[arg-type]
        replayed += graphed.reason is None
        for figure, value in expected._asdict().items():
            assert_bitwise(figure, result._asdict()[figure].flatten(), value.flatten())
        assert_same(graphed, eager)
    assert replayed == 6
    assert int(own.n_updates) == STEADY + 6


def test_each_k_has_a_graph_of_its_own() -> None:
    eager, own = started("topk"), started("topk")
    graphed = GraphedStep(own, recorded)
    reasons = []
    for i, k in enumerate([5] * (STEADY + 2) + [4] + [3] * (STEADY + 1)):
        given = batch(eager, i)
        eager(**given, lr=1e-3, k=k)  # type: ignore[arg-type]
        result = graphed(**given, lr=1e-3, k=k)  # type: ignore[arg-type]
        assert float(result.l0) <= k
        reasons.append(graphed.reason is None)
    assert reasons == [False] * STEADY + [True] * 2 + [False] + [False] * STEADY + [True]
    assert_same(graphed, eager)


@pytest.mark.parametrize("change", ["batch size", "dtype", "frozen", "backend"])
def test_a_changed_call_is_not_a_replay(change: str) -> None:
    eager, own = started("topk"), started("topk")
    graphed = GraphedStep(own, recorded)
    for i in range(STEADY + 2):
        given = batch(eager, i)
        for step in (eager, graphed):
            step(**given, lr=1e-3)  # type: ignore[arg-type]
    assert graphed.reason is None
    x = batch(eager, 99)["x"]
    assert x is not None
    if change == "batch size":
        x = x[:-3]
    elif change == "dtype":
        x = x.bfloat16()
    for step in (eager, graphed):
        if change == "frozen":
            step.sae.b_dec.requires_grad_(False)
        elif change == "backend":
            step.sae.backend = "reference"
        step(x, lr=1e-3)
    assert graphed.reason is not None
    assert_same(graphed, eager)


def test_micro_batches_are_made_as_they_are() -> None:
    eager, own = started("topk"), started("topk")
    graphed = GraphedStep(own, recorded)
    x = batch(eager, 0)["x"]
    assert x is not None
    for _ in range(STEADY + 2):
        eager(x.split(5), lr=1e-3)
        graphed(x.split(5), lr=1e-3)
    assert graphed.reason == "the batch comes in micro-batches"
    assert_same(graphed, eager)


def test_a_capture_that_fails_leaves_no_trace_but_its_reason() -> None:
    eager, own = started("topk"), started("topk")
    own.dead.padded = False  # the host asks how many latents are dead
    graphed = GraphedStep(own, recorded)
    for i in range(STEADY + 3):
        given = batch(eager, i)
        eager(**given, lr=1e-3)  # type: ignore[arg-type]
        graphed(**given, lr=1e-3)  # type: ignore[arg-type]
    assert graphed.reason is not None
    assert "not permitted" in graphed.reason
    assert_same(graphed, eager)


@pytest.fixture
def _no_fake_prefixes() -> Iterator[None]:
    objective._fixed.cache_clear()
    yield
    objective._fixed.cache_clear()


@pytest.mark.usefixtures("_no_fake_prefixes")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_rule_is_what_tensors_without_numbers_say(name: str) -> None:
    """Tensors without memory run through whole steps, unless the host asks for a number."""
    case = ARCHITECTURES[name]
    with FakeTensorMode():
        step = started(name)
        given = batch(step, 0)
        waits = False
        try:
            step(**given, lr=torch.full((), 1e-3))  # type: ignore[arg-type]
        except (DataDependentOutputException, DynamicOutputShapeException):
            waits = True
        reason = changing_reason(step)
    assert not (waits and reason is None)
    changes = case.settings().objective
    frozen = changes is None or (
        changes.sparsity == "none"
        and changes.target_l0 is None
        and not getattr(changes, "random_prefixes", 0)
    )
    assert (reason is not None) == (waits or not frozen)


def test_training_by_replays_is_training() -> None:
    x = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(steps=60, batch_size=64, k_start=12, k_anneal_steps=20, log_every=5)
    graphed: list[GraphedStep] = []

    def padded(sae: SparseAutoencoder, config: TrainConfig) -> FusedStep:
        step = stepping(FusedStep, sae, config)
        step.dead.padded = True
        return step

    def replaying(sae: SparseAutoencoder, config: TrainConfig) -> GraphedStep:
        graphed.append(GraphedStep(padded(sae, config), recorded))
        return graphed[0]

    eager, replayed = (
        train(TopKConfig(16, 64, k=4), x, config, step=step) for step in (padded, replaying)
    )
    assert graphed[0].reason is None
    for name, tensor in eager.sae.state_dict().items():
        assert_bitwise(name, replayed.sae.state_dict()[name], tensor)
    for line, expected in zip(replayed.metrics, eager.metrics, strict=True):
        assert line | {"tokens_per_second": 0} == expected | {"tokens_per_second": 0}


def test_who_is_captured() -> None:
    sae = TopKSAE(8, 32, k=4)
    assert "cpu" in (eager_reason(FusedStep(sae)) or "")
    config = TrainConfig.of(sae.objective_class, route="autograd")
    autograd = make_step(TopKSAE(8, 32, k=4), config)
    assert "AutogradStep" in (eager_reason(autograd) or "")
