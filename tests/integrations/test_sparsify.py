"""sparsify on these kernels: 20 steps of its Trainer, gradients, inference, what is left to it.

Runs where sparsify is installed; ``python -m benchmarks.peer_tests sparsify`` runs it in the
environment that ``sae-kernels bench --setup-peers`` makes.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest

os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")  # its own decoder on a CPU is torch's
pytest.importorskip("sparsify", reason="needs sparsify: python -m benchmarks.peer_tests sparsify")

import torch
from schedulefree import ScheduleFreeWrapper
from sparsify import SparseCoder, SparseCoderConfig, sparse_coder
from sparsify.sign_sgd import SignSGD
from sparsify_runs import Run, run
from torch import nn

import sae_kernels as sk
from sae_kernels.errors import AccelerationError
from sae_kernels.integrations.sparsify import upkeep

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

B, D, F, K = 48, 24, 160, 6
ADAM: dict[str, Any] = {"optimizer": "adam", "lr_warmup_steps": 2}
# Each way to train, and what of it must be on the kernels beside encode and decode.
TRAINED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "signum": ({}, {"optimizer step"}),
    "adam": (ADAM, set()),
    "auxk": (ADAM | {"auxk_alpha": 1 / 32, "dead_feature_threshold": 100}, {"AuxK"}),
    "multi-topk": (ADAM | {"sae": {"multi_topk": True}}, {"Multi-TopK"}),
    "hookpoints": ({"layers": [0, 1]}, {"optimizer step"}),
    "transcoder": (ADAM | {"sae": {"transcode": True, "skip_connection": True}}, set()),
    "micro-batches": (ADAM | {"grad_acc_steps": 2, "micro_acc_steps": 2}, set()),
}


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    owners = [sparse_coder, SparseCoder, ScheduleFreeWrapper]
    before = [dict(vars(owner)) for owner in owners]
    yield
    assert [dict(vars(owner)) for owner in owners] == before


def apart(one: Run, two: Run) -> float:
    """The distance of two runs' weights over the way that they went, the largest of all weights."""
    return max(
        float((one.after[name] - two.after[name]).norm() / (two.after[name] - start).norm())
        for name, start in two.before.items()
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", TRAINED)
def test_20_steps_are_theirs(case: str, dtype: torch.dtype, tmp_path: Path) -> None:
    config, expected = TRAINED[case]
    theirs = run(tmp_path, dtype=dtype, **config)
    # What rounding does to their own run: the sequences of each batch in another order.
    orders = [run(tmp_path, dtype=dtype, order=order, **config) for order in (1, 2)]
    with sk.accelerate("sparsify", strict=True) as held:
        ours = run(tmp_path, dtype=dtype, **config)
    taken = held.report().taken
    assert {"encode", "decode", *expected} <= set(taken)
    assert apart(ours, theirs) <= 4 * max(apart(order, theirs) for order in orders)
    for name, counts in theirs.counters.items():
        assert torch.equal(ours.counters[name], counts), name
    assert ours.optimizer.keys() == theirs.optimizer.keys()


def test_signum_is_theirs_to_the_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    # Several pieces, of which the last is not whole.
    monkeypatch.setattr(upkeep, "_PIECE", 64)

    def made() -> tuple[list[nn.Parameter], Any]:
        torch.manual_seed(1)
        parameters = [nn.Parameter(torch.randn(*shape)) for shape in ((30, 7), (13,), (5, 5))]
        groups = [{"params": parameters[:2], "lr": 3e-3}, {"params": parameters[2:], "lr": 1e-2}]
        optimizer = ScheduleFreeWrapper(SignSGD(groups), momentum=0.95)
        optimizer.train()
        return parameters, optimizer

    def steps(parameters: list[nn.Parameter], optimizer: Any, *numbers: int) -> None:
        for step in numbers:
            torch.manual_seed(step)
            for p in parameters[: 2 if step == 1 else 3]:
                p.grad = torch.randn(*p.shape) * (torch.rand(*p.shape) < 0.5)
            optimizer.step()
            optimizer.zero_grad()

    theirs, optimizer = made()
    steps(theirs, optimizer, *range(6))
    ours, mixed = made()
    steps(ours, mixed, 0, 1)  # a run that began without us and ends without us
    with sk.accelerate("sparsify") as held:
        steps(ours, mixed, 2, 3, 4)
    assert held.report().taken == {"optimizer step": 3}
    steps(ours, mixed, 5)
    for one, two in zip(theirs, ours, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(optimizer.state[one]["z"], mixed.state[two]["z"])
    assert [{**group, "params": None} for group in optimizer.param_groups] == [
        {**group, "params": None} for group in mixed.param_groups
    ]


def coder(dtype: torch.dtype = torch.float64, **settings: Any) -> Any:
    torch.manual_seed(3)
    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **settings), dtype=dtype)
    for p in sae.parameters():
        nn.init.normal_(p, std=0.3)
    return sae


