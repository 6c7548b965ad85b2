"""Running the demo, from a transformer's activations to a trained SAE and a report."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import torch

from sae_kernels import machine
from sae_kernels.config import DataConfig, OutputConfig, TrainConfig
from sae_kernels.data import ShardDataset
from sae_kernels.demo.page import describe
from sae_kernels.demo.stages import StageTimer
from sae_kernels.errors import DataError
from sae_kernels.harvest import harvest, load_model, minilm_folder, python_corpus, split_documents
from sae_kernels.nn import TopKConfig, TopKObjective
from sae_kernels.report import write_report
from sae_kernels.runs.folder import SAE_FOLDER
from sae_kernels.training import evaluate, train

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from transformers import PreTrainedTokenizerBase

LAYER = "encoder.layer.4"
DEAD_AFTER_TOKENS = 200_000
ACTIVATIONS, SIDES = "activations", ("train", "held_out")
MARKER = "demo.json"


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """The figures and files of a demo run.

    Attributes:
        fvu: on the held-out documents, about their mean.
        explained_variance, l0, cosine: on them too.
        dead_fraction: latents that did not fire in the last 200,000 training tokens.
        seconds: of everything, and of each stage.
        report: the page.
        sae: the folder for ``TopKSAE.from_pretrained``.
    """

    fvu: float
    explained_variance: float
    l0: float
    cosine: float
    dead_fraction: float
    seconds: float
    stages: dict[str, float]
    report: Path
    sae: Path


def train_config(steps: int, seed: int) -> TrainConfig:
    """The demo's training settings, for a short run: high learning rate, small batches."""
    objective = TopKObjective(dead_after_tokens=DEAD_AFTER_TOKENS)
    return TrainConfig(steps=steps, batch_size=1024, lr=4e-3, seed=seed, objective=objective)


def sae_config(d_in: int) -> TopKConfig:
    """The configuration of the demo's SAE."""
    return TopKConfig(d_in=d_in, n_latents=8 * d_in, k=32)


def run_demo(
    out: Path,
    *,
    steps: int = 600,
    seed: int = 0,
    train_tokens: int = 200_000,
    held_out_tokens: int = 24_000,
    documents: Iterable[str] | None = None,
    progress: Callable[[str, int, int], object] = lambda stage, done, total: None,
    on_metrics: Callable[[dict[str, Any]], object] = lambda line: None,
) -> DemoResult:
    """Harvests MiniLM's layer 4, trains a TopK SAE (F = 8 D, K = 32) on it, writes a report.

    Args:
        out: a new folder, or one that an earlier demo made, whose content is replaced.
        steps: optimizer steps of 1024 tokens.
        seed: of the weights and the order of the tokens.
        train_tokens, held_out_tokens: harvested from the two sides of a 90/10 split by document.
        documents: the text; default: what Python ships (:func:`python_corpus`).
        progress: called with a stage, what is done of it and its total.
        on_metrics: called with each metric line.

    Raises:
        DataError: the folder holds something else.
        ModelError, ImportError: the demo's extra is not installed.
    """
    timer = StageTimer(progress)
    model = minilm_folder()
    _claim(out)
    timer.stage("read text", 1)
    texts = split_documents(python_corpus() if documents is None else documents)
    tokenizer = _harvest(model, texts, (train_tokens, held_out_tokens), out / ACTIVATIONS, timer)
    sides = {side: ShardDataset(out / ACTIVATIONS / side) for side in SIDES}
    timer.stage("train", steps)

    def on_step(step: int, line: dict[str, Any] | None) -> None:
        timer.advance(1)
        if line is not None:
            on_metrics(line)

    config = train_config(steps, seed)
    shape = sae_config(sides["train"].d_in)
    trained = train(
        shape,
        sides["train"],
        config,
        folder=out,
        output=OutputConfig(checkpoint_every=0),  # half a minute can be had again
        data=DataConfig(folders=(str(sides["train"].folder.absolute()),)).to_dict(),
        overwrite=True,
        on_step=on_step,
    )
    timer.stage("evaluate", 1)
    held_out = evaluate(trained.sae, sides["held_out"])
    timer.stage("report", 1)
    page = write_report(describe(trained, held_out, sides, config, tokenizer), out)
    result = DemoResult(
        fvu=held_out.fvu,
        explained_variance=held_out.explained_variance,
        l0=held_out.l0,
        cosine=held_out.cosine,
        dead_fraction=float(trained.dead.float().mean()),
        seconds=timer.finish(),
        stages=timer.seconds,
        report=page,
        sae=out / SAE_FOLDER,
    )
    _mark(out, {"result": dataclasses.asdict(result)})
    return result


def _harvest(
    model_folder: Path,
    texts: tuple[list[str], list[str]],
    limits: tuple[int, int],
    folder: Path,
    timer: StageTimer,
) -> PreTrainedTokenizerBase:
    timer.stage("load model", 1)
    model, tokenizer = load_model(model_folder)
    # Products are four fifths of the model's time.
    autocast = torch.bfloat16 if machine.bf16_slowdown() < 0.5 else None
    for side, text, limit in zip(SIDES, texts, limits, strict=True):
        timer.stage(f"harvest {side.replace('_', '-')}", limit)
        harvest(
            model,
            tokenizer,
            text,
            LAYER,
            folder / side,
            max_tokens=limit,
            # float16 holds the layer norm's small values and halves the bytes on disk.
            dtype=torch.float16,
            autocast=autocast,
            overwrite=True,
            progress=timer.advance,
        )
    return tokenizer


def _claim(out: Path) -> None:
    """Makes and marks the demo's folder; raises DataError if it holds anything else."""
    if out.exists() and not (out / MARKER).is_file() and (out.is_file() or any(out.iterdir())):
        raise DataError(
            f"{out}: expected a new folder or one of an earlier demo, got something else; "
            "choose another with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    _mark(out, {"result": None})


def _mark(out: Path, values: dict[str, Any]) -> None:
    text = json.dumps({"made_by": "sae-kernels demo", **values}, indent=2, default=str)
    (out / MARKER).write_text(text + "\n", encoding="utf-8")
