"""Runs of sparsify's own Trainer on a small random GPT-2, for comparison with one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

pytest.importorskip("sparsify", reason="needs sparsify: python -m benchmarks.peer_tests sparsify")

import torch
from datasets import Dataset
from sparsify import SparseCoderConfig, TrainConfig, Trainer
from transformers import GPT2Config, GPT2LMHeadModel

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

STEPS, BATCH, LENGTH, WORDS = 20, 4, 16, 64


class Run(NamedTuple):
    """What a training run left behind.

    Attributes:
        before, after: weights by hookpoint and name.
        counters: tokens since each latent fired, by hookpoint.
        optimizer: the optimizers' tensors, by place and name.
    """

    before: dict[str, torch.Tensor]
    after: dict[str, torch.Tensor]
    counters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]


def run(
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
    order: int = 0,
    prepare: Callable[[Any], None] = lambda trainer: None,
    sae: dict[str, Any] | None = None,
    **config: Any,
) -> Run:
    """Trains for STEPS steps.

    Args:
        folder: for the run's checkpoint.
        dtype: of the model and its SAEs.
        order: seed of the order of the sequences in each batch, which no exact sum depends on; 0
            for theirs.
        prepare: is given the trainer before it starts.
        sae, config: settings beside the neutral ones.
    """
    torch.manual_seed(0)
    config_of = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": LENGTH}
    model: Any = GPT2LMHeadModel(GPT2Config.from_dict(config_of | {"vocab_size": WORDS}))
    model = model.to(dtype).eval()
    tokens = torch.randint(0, WORDS, (STEPS, BATCH, LENGTH))
    if order:
        draw = torch.Generator().manual_seed(order)
        places = torch.stack([torch.randperm(BATCH, generator=draw) for _ in range(STEPS)])
        tokens = tokens.gather(1, places[:, :, None].expand_as(tokens))
    data = Dataset.from_dict({"input_ids": tokens.flatten(0, 1).tolist()}).with_format("torch")
    settings: dict[str, Any] = {"layers": [1], "batch_size": BATCH, "lr": 1e-3} | config
    coder = SparseCoderConfig(**({"num_latents": 128, "k": 8} | (sae or {})))
    trainer = Trainer(
        TrainConfig(coder, log_to_wandb=False, save_dir=str(folder), **settings), data, model
    )
    for each in trainer.saes.values():
        each.to(dtype)
        torch.nn.init.normal_(each.encoder.bias, std=0.05)
    prepare(trainer)
    before = _weights(trainer)
    trainer.fit()
    states: dict[str, torch.Tensor] = {}
    for n, optimizer in enumerate(trainer.optimizers):
        for place, state in optimizer.state_dict()["state"].items():
            for name, value in state.items():
                states[f"{n}/{place}/{name}"] = torch.as_tensor(value).clone()
    counters = {name: each.clone() for name, each in trainer.num_tokens_since_fired.items()}
    return Run(before, _weights(trainer), counters, states)


def _weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {
        f"{hook}/{name}": p.detach().clone()
        for hook, sae in trainer.saes.items()
        for name, p in sae.named_parameters()
    }
