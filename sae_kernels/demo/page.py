"""The report of a demo run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from sae_kernels import machine
from sae_kernels.report import RunReport
from sae_kernels.report.examples import decoder_cosine, latent_examples
from sae_kernels.report.latent_table import latent_table
from sae_kernels.report.run import training_curve
from sae_kernels.report.run_data import to_text
from sae_kernels.report.run_facts import dead_rule
from sae_kernels.step.base import compute_dtype

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from sae_kernels.config import TrainConfig
    from sae_kernels.data import ShardDataset
    from sae_kernels.training import Evaluation, TrainingResult


def describe(
    trained: TrainingResult,
    held_out: Evaluation,
    sides: dict[str, ShardDataset],
    config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> RunReport:
    """Fills in the report of a demo run."""
    sae = trained.sae
    shape = sae.config
    assert config.objective is not None
    seen = config.steps * config.batch_size
    return RunReport(
        title="A sparse autoencoder of MiniLM",
        subtitle=f"{shape.n_latents:,} latents, {shape.k} per token, trained in "
        f"{trained.seconds:.0f} seconds on what layer 4 makes of Python's own documentation.",
        facts={
            "model": "all-MiniLM-L6-v2",
            "layer": str(sides["train"].metadata["layer"]),
            "text": "pydoc topics and docstrings of the standard library",
            "harvested tokens": f"{sides['train'].n_tokens:,}",
            "held-out tokens": f"{held_out.n_tokens:,}",
            "d_in": f"{shape.d_in}",
            "n_latents": f"{shape.n_latents:,}",
            "k": f"{shape.k}",
            "steps": f"{config.steps:,} of {config.batch_size:,} tokens",
            "learning rate": f"{config.learning_rate(config.steps // 2, shape.n_latents):g}",
            "compute": str(compute_dtype(config.optimizer.compute)).removeprefix("torch."),
            "seed": f"{config.seed}",
            "processor": f"{machine.cpu_model()}, {torch.get_num_threads()} threads",
            "versions": ", ".join(f"{n} {v}" for n, v in machine.versions().items() if v),
        },
        metrics={
            **{key: v for key, v in held_out.scalars().items() if key != "n_tokens"},
            "dead_fraction": float(trained.dead.float().mean()),
            "seconds": trained.seconds,
            "tokens_per_second": seen / trained.seconds,
        },
        curve=training_curve(trained.metrics),
        measured_fvu=held_out.fvu,
        latent_density=held_out.latent_density,
        decoder_cosine=decoder_cosine(sae.W_dec),
        examples=latent_examples(sae, sides["held_out"], to_text(tokenizer)),
        command=f"sae-kernels demo --steps {config.steps} --seed {config.seed}",
        dead_rule=dead_rule(seen, config.objective.dead_after_tokens),
        latents=latent_table(sae, sides["held_out"], to_text(tokenizer)),
    )
