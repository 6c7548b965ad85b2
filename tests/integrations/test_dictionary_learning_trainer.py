"""dictionary_learning's own trainers with their update on FusedStep."""

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

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytest.importorskip(
    "dictionary_learning", reason="dictionary_learning (pip install dictionary-learning) is missing"
)
from dictionary_learning.trainers import (
    batch_top_k,
    matryoshka_batch_top_k,
    top_k,
)

B, D, F, K = 128, 32, 512, 8
GROUPS = (64, 192, 256)
TRAINERS = {
    "topk": top_k.TopKTrainer,
    "batchtopk": batch_top_k.BatchTopKTrainer,
    "matryoshka": matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
}
MODULES = {"topk": top_k, "batchtopk": batch_top_k, "matryoshka": matryoshka_batch_top_k}
FIGURES = ("effective_l0", "dead_features", "pre_norm_auxk_loss")


@pytest.fixture
def exact_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    """Theirs without the 1e-6 that it adds to the norms that the gradient is projected by.

    It leaves 2e-6 of the gradient's part along a row, which is more than the rounding of the run.
    """

    def projected(weight: Tensor, grad: Tensor, d_in: int, n_latents: int) -> Tensor:
        unit = weight / weight.norm(dim=0, keepdim=True)
        return grad.sub_((grad * unit).sum(0, keepdim=True) * unit)

    for module in MODULES.values():
        monkeypatch.setattr(module, "remove_gradient_parallel_to_decoder_directions", projected)


def order(seed: int = 0, kind: str = "topk") -> Order:
    return Order(seed, B, D, GROUPS if kind == "matryoshka" else (F,))


def make(kind: str = "topk", where: Order | None = None, after: int = 10**7, **options: Any) -> Any:
    """A trainer whose weights are drawn by a fixed seed."""
    where = order(kind=kind) if where is None else where
    if kind == "matryoshka":
        options = {
            "group_fractions": [n / F for n in GROUPS],
            "group_weights": [1, 2, 0.5],
        } | options
    settings = {"steps": 10**6, "activation_dim": D, "dict_size": F, "k": K, "layer": 0}
    settings |= {"lm_name": "none", "device": "cpu", "seed": 0, "warmup_steps": 5, "lr": 1e-3}
    trainer = TRAINERS[kind](**(settings | {"threshold_start_step": 3} | options))
    trainer.dead_feature_threshold = after
    ae, g = trainer.ae, torch.Generator().manual_seed(1)
    with torch.no_grad():
        bias = ae.b_enc if kind == "matryoshka" else ae.encoder.bias
        bias.copy_(0.1 * torch.randn(F, generator=g))
        for p in ae.parameters():
            p.copy_(where.applied(p))
    return trainer


def updates(trainer: Any, data: list[Tensor], where: Order, first: int = 0) -> list[float]:
    return [trainer.update(first + i, x[where.tokens][:, where.dims]) for i, x in enumerate(data)]


def seen(trainer: Any, losses: list[float], where: Order) -> Run:
    """The run in the shipped order."""
    ae = trainer.ae
    tensors = {n: p.detach().clone() for n, p in ae.named_parameters()}
    for n, p in ae.named_parameters():
        state = trainer.optimizer.state[p]
        tensors |= {f"{key} of {n}": state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    figures = trainer.get_logging_parameters()
    tensors["threshold"] = torch.as_tensor(ae.threshold, dtype=torch.float64).clone()
    tensors["aux"] = torch.tensor(float(figures["pre_norm_auxk_loss"]), dtype=torch.float64)
    counts = [figures["effective_l0"], figures["dead_features"]]
    counts += [float(trainer.optimizer.state[p]["step"]) for p in ae.parameters()]
    counts += [trainer.optimizer.param_groups[0]["lr"]]
    return Run(
        torch.tensor(losses, dtype=torch.float64),
        {n: where.undone(t) for n, t in tensors.items()},
        {
            "since fired": where.undone(trainer.num_tokens_since_fired.clone()),
            "figures": torch.tensor([float(c) for c in counts]),
        },
    )


def level(name: str | None) -> contextlib.AbstractContextManager[Any]:
    if name is None:
        return contextlib.nullcontext()
    return sk.accelerate("dictionary_learning", level=name)


def run(kind: str, n: int, seed: int = 0, fast: bool = False, **options: Any) -> Run:
    where = order(seed, kind)
    trainer = make(kind, where, **options)
    with level("trainer" if fast else None) as handle:
        losses = updates(trainer, batches(n, B, D), where)
        if handle is not None:
            assert handle.report().taken == {f"{type(trainer).__name__}.update": n}
            assert not handle.report().left
    return seen(trainer, losses, where)


def check(kind: str, n: int, **options: Any) -> None:
    ours, shipped = run(kind, n, fast=True, **options), run(kind, n, **options)
    assert_same_run(ours, shipped, [run(kind, n, seed=i, **options) for i in (1, 2, 3)])


@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("after", [10**7, 300], ids=["all-alive", "some-dead"])
def test_twenty_steps_are_the_library_s_own(kind: str, after: int, exact_projection: None) -> None:
    check(kind, 20, after=after)


@pytest.mark.parametrize("kind", TRAINERS)
def test_twenty_steps_without_the_auxiliary_loss(kind: str, exact_projection: None) -> None:
    check(kind, 20, after=300, auxk_alpha=0.0)


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINERS)
def test_two_hundred_steps_are_the_library_s_own(kind: str, exact_projection: None) -> None:
    check(kind, 200, after=1000)


