"""What checkpoints cost: ``python -m benchmarks.checkpoints [--out FILE]``.

TopK steps at cpu-small through the trainer's own training and run folder: turns of some
steps with a save at their begin, and its end awaited in them, against turns without one, in one
process, in turn. What a save adds to a turn is set against 200 and 1000 steps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.cpu_bars import B, D, F, K
from sae_kernels.bench.inputs import activations
from sae_kernels.bench.provenance import provenance
from sae_kernels.bench.timing import interleaved
from sae_kernels.config import OptimizerConfig, TrainConfig
from sae_kernels.config.output import OutputConfig
from sae_kernels.data import ShuffledBatches
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.runs.folder import RunFolder
from sae_kernels.training.start import make_step
from sae_kernels.training.trainable import ActivationTraining

TURNS = {"bfloat16": 60, "float32": 25}  # steps, in which a write comes to its end


def measure(folder: Path, rounds: int, compute: str) -> dict[str, object]:
    """A turn with and without a save, and what one save costs and holds."""
    x, W = activations("zipf", 8 * B, D, F, K)
    sae = TopKSAE(TopKConfig(D, F, K))
    sae.W_enc.data.copy_(W)
    sae.W_dec.data.copy_(W)
    optimizer = OptimizerConfig(compute=compute)  # type: ignore[arg-type]
    config = TrainConfig(
        steps=1 << 30, batch_size=B, objective=sae.objective_class(), optimizer=optimizer
    )
    training = ActivationTraining(make_step(sae, config), config, None)
    batches = list(ShuffledBatches(x, B, epochs=1))
    turn = TURNS[compute]
    copies: list[float] = []
    awaited: list[float] = []

    with RunFolder(folder, {}, OutputConfig(keep_checkpoints=2)) as run:

        def steps() -> None:
            for i in range(turn):
                training.step(batches[i % len(batches)])

        def saving() -> None:
            start = time.perf_counter()
            run.save(training.made, training.contents())
            copies.append(time.perf_counter() - start)
            steps()
            start = time.perf_counter()
            run.wait()
            awaited.append(time.perf_counter() - start)

        timings = interleaved({"steps": steps, "with a save": saving}, rounds)
        files = sum(p.stat().st_size for p in folder.glob("checkpoints/*/*")) / 2
        extra = run.staged_bytes
    plain, saved = (timings[name].median_ms for name in ("steps", "with a save"))
    step = plain / turn
    cost = saved - plain
    spread = {name: [t.p20_ms, t.median_ms, t.p80_ms] for name, t in timings.items()}
    return {
        "compute": compute,
        "step_ms": step,
        "save_adds_ms": cost,
        "copy_ms": 1e3 * sorted(copies)[len(copies) // 2],
        "awaited_ms": 1e3 * sorted(awaited)[len(awaited) // 2],
        "overhead_every_200": cost / (200 * step),
        "overhead_every_1000": cost / (1000 * step),
        "checkpoint_bytes": files,
        "extra_memory_bytes": extra,
        "turns_ms": spread,
        "rounds": rounds,
    }


def main() -> None:
    """Measures, prints, and writes a line with its provenance."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--data", type=Path, help="Where the checkpoints go; a real disk.")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--compute", nargs="+", choices=TURNS, default=list(TURNS))
    options = parser.parse_args()
    lines: list[dict[str, object]] = [
        {"provenance": provenance("python -m benchmarks.checkpoints")}
    ]
    for compute in options.compute:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory(dir=options.data) as folder:
            lines.append(measure(Path(folder, "run"), options.rounds, compute))
        print(json.dumps(lines[-1], indent=1))
    if options.out:
        options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
