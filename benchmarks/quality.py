"""Every architecture on real activations: ``python -m benchmarks.quality ACTS --out FILE``.

ACTS is filled with what three layers of the demo's model make of the demo's text, the same tokens
in each, unless it holds them already. Each architecture is trained as the command line would, with
the demo's batch and L0 aimed at 32, and evaluated on held-out documents. ``--revival`` trains each
with AuxK, with resampling and without either, in the place of what is its default.
Nothing is timed. ``python -m benchmarks.quality --page`` writes the tables into
docs/architectures.md, and ``quality_peers``' too.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.study import DOCS, RESULTS, commit, parser, read, report
from sae_kernels.data import JointRows, ShardDataset
from sae_kernels.demo.run import DEAD_AFTER_TOKENS, train_config
from sae_kernels.harvest import harvest, load_model, minilm_folder, python_corpus, split_documents
from sae_kernels.nn import presets
from sae_kernels.plotting.tables import markdown
from sae_kernels.step.base import compute_dtype
from sae_kernels.training import evaluate, train
from sae_kernels.training.run_config import RunConfig, Widths

if TYPE_CHECKING:
    from collections.abc import Sequence

LAYER, LAYERS = "encoder.layer.{}", (3, 4, 5)
TOKENS = {"train": 200_000, "held_out": 24_000}
PAGE = DOCS / "architectures.md"
MARK = "<!-- written by benchmarks.quality -->"
COLUMNS = ("architecture", "FVU", "of the seeds", "L0", "dead in training", "bits a token")
# Ways to revive dead latents, as tables of settings: a latent is dead after a quarter of 800 steps.
REVIVAL: dict[str, dict[str, dict[str, Any]]] = {
    "default": {},
    "AuxK": {"objective": {"auxk_alpha": 1 / 32}},
    "resampling": {"objective": {"auxk_alpha": 0.0}, "train": {"resample_every": 200}},
    "neither": {"objective": {"auxk_alpha": 0.0}},
}


def fill(acts: Path) -> None:
    """Harvests the layers over both sides of the text."""
    model, tokenizer = load_model(minilm_folder())
    texts = split_documents(python_corpus())
    native = compute_dtype("auto")
    for layer in (LAYER.format(n) for n in LAYERS):
        for (side, limit), text in zip(TOKENS.items(), texts, strict=True):
            settings: dict[str, Any] = {"max_tokens": limit, "dtype": torch.float16}
            settings["autocast"] = None if native == torch.float32 else native
            harvest(model, tokenizer, text, layer, acts / layer / side, **settings)


def layers_of(arch: str) -> tuple[Sequence[int], Sequence[int]]:
    """The layers that an architecture reads, and those it predicts; none if it reconstructs."""
    if arch.endswith("clt"):
        return (3, 4), (4, 5)
    if arch.endswith("transcoder"):
        return (3,), (4,)
    return ((3, 4) if "crosscoder" in arch else (4,)), ()


def of_layer(acts: Path, side: str, layer: int) -> ShardDataset:
    """One layer's rows of one side of the text."""
    return ShardDataset(acts / LAYER.format(layer) / side)


def _joint(acts: Path, side: str, layers: Sequence[int]) -> JointRows:
    return JointRows([of_layer(acts, side, layer) for layer in layers])


def settings_of(
    arch: str, d_in: int, steps: int, seed: int, lr: float | None, revival: str = "default"
) -> RunConfig:
    """The demo's settings of an architecture, on all layers that it reads and predicts."""
    sources, targets = layers_of(arch)
    demo = train_config(steps, seed).to_dict()
    ours = {name: demo[name] for name in ("steps", "batch_size")}
    tables: dict[str, Any] = {
        "arch": arch,
        "train": {**ours, "seed": seed, **({"lr": lr} if lr else {})},
    }
    tables["objective"] = {"dead_after_tokens": DEAD_AFTER_TOKENS}
    for name, changes in REVIVAL[revival].items():
        tables[name].update(changes)
    return RunConfig.from_tables(tables, Widths([d_in] * len(sources), [d_in] * len(targets)))


