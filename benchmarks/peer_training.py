"""Trains an SAE by a peer's own trainer, in the peer's environment, for ``quality_peers.py``.

It imports the peer and torch alone. Schedules and L0 are those of our runs, everything else is the
peer's default; what it leaves is the folder that the peer itself writes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

if TYPE_CHECKING:
    from collections.abc import Iterator

WARMUP, DECAY = 1 / 20, 1 / 5  # of the run, as ours; a sparsity penalty rises over a fifth


def batches(rows: torch.Tensor, size: int, seed: int) -> Iterator[torch.Tensor]:
    """Batches of all rows in a random order, again and again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        for part in torch.randperm(len(rows), generator=generator).split(size):
            if len(part) == size:
                yield rows[part]


def dictionary_learning(task: dict[str, Any], data: Iterator[torch.Tensor], out: Path) -> None:
    """``trainSAE`` with its trainer of the architecture."""
    from dictionary_learning import trainers
    from dictionary_learning.training import trainSAE

    steps = task["steps"]
    own: dict[str, dict[str, Any]] = {
        "batchtopk": {
            "trainer": trainers.BatchTopKTrainer,
            "k": task["target_l0"],
            "threshold_start_step": steps // 2,  # by default 1000, after the run
        },
        "jumprelu": {
            "trainer": trainers.JumpReluTrainer,
            "target_l0": task["target_l0"],
            "sparsity_warmup_steps": steps // 5,
        },
    }
    shape = {"activation_dim": task["d_in"], "dict_size": task["n_latents"], "layer": 0}
    schedule = {"warmup_steps": int(WARMUP * steps), "decay_start": int((1 - DECAY) * steps)}
    run = {"steps": steps, "lr": task["lr"], "seed": task["seed"], "device": "cpu", "lm_name": "-"}
    config = {**own[task["arch"]], **shape, **schedule, **run}
    trainSAE(data, [config], steps=steps, save_dir=str(out), device="cpu")


def sae_lens(task: dict[str, Any], data: Iterator[torch.Tensor], out: Path) -> None:
    """``SAETrainer.fit`` on its training SAE of the architecture."""
    from sae_lens import saes
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    torch.manual_seed(task["seed"])
    steps, size = task["steps"], task["batch_size"]
    shape = {"d_in": task["d_in"], "d_sae": task["n_latents"], "device": "cpu"}
    sae: Any
    if task["arch"] == "batchtopk":
        sae = saes.BatchTopKTrainingSAE(
            saes.BatchTopKTrainingSAEConfig(k=task["target_l0"], **shape)
        )
    else:
        sae = saes.JumpReLUTrainingSAE(
            saes.JumpReLUTrainingSAEConfig(
                jumprelu_sparsity_loss_mode="quadratic",
                target_l0=task["target_l0"],
                l0_warm_up_steps=steps // 5,
                **shape,
            )
        )
    config = SAETrainerConfig(
        total_training_samples=steps * size,
        train_batch_size_samples=size,
        lr=task["lr"],
        lr_end=task["lr"] / 10,
        lr_warm_up_steps=int(WARMUP * steps),
        lr_decay_steps=int(DECAY * steps),
    )
    SAETrainer(config, sae, data).fit()
    sae.save_inference_model(out)


def main() -> None:
    """Trains what a task file says: ``python peer_training.py TASK ROWS OUT``."""
    task_file, rows, out = map(Path, sys.argv[1:])
    task = json.loads(task_file.read_text())
    torch.set_num_threads(task["threads"])
    data = batches(load_file(rows)["rows"], task["batch_size"], task["seed"])
    {"dictionary_learning": dictionary_learning, "sae_lens": sae_lens}[task["peer"]](
        task, data, out
    )


if __name__ == "__main__":
    main()
