"""Making the report of a run's folder: its settings and metrics, and its SAE measured on data."""

from __future__ import annotations

import dataclasses
import math
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sae_kernels.config.toml import read_tables
from sae_kernels.errors import DataError
from sae_kernels.io.files import read_json
from sae_kernels.nn import SparseAutoencoder
from sae_kernels.runs import checkpoint
from sae_kernels.runs.folder import METRICS_FILE, RESULT_FILE, RUN_FILE, SAE_FOLDER
from sae_kernels.runs.metrics import read_metrics
from sae_kernels.training.evaluate import evaluate

from .data import CurvePoint, RunReport
from .examples import decoder_cosine, latent_examples
from .latent_table import latent_table
from .run_data import FirstRows, opened, tokens_of
from .run_facts import dead_rule, facts, results, subtitle, training_settings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from .latent_table import Effects

MAX_TOKENS = 65536
_MAX_CODES = 1 << 25  # held in memory while examples are chosen


def run_report(
    folder: str | Path,
    data: Sequence[str | Path] = (),
    *,
    target: Sequence[str | Path] = (),
    max_tokens: int = MAX_TOKENS,
    tokenizer: str | Path | None = None,
    browser: bool = False,
    effects: Callable[[SparseAutoencoder], Effects] | None = None,
) -> RunReport:
    """Makes the report of a run, finished or not.

    Without ``data`` the SAE is measured on the run's own folders, if they still exist, and the page
    says that these are training data. Whatever is unknown is left out.

    Args:
        folder: of the run.
        data: folders of activations, a crosscoder's in order.
        target: folders of what a transcoder is to reconstruct, one or, across layers, several.
        max_tokens: at most so many tokens are measured, the first ones.
        tokenizer: whose tokens the activations belong to, for latents in context: a folder, or a
            name on the hub. None: the local model folder that the activations came from, if any.
        browser: collect all latents too, for a page to search them.
        effects: for that page, what an SAE's latents promote and suppress, five tokens each, as
            :func:`sae_kernels.interventions.latent_effects` says.

    Raises:
        DataError: no run, an SAE that is not there yet, damaged or missing data.
        ValueError: data of another width than the SAE's, a target too many or too few.
        ModelError, ImportError: a tokenizer that was named and cannot be loaded.
    """
    folder = Path(folder)
    if not (folder / RUN_FILE).is_file():
        raise DataError(f"{folder}: expected the folder of a run, it has no {RUN_FILE}")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: expected at least 1, got {max_tokens}")
    tables = read_tables(folder / RUN_FILE)
    lines = read_metrics(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    finished = (folder / RESULT_FILE).is_file()
    result, last = read_json(folder / RESULT_FILE) if finished else {}, lines[-1] if lines else {}
    path = newest_sae(folder)
    sae = SparseAutoencoder.from_pretrained(path)
    activations = opened(data, target, tables)
    measured = examples = latents = None
    if activations is not None:
        source = FirstRows(activations.source(), max_tokens)
        goal = activations.target()
        measured = evaluate(sae, source, target=goal and FirstRows(goal, max_tokens))
        to_tokens = tokens_of(tokenizer, activations, tables)
        if to_tokens is not None:
            few = FirstRows(source, max(1, int(_MAX_CODES / max(1.0, measured.l0))))
            examples = latent_examples(sae, few, to_tokens)
            if browser:
                latents = latent_table(sae, few, to_tokens, effects and effects(sae))
    if browser and latents is None:
        raise DataError(
            "the latent browser: expected activations with their tokens (`sae-kernels harvest` "
            "stores them) and a tokenizer, got none; name them by --data and --tokenizer"
        )
    training = activations is not None and activations.training
    settings = training_settings(tables)
    return RunReport(
        title=f"Run {folder.resolve().name}",
        subtitle=subtitle(sae, None if path.name == SAE_FOLDER else path.name, measured, training),
        facts=facts(tables, sae, activations, last),
        metrics=results(measured, last, result),
        curve=training_curve(lines),
        measured_fvu=None if measured is None else measured.fvu,
        latent_density=None if measured is None else measured.latent_density,
        decoder_cosine=decoder_cosine(sae.decoder_rows()),
        examples=examples,
        command=repeat_command(folder / RUN_FILE, tables),
        dead_rule=dead_rule(last.get("tokens"), settings.get("dead_after_tokens")),
        measured_on="training" if training else "evaluation",
        latents=latents,
    )


def newest_sae(folder: Path) -> Path:
    """The folder of a run's SAE: the final one, or that of the newest undamaged checkpoint.

    Raises:
        DataError: there is none yet, or all checkpoints are damaged.
    """
    parent, damaged = folder / checkpoint.CHECKPOINTS, None
    for step in [] if (folder / RESULT_FILE).is_file() else reversed(checkpoint.steps(parent)):
        path = checkpoint.path_of(parent, step)
        try:
            checkpoint.verify(path)
        except DataError as error:
            damaged = damaged or error
        else:
            return path
    if damaged is not None:
        raise damaged
    if not (folder / SAE_FOLDER).is_dir():
        raise DataError(
            f"{folder}: expected a run with an SAE or a checkpoint, it has neither yet; wait for "
            "its first checkpoint, or resume it"
        )
    return folder / SAE_FOLDER


def repeat_command(run_file: Path, tables: Mapping[str, Any]) -> str | None:
    """The shell command that repeats a run on stored activations; None for other runs."""
    if not tables.get("data", {}).get("folders"):
        return None
    return f"sae-kernels train --config {shlex.quote(str(run_file))} --out again"


def training_curve(lines: Sequence[Mapping[str, Any]]) -> list[CurvePoint]:
    """Converts metric lines to a training curve; missing numbers are NaN.

    >>> training_curve([{"step": 10, "loss": 0.5, "fvu": None, "l0": 4.0}])
    [CurvePoint(step=10, loss=0.5, fvu=nan, l0=4.0, dead_fraction=nan)]
    """
    names = [field.name for field in dataclasses.fields(CurvePoint)][1:]
    return [
        CurvePoint(
            line["step"], *(math.nan if (v := line.get(name)) is None else v for name in names)
        )
        for line in lines
    ]
