"""Switch against TopK: ``python -m benchmarks.switch_frontier --data A --held-out B --out FILE``.

Trains both on stored activations, at equal width (as many latents in all) and at equal FLOPs (as
many in each expert), and evaluates them on held-out ones; a line per run. ``--plots DIR`` draws a
file's runs, ``--page`` renews docs/switch.md and its pictures from benchmarks/results.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.switch_frontier import pictures, tables
from benchmarks.switch_frontier.runs import ARMS, Plan, plans, run
from sae_kernels.bench.provenance import provenance
from sae_kernels.data import ShardDataset
from sae_kernels.runs.metrics import MetricLog, read_metrics

if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND = "python -m benchmarks.switch_frontier"


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    made.add_argument("--data", type=Path, help="a folder of stored activations to train on")
    made.add_argument("--held-out", type=Path, help="another to evaluate on")
    made.add_argument("--out", type=Path, help="the file of results, a JSON line a run")
    made.add_argument("--resume", action="store_true", help="make the runs that --out lacks")
    made.add_argument("--plots", type=Path, help="draw the runs of --out into this folder")
    made.add_argument("--page", action="store_true", help="renew docs/switch.md")
    made.add_argument("--n-latents", type=int, default=3072, help="TopK's")
    made.add_argument("--experts", type=int, nargs="+", default=[2, 4, 8, 16])
    made.add_argument("--k", type=int, nargs="+", default=[8, 16, 32, 64])
    made.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    made.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    made.add_argument("--steps", type=int, default=800)
    made.add_argument("--batch-size", type=int, default=1024)
    made.add_argument("--lr", type=float, default=2e-3)
    made.add_argument("--threads", type=int, default=2)
    return made


def make(options: argparse.Namespace) -> None:
    """Trains what is not in the file yet."""
    torch.set_num_threads(options.threads)
    data, held_out = ShardDataset(options.data), ShardDataset(options.held_out)
    made = read_metrics(options.out) if options.out.exists() else []
    wanted = list(_plans(options))
    for plan in wanted:
        plan.sae(data.d_in)  # what is wrong with the settings shows before the first run
    with MetricLog(options.out) as log:
        if not made:
            facts = provenance(COMMAND)
            log.write({"provenance": {**facts, "command": command(options)}})
        for plan in wanted:
            if not any(plan.made(record) for record in made):
                record = run(plan, data, held_out)
                log.write(record)
                print(summary(record), flush=True)


def _plans(options: argparse.Namespace) -> list[Plan]:
    lists = options.n_latents, options.experts, options.k, options.seeds, options.arms
    given = {name: getattr(options, name) for name in ("steps", "batch_size", "lr")}
    return list(plans(*lists, **given))


def command(options: argparse.Namespace) -> str:
    """The command with every setting and without this machine's folders."""
    words = [COMMAND]
    for name in ("n_latents", "experts", "k", "arms", "seeds", "steps", "batch_size", "lr"):
        value = getattr(options, name)
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def summary(record: dict[str, object]) -> str:
    """A run in a line."""
    return (
        "{arm:5} E={n_experts:<3} F={n_latents:<6} k={k:<3} seed {seed}: FVU {fvu:.4f}, "
        "{step_ms:.1f} ms a step, {seconds:.1f} s, dead {dead_fraction:.3f}, effective experts "
        "{effective_experts:.2f}"
    ).format(**record)


def draw(results: Path, folder: Path) -> None:
    """Draws a file's runs into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures.draw(tables.read(results)[1]):
        (folder / f"{picture.name}.png").write_bytes(picture.png)


def write_page() -> None:
    """Draws the first results file and renews the page."""
    for path in sorted(tables.RESULTS.glob(tables.PATTERN))[:1]:
        draw(path, tables.PICTURES)
    tables.PAGE.write_text(tables.written(tables.PAGE.read_text()))


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, draws and writes, whatever was asked for."""
    asked = parser()
    options = asked.parse_args(arguments)
    if options.data is not None:
        if options.held_out is None or options.out is None:
            asked.error("--data: expected --held-out and --out with it")
        if options.out.exists() and not options.resume:
            asked.error(f"{options.out}: it holds results; go on with --resume, or move it away")
        make(options)
    if options.plots is not None:
        if options.out is None:
            asked.error("--plots: expected --out, the file whose runs are drawn")
        draw(options.out, options.plots)
    if options.page:
        write_page()


if __name__ == "__main__":
    main()