@pytest.mark.parametrize("kind", TRAINERS)
def test_the_part_along_a_row_that_theirs_leaves(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As shipped theirs is off from ours by the 2e-6 of its projection, and by rounding."""
    shipped, ours = run(kind, 20, after=300), run(kind, 20, fast=True, after=300)
    for name, tensor in shipped.tensors.items():
        scale = max(float(tensor.norm()), 1e-3)
        assert float((ours.tensors[name] - tensor).norm()) <= 1e-5 * scale, name
    assert ours.losses.tolist() == pytest.approx(shipped.losses.tolist(), rel=2e-6)


LEVELS = (None, "module", "trainer")


@pytest.mark.parametrize(("first", "second"), [(a, b) for a in LEVELS for b in LEVELS if a != b])
def test_a_run_saved_at_one_level_goes_on_at_another(
    first: str | None, second: str | None, tmp_path: Path, exact_projection: None
) -> None:
    data = batches(12, B, D)

    def halves(one: str | None, two: str | None, seed: int, path: Path) -> Run:
        where = order(seed)
        with level(one):
            trainer = make(where=where, after=300)
            losses = updates(trainer, data[:6], where)
            parts = {
                "ae": trainer.ae.state_dict(),
                "optimizer": trainer.optimizer.state_dict(),
                "scheduler": trainer.scheduler.state_dict(),
                "counts": trainer.num_tokens_since_fired,
            }
            parts["scheduler"].pop("lr_lambdas", None)
            torch.save(parts, path)
        saved = torch.load(path, weights_only=True)
        with level(two):
            fresh = make(where=order(7), after=300)
            fresh.ae.load_state_dict(saved["ae"])
            fresh.optimizer.load_state_dict(saved["optimizer"])
            fresh.scheduler.load_state_dict({**fresh.scheduler.state_dict(), **saved["scheduler"]})
            fresh.num_tokens_since_fired.copy_(saved["counts"])
            losses += updates(fresh, data[6:], where, first=6)
        return seen(fresh, losses, where)

    ours = halves(first, second, 0, tmp_path / "ours")
    shipped = halves(None, None, 0, tmp_path / "theirs")
    others = [halves(None, None, i, tmp_path / str(i)) for i in (1, 2, 3)]
    assert_same_run(ours, shipped, others)


@pytest.mark.parametrize("kind", TRAINERS)
def test_optimizer_states_have_the_library_s_own_layout(kind: str) -> None:
    states = []
    for name in (None, "trainer"):
        trainer = make(kind)
        with level(name):
            updates(trainer, batches(2, B, D), order())
            states.append(copy.deepcopy(trainer.optimizer.state_dict()))
    theirs, ours = states
    assert ours["param_groups"] == theirs["param_groups"]
    for place, state in theirs["state"].items():
        assert state.keys() == ours["state"][place].keys()
        for key, tensor in state.items():
            mine = ours["state"][place][key]
            assert (mine.dtype, mine.shape) == (tensor.dtype, tensor.shape)
            assert mine.is_contiguous()


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_exception_leaves_everything_unpatched_and_intact(
    kind: str, exact_projection: None
) -> None:
    data = batches(6, B, D)
    before = TRAINERS[kind].update

    def broken_off(trainer: Any, where: Order) -> None:
        updates(trainer, data[:2], where)
        trainer.scheduler.step = lambda: 1 / 0
        try:
            updates(trainer, data[2:3], where, first=2)
        finally:
            del trainer.scheduler.step

    def failing(seed: int, fast: bool) -> Run:
        where = order(seed, kind)
        trainer = make(kind, where)
        with pytest.raises(ZeroDivisionError), level("trainer" if fast else None):
            broken_off(trainer, where)
        assert TRAINERS[kind].update is before
        # Theirs fails before it renormalises the decoder, ours has done all of the update.
        with torch.no_grad():
            rows = trainer.ae.W_dec if kind == "matryoshka" else trainer.ae.decoder.weight.T
            rows /= rows.norm(dim=1, keepdim=True)
        return seen(trainer, updates(trainer, data[3:], where, first=3), where)

    assert_same_run(failing(0, True), failing(0, False), [failing(i, False) for i in (1, 2, 3)])


def test_activations_that_are_nan_are_skipped_with_one_warning() -> None:
    trainer, bad = make(), batches(1, B, D)[0]
    bad[3, 5] = torch.nan
    with level("trainer"):
        updates(trainer, batches(2, B, D), order())
        held = {n: p.detach().clone() for n, p in trainer.ae.named_parameters()}
        with pytest.warns(RuntimeWarning, match="TopKTrainer: expected finite activations"):
            trainer.update(2, bad)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.update(3, bad)
        for n, p in trainer.ae.named_parameters():
            assert torch.equal(p, held[n])


def test_a_run_gives_no_warning() -> None:
    """torch warns of a scheduler's step before any of the optimizer's."""
    with level("trainer"), warnings.catch_warnings():
        warnings.simplefilter("error")
        updates(make(), batches(2, B, D), order())


def test_zeros_among_the_k_largest_count_as_fired_where_torch_finds_them() -> None:
    counts = []
    for name in (None, "module", "trainer"):
        trainer = make()
        with torch.no_grad():
            trainer.ae.encoder.bias -= 5.0
        with level(name):
            updates(trainer, batches(3, B, D), order())
        counts.append(trainer.num_tokens_since_fired)
    n_positive = (trainer.ae.encode(batches(1, B, D)[0]) > 0).sum(1)
    assert 0 < int((n_positive < K).sum()) < B
    shipped, *ours = counts
    assert 0 < int(shipped.count_nonzero()) < F
    for found in ours:
        assert torch.equal(found, shipped)


def test_an_encoder_that_was_made_as_a_transpose_is_laid_once() -> None:
    trainer, places = make(), []
    weight = trainer.ae.encoder.weight
    assert not weight.is_contiguous()
    with level("trainer"):
        for i, x in enumerate(batches(3, B, D)):
            trainer.update(i, x)
            places.append(weight.data_ptr())
            moments = [trainer.optimizer.state[weight][key] for key in ("exp_avg", "exp_avg_sq")]
            assert all(t.is_contiguous() for t in (weight, *moments))
    assert len(set(places)) == 1


def _adamw(trainer: Any) -> None:
    trainer.optimizer = torch.optim.AdamW(trainer.ae.parameters())


def _longer(trainer: Any) -> None:
    with torch.no_grad():
        trainer.ae.decoder.weight *= 1.5


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "AdamW": (_adamw, "an optimizer of type AdamW"),
    "rows": (_longer, "decoder rows that are not of unit norm"),
    "hook": (
        lambda t: t.ae.encoder.register_forward_hook(lambda *_: None),
        "hooks on the SAE",
    ),
    "loss": (lambda t: setattr(t, "loss", t.loss), "another loss"),
    "subclass": (
        lambda t: setattr(t, "__class__", type("Mine", (top_k.TopKTrainer,), {})),
        "a trainer of class Mine",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_the_same_is_left_to_the_library(name: str) -> None:
    change, why = CHANGES[name]
    plain, trainer, strict = make(), make(), make()
    for each in (plain, trainer, strict):
        change(each)
    (x,) = batches(1, B, D)
    expected = plain.update(0, x)
    with level("trainer") as handle:
        assert trainer.update(0, x) == pytest.approx(expected, rel=1e-5)
    what = "TopKTrainer.update"
    assert (what, why) in {(left.what, left.why) for left in handle.report().left}
    assert what not in handle.report().taken
    with (
        sk.accelerate("dictionary_learning", strict=True),
        pytest.raises(AccelerationError, match=why),
    ):
        strict.update(0, x)


def test_bf16_autocast_trains_on_bf16_operands() -> None:
    """Not the same run: theirs rounds pre-activations to bf16, which moves ranks and values."""
    losses = []
    for fast, autocast in ((False, False), (False, True), (True, True)):
        trainer = make()
        with level("trainer" if fast else None), torch.autocast("cpu", enabled=autocast):
            losses.append(updates(trainer, batches(20, B, D), order()))
    exact, theirs, ours = torch.tensor(losses, dtype=torch.float64)
    assert not torch.equal(ours, exact)
    off, scale = ((each / exact - 1).abs().max() for each in (ours, theirs))
    assert off <= MARGIN * scale
