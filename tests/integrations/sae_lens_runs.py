"""SAELens' own trainer on small cases, as shipped and with its inner step on FusedStep."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor

import sae_kernels as sk
from tests.integrations.as_shipped import Order, Run, assert_same_run, batches

saes = pytest.importorskip("sae_lens.saes", reason="SAELens (pip install sae-lens) is missing")
from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

B, D, F, K = 128, 32, 512, 8
WIDTHS = [64, 256, 512]
CLASSES = {
    "topk": "TopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
}
WHAT = "SAETrainer._train_step"


def order(seed: int = 0, kind: str = "topk") -> Order:
    groups = [b - a for a, b in zip([0, *WIDTHS], WIDTHS, strict=False)]
    return Order(seed, B, D, tuple(groups) if kind == "matryoshka" else (F,))


def make(
    kind: str = "topk",
    data: list[Tensor] | None = None,
    where: Order | None = None,
    sae_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer whose weights are drawn by a fixed seed, with rows of many norms."""
    where = order(kind=kind) if where is None else where
    torch.manual_seed(0)
    extra = {"matryoshka_widths": list(WIDTHS)} if kind == "matryoshka" else {}
    config = getattr(saes, CLASSES[kind] + "Config")
    sae = getattr(saes, CLASSES[kind])(config(d_in=D, d_sae=F, k=K, **extra, **(sae_options or {})))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(F, generator=g))
        sae.b_dec.copy_(0.1 * torch.randn(D, generator=g))
        sae.W_dec.mul_(0.5 + torch.rand(F, 1, generator=g))
        for p in sae.parameters():
            p.copy_(where.applied(p))
    settings = {"lr": 1e-3, "lr_end": 1e-4, "lr_warm_up_steps": 4, "dead_feature_window": 1000}
    settings |= {"total_training_samples": 10**9, "train_batch_size_samples": B, "device": "cpu"}
    return SAETrainer(SAETrainerConfig(**(settings | options)), sae, iter(data or ()))


def steps(trainer: Any, data: list[Tensor], where: Order | None = None) -> list[Any]:
    """Steps as SAETrainer.fit makes them."""
    outputs = []
    for x in data:
        if where is not None:
            x = x[where.tokens][:, where.dims]
        outputs.append(trainer.step(x))
        trainer.n_training_steps += 1
    return outputs


def seen(trainer: Any, losses: list[float], where: Order) -> Run:
    """The run in the shipped order."""
    sae = trainer.sae
    tensors = {n: p.detach().clone() for n, p in sae.named_parameters()}
    for n, p in sae.named_parameters():
        state = trainer.optimizer.state[p]
        tensors |= {f"{key} of {n}": state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    if hasattr(sae, "topk_threshold"):
        tensors["threshold"] = sae.topk_threshold.clone()
    counts = {n: getattr(trainer, n) for n in ("act_freq_scores", "n_forward_passes_since_fired")}
    figures = [trainer.n_frac_active_samples, trainer.optimizer.param_groups[0]["lr"]]
    figures += [float(trainer.optimizer.state[p]["step"]) for p in sae.parameters()]
    return Run(
        torch.tensor(losses, dtype=torch.float64),
        {n: where.undone(t) for n, t in tensors.items()},
        {n: where.undone(t) for n, t in counts.items()} | {"figures": torch.tensor(figures)},
    )


def run(
    kind: str, n: int, seed: int = 0, fast: bool = False, few_dead: bool = False, **options: Any
) -> Run:
    where, data = order(seed, kind), batches(n, B, D)
    trainer = make(kind, where=where, **options)
    if few_dead:
        let_die(trainer, where)
    with sk.accelerate("sae_lens", level="trainer") if fast else contextlib.nullcontext() as handle:
        outputs = steps(trainer, data, where)
        if handle is not None:
            assert handle.report().taken == {WHAT: n}
            assert not handle.report().left
    return seen(trainer, [float(o.loss.detach()) for o in outputs], where)


def let_die(trainer: Any, where: Order) -> None:
    """Five latents that never fire and have not for long; fewer than AuxK keeps per token."""
    dead = torch.isin(where.latents, torch.arange(0, F, 100)[:5])
    with torch.no_grad():
        trainer.sae.b_enc[dead] = -5.0
    trainer.n_forward_passes_since_fired[dead] = 2000


def check(kind: str, n: int, **options: Any) -> None:
    ours, shipped = run(kind, n, fast=True, **options), run(kind, n, **options)
    assert_same_run(ours, shipped, [run(kind, n, seed=i, **options) for i in (1, 2, 3)])


def level(name: str | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if name is None else sk.accelerate("sae_lens", level=name)


def silent() -> Any:
    from sae_lens.config import LoggingConfig

    return LoggingConfig(log_to_wandb=False)
