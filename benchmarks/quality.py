"""Every architecture on real activations: ``python -m benchmarks.quality ACTS --out FILE``.

ACTS is filled with what two layers of the demo's model make of the demo's text, the same tokens in
both, unless it holds them already. Each architecture is trained as the command line would, with the
demo's steps, batch and learning rate and L0 aimed at 32, and evaluated on held-out documents.
Nothing is timed. ``python -m benchmarks.quality --page`` writes the table into
docs/architectures.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from sae_kernels.bench.provenance import provenance
from sae_kernels.data import JointRows, ShardDataset
from sae_kernels.demo.run import train_config
from sae_kernels.harvest import harvest, load_model, minilm_folder, python_corpus, split_documents
from sae_kernels.nn import presets
from sae_kernels.step.compute import compute_dtype
from sae_kernels.training import evaluate, train
from sae_kernels.training.run_config import RunConfig, Widths

LAYERS = ("encoder.layer.3", "encoder.layer.4")
TOKENS = {"train": 200_000, "held_out": 24_000}
PAGE = Path(__file__).parent.parent / "docs" / "architectures.md"
RESULTS = Path(__file__).parent / "results"
MARK = "<!-- written by benchmarks.quality -->"


def fill(acts: Path) -> None:
    """Harvests both layers over both sides of the text."""
    model, tokenizer = load_model(minilm_folder())
    texts = split_documents(python_corpus())
    native = compute_dtype("auto")
    for layer in LAYERS:
        for (side, limit), text in zip(TOKENS.items(), texts, strict=True):
            folder = acts / layer / side
            harvest(
                model,
                tokenizer,
                text,
                layer,
                folder,
                max_tokens=limit,
                dtype=torch.float16,
                autocast=None if native == torch.float32 else native,
            )


def run(acts: Path, arch: str, steps: int, seed: int) -> dict[str, Any]:
    """Trains and evaluates one architecture."""
    first, second = ({s: ShardDataset(acts / layer / s) for s in TOKENS} for layer in LAYERS)
    transcodes, crosses = "transcoder" in arch, "crosscoder" in arch
    sources = [first, second] if crosses else [first if transcodes else second]
    data = {s: JointRows([each[s] for each in sources]) for s in TOKENS}
    target = second if transcodes else None
    d_in = second["train"].d_in
    widths = Widths([d_in] * len(sources), d_in if transcodes else None)
    demo = train_config(steps, seed)
    assert demo.objective is not None
    ours = {name: getattr(demo, name) for name in ("steps", "batch_size", "lr")}
    objective = {"dead_after_tokens": demo.objective.dead_after_tokens}
    tables = {"arch": arch, "objective": objective, "train": {**ours, "seed": seed}}
    settings = RunConfig.from_tables(tables, widths)
    config = settings.train
    done = train(settings.sae, data["train"], config, target=target and target["train"])
    measured = evaluate(done.sae, data["held_out"], target=target and target["held_out"])
    return {
        "arch": arch,
        "seed": seed,
        "steps": steps,
        **measured.scalars(),
        "dead_in_training": float(done.dead.float().mean()),
        "sae": done.sae.config.to_dict(),
        "train": config.to_dict(),
    }


def table(path: Path) -> str:
    """One results file as Markdown."""
    first, *lines = (json.loads(line) for line in path.read_text().splitlines())
    facts = first["provenance"]
    rows = [
        f"Held-out documents; {lines[0]['steps']} steps of {lines[0]['train']['batch_size']} "
        f"tokens, {lines[0]['sae']['n_latents']} latents, seed {lines[0]['seed']}; "
        f"{facts['cpu']}, torch {facts['torch']}, commit {facts['commit']}"
        f"{' with changes' if facts['dirty'] else ''}, {facts['time'][:10]}: "
        f"`{facts['command']}`. Transcoders predict layer 4 from layer 3, "
        "crosscoders reconstruct both; the others reconstruct layer 4.",
        "",
        "| architecture | FVU | L0 | dead in training | bits a token |",
        "|---|---:|---:|---:|---:|",
    ]
    for line in lines:
        bits = line.get("bits_per_token")
        rows.append(
            f"| {line['arch']} | {line['fvu']:.4f} | {line['l0']:.1f} | "
            f"{100 * line['dead_in_training']:.1f} % | {'' if bits is None else f'{bits:.0f}'} |"
        )
    return "\n".join(rows)


def write_page() -> None:
    """Replaces what follows the mark in docs/architectures.md."""
    head = PAGE.read_text().partition(MARK)[0]
    tables = [table(path) for path in sorted(RESULTS.glob("quality-*.jsonl"))]
    PAGE.write_text("\n\n".join([head + MARK, *tables]) + "\n")


def main() -> None:
    """Trains, evaluates, writes a line per architecture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("acts", type=Path, nargs="?")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", nargs="+", choices=presets(), default=list(presets()))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if options.acts is not None:
        if not options.acts.exists():
            fill(options.acts)
        lines: list[dict[str, Any]] = [{"provenance": provenance("python -m benchmarks.quality")}]
        for arch in options.only:
            lines.append(run(options.acts, arch, options.steps, options.seed))
            print({k: lines[-1][k] for k in ("arch", "fvu", "l0", "dead_in_training")}, flush=True)
            if options.out is not None:
                options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    if options.page:
        write_page()


if __name__ == "__main__":
    main()
