"""dictionary_learning on these kernels at module level: gradients, 20 updates, what is left to it.

Runs where it is installed; ``python -m benchmarks.peer_tests dictionary_learning`` runs it in the
environment that ``sae-kernels bench --setup-peers`` makes.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip(
    "dictionary_learning",
    reason="needs dictionary_learning: python -m benchmarks.peer_tests dictionary_learning",
)

import torch
from dictionary_learning import dictionary, trainers
from dictionary_learning.trainers import batch_top_k, matryoshka_batch_top_k, top_k

import sae_kernels as sk
from sae_kernels.errors import AccelerationError
from sae_kernels.integrations.lazy_codes import LazyCodes
from tests.integrations import as_shipped

if TYPE_CHECKING:
    from collections.abc import Iterator

B, D, F, K = 96, 24, 320, 6
GROUPS = (40, 120, 160)  # of the Matryoshka dictionary
RARE = 5.0  # pre-activations of rows of norm 1 are about 2
KEPT = {"k": K, "threshold_start_step": 3}
WARM = {"sparsity_warmup_steps": 4}
# Each way to train: module, class, settings, and what of it must be on the kernels.
TRAINED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "topk": ("top_k", "TopKTrainer", KEPT, "AutoEncoderTopK.encode"),
    "batchtopk": ("batch_top_k", "BatchTopKTrainer", KEPT, "BatchTopKSAE.encode"),
    "matryoshka": (
        "matryoshka_batch_top_k",
        "MatryoshkaBatchTopKTrainer",
        KEPT | {"group_fractions": [0.125, 0.375, 0.5], "group_weights": [0.5, 0.3, 0.2]},
        "MatryoshkaBatchTopKTrainer.loss",
    ),
    "standard": ("standard", "StandardTrainer", WARM, "AutoEncoder.encode"),
    "standard april": ("standard", "StandardTrainerAprilUpdate", WARM, "AutoEncoder.encode"),
    "p-anneal": (
        "p_anneal",
        "PAnnealTrainer",
        WARM | {"anneal_start": 4, "anneal_end": 18, "p_end": 0.5, "n_sparsity_updates": 4},
        "AutoEncoder.encode",
    ),
    "gated": ("gdm", "GatedSAETrainer", WARM, "GatedAutoEncoder.encode"),
    "jumprelu": (
        "jumprelu",
        "JumpReluTrainer",
        WARM | {"bandwidth": 0.25},  # which it rounds to fp32
        "JumpReluTrainer.loss",
    ),
}
CLASSES = (
    top_k.AutoEncoderTopK,
    top_k.TopKTrainer,
    batch_top_k.BatchTopKSAE,
    batch_top_k.BatchTopKTrainer,
    matryoshka_batch_top_k.MatryoshkaBatchTopKSAE,
    matryoshka_batch_top_k.MatryoshkaBatchTopKTrainer,
    trainers.JumpReluTrainer,
    dictionary.AutoEncoder,
    dictionary.AutoEncoderNew,
    dictionary.GatedAutoEncoder,
    dictionary.JumpReluAutoEncoder,
)


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    before = [dict(vars(kind)) for kind in CLASSES]
    yield
    assert [dict(vars(kind)) for kind in CLASSES] == before


def batches(n: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [x.to(dtype) for x in as_shipped.batches(n, B, D)]


def made(kind: str, dtype: torch.dtype = torch.float32) -> Any:
    """A trainer with weights that no term of a gradient is zero for, and dead latents."""
    module, name, settings, _ = TRAINED[kind]
    trainer = getattr(importlib.import_module(f"dictionary_learning.trainers.{module}"), name)
    common = {"steps": 10**6, "activation_dim": D, "dict_size": F, "layer": 0, "lm_name": "none"}
    torch.manual_seed(0)
    one = trainer(**common, lr=1e-3, warmup_steps=2, device="cpu", seed=0, **settings)
    draw = torch.Generator().manual_seed(2)
    for name, p in one.ae.named_parameters():
        p.data = p.data.to(dtype)
        if p.dim() == 1:
            p.data.add_(0.1 * torch.randn(p.shape, generator=draw, dtype=torch.float64))
        # Of latents that fire above a threshold, few do.
        if name == "encoder.weight" and type(one.ae) is dictionary.AutoEncoder:
            p.data.mul_(10)  # rows of norm 1, as all others have
        elif name == "gate_bias" or (name == "encoder.bias" and "k" not in settings):
            p.data.sub_(RARE)
        elif name == "threshold":
            p.data.fill_(RARE)
    if hasattr(one, "num_tokens_since_fired"):
        one.dead_feature_threshold = 3 * B
        one.num_tokens_since_fired[::7] = 10**6
    return one


class Run:
    """20 updates of a trainer."""

    def __init__(self, kind: str, dtype: torch.dtype, order: int = 0) -> None:
        self.trainer = made(kind, dtype)
        there = as_shipped.Order(order, B, D, GROUPS)
        self.start = {name: p.detach().clone() for name, p in self.trainer.ae.named_parameters()}
        # In place: a weight keeps the way that it lies in memory.
        with torch.no_grad():
            for p in self.trainer.ae.parameters():
                p.copy_(there.applied(p.clone()))
            counters = getattr(self.trainer, "num_tokens_since_fired", torch.zeros(F))
            counters.copy_(there.applied(counters.clone()))
        for step, x in enumerate(batches(20, dtype), start=1):
            self.trainer.update(step, x[there.tokens][:, there.dims])
        self.logged = self.trainer.get_logging_parameters()
        self.counters = there.undone(counters)
        self.weights = {
            name: there.undone(p.detach()) for name, p in self.trainer.ae.named_parameters()
        }


def apart(one: Run, two: Run) -> float:
    """The distance of two runs' weights over the way that they went, the largest of all weights."""
    ours, theirs = one.weights, two.weights
    return max(
        float((ours[name] - theirs[name]).norm() / (theirs[name] - start).norm())
        for name, start in two.start.items()
        if not torch.equal(theirs[name], start)
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("kind", TRAINED)
def test_20_updates_are_theirs(kind: str, dtype: torch.dtype) -> None:
    theirs = Run(kind, dtype)
    # What rounding does to their own run: all sums in another order.
    orders = [Run(kind, dtype, order) for order in (1, 2, 3)]
    with sk.accelerate("dictionary_learning", level="module", strict=True) as held:
        ours = Run(kind, dtype)
        report = held.report()
    assert report.taken[TRAINED[kind][3]] >= 19, report
    # Below 1 a power has no finite slope at 0, so the dense tensor is asked.
    assert set(report.dense) <= ({"pow"} if kind == "p-anneal" else set()), report
    # JumpReluTrainer averages its L0 in fp32, whatever the dtype, and in whatever order.
    least = torch.finfo(torch.float32).eps if kind == "jumprelu" else 0.0
    assert apart(ours, theirs) <= 4 * max(least, *(apart(order, theirs) for order in orders))
    assert torch.equal(ours.counters, theirs.counters)
    assert ours.logged.keys() == theirs.logged.keys()
    for name, value in theirs.logged.items():
        one, two = (
            float(torch.as_tensor(each or 0).detach()) for each in (ours.logged[name], value)
        )
        assert one == pytest.approx(two, rel=1e-3), name


def gradients(trainer: Any, x: torch.Tensor) -> tuple[float, dict[str, torch.Tensor]]:
    trainer.ae.zero_grad()
    loss = trainer.loss(x, step=10)
    loss.backward()
    grads = {name: p.grad for name, p in trainer.ae.named_parameters() if p.grad is not None}
    return loss.item(), {name: grad.clone() for name, grad in grads.items()}


@pytest.mark.parametrize("kind", TRAINED)
def test_losses_and_gradients_are_those_of_their_formula(kind: str) -> None:
    (x,) = batches(1, torch.float64)
    first = made(kind, torch.float64)
    gradients(first, x)  # an encoder with a threshold runs dense at its first call
    expected_loss, expected = gradients(first, x)
    second = made(kind, torch.float64)
    with sk.accelerate("dictionary_learning", level="module") as held:
        gradients(second, x)
        loss, found = gradients(second, x)
    assert held.report().taken[TRAINED[kind][3]] >= 1
    # In fp64 both are exact to 1e-12, so what differs is the formula; dictionary_learning rounds
    # the residual of its auxiliary loss to fp32, and a JumpReLU's L0.
    rel = 1e-6 if hasattr(first, "num_tokens_since_fired") else 1e-11
    assert loss == pytest.approx(expected_loss, rel=rel)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert (found[name] - grad).norm() <= rel * grad.norm(), name


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "matryoshka"])
@pytest.mark.parametrize("threshold", [-1.0, 0.7], ids=["never set", "set"])
def test_inference(kind: str, threshold: float) -> None:
    ae = made(kind).ae
    ae.threshold.fill_(threshold)
    (x,) = batches(1, torch.float32)
    with torch.inference_mode():
        theirs = ae.encode(x, use_threshold=True)
        expected = ae.decode(theirs)
        with sk.accelerate(ae, strict=True) as held:
            ours = ae.encode(x, use_threshold=True)
            assert isinstance(ours, LazyCodes)
            found = ae.decode(ours)
            assert held.report().dense == {}
    rounding = 1e-5  # 24 products of size 1 in fp32, summed in another order
    assert torch.allclose(ours.dense(), theirs, atol=rounding)
    assert torch.allclose(found, expected, atol=10 * rounding)