def run(
    acts: Path, arch: str, steps: int, seed: int, lr: float | None, revival: str = "default"
) -> dict[str, Any]:
    """Trains and evaluates one architecture; lr None is the default."""
    sources, targets = layers_of(arch)
    data = {side: _joint(acts, side, sources) for side in TOKENS}
    target = {side: _joint(acts, side, targets) if targets else None for side in TOKENS}
    d_in = of_layer(acts, "train", LAYERS[0]).d_in
    settings = settings_of(arch, d_in, steps, seed, lr, revival)
    done = train(settings.sae, data["train"], settings.train, target=target["train"])
    measured = evaluate(done.sae, data["held_out"], target=target["held_out"])
    return {
        "arch": arch if revival == "default" else f"{arch}, {revival}",
        "seed": seed,
        "steps": steps,
        **measured.scalars(),
        "dead_in_training": float(done.dead.float().mean()),
        "sae": done.sae.config.to_dict(),
        "train": settings.train.to_dict(),
    }


def table(path: Path) -> str:
    """One results file as Markdown."""
    facts, lines = read(path)
    line = lines[0]
    about = (
        f"Held-out documents; {line['steps']} steps of {line['train']['batch_size']} "
        f"tokens, {line['sae']['n_latents']} latents, learning rate "
        f"{line['train']['lr'] or 'by default'}; "
        f"{facts['cpu']}, torch {facts['torch']}, {commit(facts)}: "
        f"`{facts['command']}`. Transcoders predict layer 4 from layer 3, across layers 4 and 5 "
        "from 3 and 4; crosscoders reconstruct 3 and 4, the others 4. L0 is of both layers."
    )
    names = dict.fromkeys(line["arch"] for line in lines)
    rows = [_cells(name, [line for line in lines if line["arch"] == name]) for name in names]
    return f"{about}\n\n{markdown(COLUMNS, rows)}"


def _cells(name: str, runs: list[dict[str, Any]], silent: str = "dead_in_training") -> list[str]:
    """The means over an architecture's seeds, and each seed's FVU."""

    def mean(key: str) -> float:
        return float(sum(run[key] for run in runs) / len(runs))

    seeds = ", ".join(f"{run['fvu']:.4f}" for run in runs)
    bits = f"{mean('bits_per_token'):.0f}" if "bits_per_token" in runs[0] else ""
    dead = f"{100 * mean(silent):.1f} %"
    return [name, f"{mean('fvu'):.4f}", seeds, f"{mean('l0'):.1f}", dead, bits]


def peers_table() -> str:
    """The peers' runs and ours of the same architectures as Markdown."""
    files = [read(path) for path in sorted(RESULTS.glob("peers-*.jsonl"))]
    theirs = [(facts, line) for facts, lines in files for line in lines]
    kinds = sorted({line["arch"] for _, line in theirs})
    _, own = read(RESULTS / "quality-zen5.jsonl")
    rows = []
    for arch in kinds:
        runs = {"ours": [line for line in own if line["arch"] == arch]}
        for _, line in sorted(theirs, key=lambda each: (each[1]["peer"], each[1]["seed"])):
            if line["arch"] == arch:
                runs.setdefault(line["peer"], []).append(line)
        rows += [_cells(f"{arch}, {name}", lines, "dead_fraction") for name, lines in runs.items()]
    commits = ", ".join(dict.fromkeys(commit(facts) for facts, _ in theirs))
    about = (
        f"Other trainers on the same tokens: `python -m benchmarks.quality_peers acts`; {commits}."
    )
    head = ("architecture and trainer", *COLUMNS[1:4], "silent on held-out", COLUMNS[5])
    return f"{about}\n\n{markdown(head, rows)}"


def text(page: str) -> str:
    """The page with tables of today's results after its mark."""
    tables = [table(path) for path in sorted(RESULTS.glob("quality-*.jsonl"))]
    return "\n\n".join([page.partition(MARK)[0] + MARK, peers_table(), *tables]) + "\n"


def main() -> None:
    """Trains, evaluates, writes a line per architecture."""
    made = parser(__doc__, steps=800)
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--lr", type=float, help="default: the default learning rate")
    made.add_argument("acts", type=Path, nargs="?")
    made.add_argument("--only", nargs="+", choices=presets(), default=list(presets()))
    made.add_argument("--revival", nargs="+", choices=REVIVAL, default=["default"])
    made.add_argument("--page", action="store_true")
    options = made.parse_args()
    if options.acts is not None:
        if not options.acts.exists():
            fill(options.acts)
        each = itertools.product(options.seeds, options.only, options.revival)
        records = (
            run(options.acts, arch, options.steps, seed, options.lr, revival)
            for seed, arch, revival in each
        )
        report("quality", records, options.out)
    if options.page:
        PAGE.write_text(text(PAGE.read_text()))


if __name__ == "__main__":
    main()