def tokens(n: int = B) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def gradients(sae: Any, x: torch.Tensor, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    sae.zero_grad()
    x = x.clone().requires_grad_()
    out = sae(x, dead_mask=torch.arange(F) % 5 == 0, **options)
    (out.fvu + out.auxk_loss / 8 + out.multi_topk_fvu / 4).backward()
    grads = {name: p.grad.clone() for name, p in sae.named_parameters()}
    assert x.grad is not None
    return out, grads | {"x": x.grad}


@pytest.mark.parametrize("shift", [0.0, -2.8], ids=["k winners", "winners of value 0"])
@pytest.mark.parametrize("multi", [False, True], ids=["topk", "multi-topk"])
def test_losses_and_gradients_are_those_of_their_formula(shift: float, multi: bool) -> None:
    sae = coder(multi_topk=multi)
    nn.init.constant_(sae.encoder.bias, shift)
    theirs, expected = gradients(sae, tokens())
    short = (theirs.latent_acts[:, :K] == 0).any()
    assert bool(short) == (shift < 0)
    with sk.accelerate("sparsify") as held:
        ours, found = gradients(sae, tokens())
    report = held.report()
    assert report.taken["encode"] == 1
    assert report.taken["AuxK"] == 1
    assert bool(report.left) == (shift < 0)
    # In fp64 both are exact to 1e-12, so what differs is the formula.
    for name in ("fvu", "auxk_loss", "multi_topk_fvu"):
        loss, same = getattr(ours, name).item(), getattr(theirs, name).item()
        assert loss == pytest.approx(same, rel=1e-11), name
    # All of these count as fired, those of value 0 too.
    assert torch.equal(ours.latent_indices.sort().values, theirs.latent_indices.sort().values)
    for name, grad in expected.items():
        assert grad.norm() > 0, name
        assert (found[name] - grad).norm() <= 1e-11 * grad.norm(), name


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inference(mode: Any) -> None:
    sae, x = coder(torch.float32), tokens().float()
    with mode():
        theirs = sae.encode(x)
        expected = sae.decode(theirs.top_acts, theirs.top_indices)
        with sk.accelerate(sae, strict=True) as held:
            ours = sae.encode(x.view(2, -1, D)), sae.encode(x)
            found = sae.decode(ours[1].top_acts, ours[1].top_indices)
            assert held.report().dense == {}
            rounding = 1e-5  # 24 products of size 1 in fp32, summed in another order
            assert torch.allclose(ours[1].pre_acts + 0, theirs.pre_acts, atol=rounding)
    assert ours[0].top_acts.shape == (2, B // 2, K)
    assert torch.equal(ours[0].top_indices.flatten(0, 1), ours[1].top_indices)
    assert torch.equal(ours[1].top_indices.sort().values, theirs.top_indices.sort().values)
    assert torch.allclose(found, expected, atol=rounding)
    assert found.dtype == expected.dtype
    assert set(held.report().dense) == {"pre-activations: add"}


def test_an_sae_alone(tmp_path: Path) -> None:
    one, other, x = coder(), coder(), tokens()
    with sk.accelerate(one) as held:
        gradients(other, x)
        assert held.report().taken == {}
        gradients(one, x)
        assert held.report().taken == {"encode": 1, "AuxK": 1, "decode": 2}


def test_what_is_left_to_them() -> None:
    sae = coder(torch.float32, activation="groupmax")
    sae.cfg.k = 8
    x = tokens().float()
    expected = sae.encode(x)
    with sk.accelerate("sparsify") as held:
        found = sae.encode(x)
        with pytest.raises(RuntimeError, match="out of range"):
            coder().encode(tokens()).pre_acts.topk(F + 1)
    assert torch.equal(found.top_indices, expected.top_indices)
    assert next(one.why for one in held.report().left) == "activation groupmax"
    with (
        sk.accelerate("sparsify", strict=True),
        pytest.raises(AccelerationError, match="activation groupmax"),
    ):
        sae.encode(x)


def test_fused_adam(tmp_path: Path) -> None:
    seen = []

    def look(trainer: Any) -> None:
        seen.append(trainer.optimizers[0].param_groups[0]["fused"])

    theirs = run(tmp_path, **ADAM)
    orders = [run(tmp_path, order=order, **ADAM) for order in (1, 2)]
    with sk.accelerate("sparsify", optimizer="fused") as held:
        ours = run(tmp_path, prepare=look, **ADAM)
    assert seen == [True]
    assert held.report().taken["fused Adam"] == 1
    # Its rounding is in every weight's update, not only in the sums of gradients.
    budget = max(apart(order, theirs) for order in orders) + 20 * torch.finfo(torch.float32).eps
    assert apart(ours, theirs) <= 4 * budget