def test_winners_of_value_0_count_as_fired() -> None:
    theirs, ours = made("topk"), made("topk")
    (x,) = batches(1, torch.float32)
    for each in (theirs, ours):
        each.ae.encoder.bias.data.sub_(4.0)
    theirs.update(5, x)
    assert (theirs.ae.encode(x) > 0).sum(-1).min() < K
    with sk.accelerate("dictionary_learning", level="module"):
        ours.update(5, x)
    assert torch.equal(ours.num_tokens_since_fired, theirs.num_tokens_since_fired)


def test_a_dictionary_alone_and_what_is_left() -> None:
    one, other = made("topk").ae, made("topk").ae
    (x,) = batches(1, torch.float32)
    with sk.accelerate(one) as held:
        other.encode(x)
        assert held.report().taken == {}
        one.encode(x)
        assert held.report().taken == {"AutoEncoderTopK.encode": 1}
        one.encode(x, return_topk=True, use_threshold=True)
        hook = one.encoder.register_forward_hook(lambda *_: None)
        one.encode(x)
        hook.remove()
        whys = {left.why for left in held.report().left}
    assert whys == {"a threshold and the k largest in one", "hooks on its layers"}
    with (
        sk.accelerate("dictionary_learning", strict=True),
        pytest.raises(AccelerationError, match="float8_e4m3fn"),
    ):
        made("topk").ae.encode(x.to(torch.float8_e4m3fn))


def test_a_relu_run_changes_over_when_it_is_sparse() -> None:
    trainer = made("standard")
    trainer.ae.encoder.bias.data.fill_(0.0)
    (x,) = batches(1, torch.float32)
    with sk.accelerate("dictionary_learning", level="module", strict=True) as held:
        trainer.update(5, x)
        trainer.update(6, x)
        assert "AutoEncoder.encode" not in held.report().taken
        trainer.ae.encoder.bias.data.sub_(10.0)
        trainer.update(7, x)
        trainer.update(8, x)
        assert held.report().taken["AutoEncoder.encode"] == 1
        assert any("of the latents fire" in left.why for left in held.report().left)
