"""Switch against TopK: ``python -m benchmarks.switch_frontier --data A --held-out B --out FILE``.

Trains both on stored activations, at equal width (as many latents in all) and at equal FLOPs (as
many in each expert), and evaluates them on held-out ones; a line per run. ``--plots DIR`` draws a
file's runs, ``--page`` renews docs/switch.md and its pictures from benchmarks/results.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks.study import RESULTS, parser, read
from benchmarks.switch_frontier import pictures, tables
from benchmarks.switch_frontier.runs import ARMS, plans, run
from sae_kernels.bench.provenance import provenance
from sae_kernels.data import ShardDataset
from sae_kernels.runs.metrics import MetricLog, read_metrics

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

COMMAND = "python -m benchmarks.switch_frontier"
NUMBERS = {"n_latents": 3072, "steps": 800, "batch_size": 1024, "lr": 2e-3}
SETTINGS = ("n_latents", "experts", "k", "arms", "seeds", "steps", "batch_size", "lr")
LISTS = {"experts": [2, 4, 8, 16], "k": [8, 16, 32, 64], "seeds": [0, 1, 2]}


def make(options: argparse.Namespace) -> None:
    """Trains what is not in the file yet."""
    torch.set_num_threads(options.threads)
    data, held_out = ShardDataset(options.data), ShardDataset(options.held_out)
    made = read_metrics(options.out) if options.out.exists() else []
    wanted = list(plans(**{name: getattr(options, name) for name in SETTINGS}))
    for plan in wanted:
        plan.sae(data.d_in)  # what is wrong with the settings shows before the first run
    with MetricLog(options.out) as log:
        if not made:
            log.write({"provenance": {**provenance(COMMAND), "command": command(options)}})
        for plan in wanted:
            if not any(plan.made(record) for record in made):
                record = run(plan, data, held_out)
                log.write(record)
                print(SUMMARY.format(**record), flush=True)


SUMMARY = (
    "{arm:5} E={n_experts:<3} F={n_latents:<6} k={k:<3} seed {seed}: FVU {fvu:.4f}, {step_ms:.1f} "
    "ms a step, {seconds:.1f} s, dead {dead_fraction:.3f}, effective experts "
    "{effective_experts:.2f}"
)


def command(options: argparse.Namespace) -> str:
    """The command with every setting and without this machine's folders."""
    words = [COMMAND]
    for name in SETTINGS:
        value = getattr(options, name)
        values = value if isinstance(value, list) else [value]
        words += [f"--{name.replace('_', '-')}", *map(str, values)]
    return " ".join(words)


def draw(results: Path, folder: Path) -> None:
    """Draws a file's runs into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in pictures.draw(read(results)[1]):
        (folder / f"{picture.name}.png").write_bytes(picture.png)


def main(arguments: Sequence[str] | None = None) -> None:
    """Trains, draws and writes, whatever was asked for."""
    asked = parser(__doc__, **NUMBERS, threads=2)
    asked.prog = COMMAND
    asked.add_argument("--data", type=Path, help="a folder of stored activations to train on")
    asked.add_argument("--held-out", type=Path, help="another to evaluate on")
    asked.add_argument("--resume", action="store_true", help="make the runs that --out lacks")
    asked.add_argument("--plots", type=Path, help="draw the runs of --out into this folder")
    asked.add_argument("--page", action="store_true", help="renew docs/switch.md")
    asked.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS))
    for name, default in LISTS.items():
        asked.add_argument(f"--{name}", type=int, nargs="+", default=default)
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
        for path in sorted(RESULTS.glob(tables.PATTERN))[:1]:
            draw(path, tables.PICTURES)
        tables.PAGE.write_text(tables.written(tables.PAGE.read_text()))


if __name__ == "__main__":
    main()
