"""SAELens' own trainer accelerated: what is left to the library, and faults."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import sae_kernels as sk
from sae_kernels.errors import AccelerationError
from tests.integrations.as_shipped import MARGIN, Order, Run, assert_same_run, batches
from tests.integrations.sae_lens_runs import (
    WHAT,
    B,
    D,
    SAETrainer,
    SAETrainerConfig,
    level,
    make,
    order,
    saes,
    seen,
    silent,
    steps,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


@pytest.fixture
def originals() -> Iterator[None]:
    before = SAETrainer._train_step
    yield
    assert SAETrainer._train_step is before


def fail(trainer: Any, x: Tensor) -> None:
    """A step whose scheduler fails, after the update, with acceleration or without."""
    trainer.lr_scheduler.step = lambda: 1 / 0
    try:
        trainer.step(x)
    finally:
        del trainer.lr_scheduler.step


def broken_off(trainer: Any, data: list[Tensor], where: Order) -> None:
    steps(trainer, data[:2], where)
    fail(trainer, data[2][where.tokens][:, where.dims])


def test_an_exception_leaves_everything_unpatched_and_intact(originals: None) -> None:
    data = batches(6, B, D)

    def failing(seed: int, fast: bool) -> Run:
        where = order(seed, "batchtopk")
        trainer = make("batchtopk", where=where)
        with pytest.raises(ZeroDivisionError), level("trainer" if fast else None):
            broken_off(trainer, data[:3], where)
        for p in trainer.sae.parameters():
            state = trainer.optimizer.state[p]
            assert p.is_contiguous()
            assert state["exp_avg"].is_contiguous()
            assert float(state["step"]) == 3
        outputs = steps(trainer, data[3:], where)
        return seen(trainer, [float(o.loss.detach()) for o in outputs], where)

    assert_same_run(failing(0, True), failing(0, False), [failing(i, False) for i in (1, 2, 3)])


def test_an_exception_before_the_update_changes_no_weight(originals: None) -> None:
    trainer = make("batchtopk")
    with sk.accelerate("sae_lens"):
        steps(trainer, batches(2, B, D))
        held = {n: t.clone() for n, t in trainer.sae.state_dict().items()}
        with pytest.raises(ValueError, match=r"x: expected shape \[B, 32\]"):
            trainer.step(torch.zeros(B, D + 1))
        for n, t in trainer.sae.state_dict().items():
            assert torch.equal(t, held[n])


def test_activations_that_are_nan_are_skipped_with_one_warning() -> None:
    trainer, bad = make(), batches(1, B, D)[0]
    bad[3, 5] = torch.nan
    with sk.accelerate("sae_lens"):
        steps(trainer, batches(2, B, D))
        held = {n: t.clone() for n, t in trainer.sae.state_dict().items()}
        with pytest.warns(RuntimeWarning, match="SAETrainer: expected finite activations"):
            out = trainer.step(bad)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.step(bad)
        assert out.loss.isnan()
        for n, t in trainer.sae.state_dict().items():
            assert torch.equal(t, held[n])
        assert float(trainer.optimizer.state[trainer.sae.b_dec]["step"]) == 2
        assert trainer.step(batches(3, B, D)[2]).loss.isfinite()


def _swap(optimizer: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(trainer: Any) -> None:
        trainer.optimizer = optimizer(trainer.sae.parameters())

    return change


def _set_grad(trainer: Any) -> None:
    trainer.sae.b_dec.grad = torch.zeros(D)


class Odd(saes.TopKTrainingSAE):
    pass


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (
        lambda t: t.sae.add_hook("hook_sae_acts_post", lambda acts, hook: acts),
        "hooks on the SAE",
    ),
    "AdamW": (_swap(torch.optim.AdamW), "an optimizer of type AdamW"),
    "weight decay": (
        _swap(lambda p: torch.optim.Adam(p, weight_decay=0.1)),
        "Adam with weight_decay",
    ),
    "frozen": (lambda t: t.sae.b_dec.requires_grad_(False), "frozen parameters"),
    "gradient": (_set_grad, "gradients from before the step"),
    "subclass": (lambda t: setattr(t.sae, "__class__", Odd), "an SAE of class Odd"),
    "loss": (
        lambda t: setattr(t.sae, "mse_loss_fn", lambda a, b: (a - b).abs()),
        "another mse_loss_fn",
    ),
    "forward": (
        lambda t: setattr(t.sae, "training_forward_pass", t.sae.training_forward_pass),
        "another training_forward_pass",
    ),
    "step hook": (
        lambda t: t.optimizer.register_step_pre_hook(lambda *_: None),
        "hooks on the optimizer's step",
    ),
    "fp16": (
        lambda t: setattr(t, "autocast_if_enabled", torch.autocast("cpu", torch.float16)),
        "autocast to torch.float16",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_the_same_is_left_to_the_library(name: str) -> None:
    change, why = CHANGES[name]
    (x,) = batches(1, B, D)
    plain, trainer, strict = make(), make(), make()
    start = {n: t.clone() for n, t in plain.sae.state_dict().items()}
    for each in (plain, trainer, strict):
        change(each)
    plain.step(x)
    with sk.accelerate("sae_lens") as handle:
        trainer.step(x)
    assert (WHAT, why) in {(left.what, left.why) for left in handle.report().left}
    assert WHAT not in handle.report().taken
    # The library's own step at module level; in fp16 rounding turns the signs of small gradients.
    for n, t in plain.sae.state_dict().items():
        off, moved = (trainer.sae.state_dict()[n] - t).norm(), (start[n] - t).norm()
        assert off <= 0.05 * moved, n
    with sk.accelerate("sae_lens", strict=True), pytest.raises(AccelerationError, match=why):
        strict.step(x)


def test_bf16_autocast_trains_on_bf16_operands() -> None:
    """Not the same run: theirs rounds pre-activations to bf16, which moves ranks and values."""
    data, losses = batches(20, B, D), []
    for fast, autocast in ((False, False), (False, True), (True, True)):
        trainer = make(autocast=autocast)
        with level("trainer" if fast else None) as handle:
            losses.append([float(o.loss.detach()) for o in steps(trainer, data)])
            if fast:
                assert handle.report().taken == {WHAT: 20}
    exact, theirs, ours = torch.tensor(losses, dtype=torch.float64)
    assert not torch.equal(ours, exact)
    # Both are off by the rounding of operands, to the same degree.
    off, scale = ((each / exact - 1).abs().max() for each in (ours, theirs))
    assert off <= MARGIN * scale


def test_a_copied_trainer_is_its_own() -> None:
    data = batches(4, B, D)
    with sk.accelerate("sae_lens"):
        trainer = make()
        trainer.data_provider = None
        steps(trainer, data[:2])
        twin = copy.deepcopy(trainer)
        one = [float(o.loss) for o in steps(trainer, data[2:])]
        two = [float(o.loss) for o in steps(twin, data[2:])]
    assert one == two
    assert twin.sae.W_dec.data_ptr() != trainer.sae.W_dec.data_ptr()


def test_several_trainers_in_lockstep() -> None:
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    data, ends = batches(6, B, D), []
    for fast in (False, True):
        torch.manual_seed(0)
        made = {name: make(kind).sae for name, kind in (("a", "topk"), ("b", "batchtopk"))}
        settings = SAETrainerConfig(
            total_training_samples=6 * B,
            train_batch_size_samples=B,
            device="cpu",
            lr=1e-3,
            lr_end=1e-4,
            logger=silent(),
        )
        options = {"cfg": settings, "saes": made, "hook_names": {"a": "x", "b": "x"}}
        trainer = MultiSAETrainer(**options, data_provider=iter([{"x": x} for x in data]))
        with sk.accelerate(trainer) if fast else contextlib.nullcontext() as handle:
            ends.append(trainer.fit())
        if handle is not None:
            assert handle.report().taken == {WHAT: 12}
    for name, theirs in ends[0].items():
        for key, tensor in theirs.state_dict().items():
            torch.testing.assert_close(
                ends[1][name].state_dict()[key], tensor, rtol=1e-4, atol=1e-5
            )


def test_one_trainer_alone() -> None:
    data = batches(2, B, D)
    mine, other = make(), make()
    with sk.accelerate(mine) as handle:
        steps(mine, data)
        steps(other, data)
    assert handle.report().taken == {WHAT: 2}
