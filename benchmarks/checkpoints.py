"""The cost of checkpoints: ``python -m benchmarks.checkpoints [--out FILE]``.

TopK steps at cpu-small through the trainer's own training and run folder: turns of some
steps with a save at their begin, and its end awaited in them, against turns without one, in one
process, in turn. What a save adds to a turn is set against 200 and 1000 steps.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks.study import B, D, F, K, Records, fused, parser, report
from sae_kernels.bench.inputs import activations
from sae_kernels.bench.timing import interleaved
from sae_kernels.config import TrainConfig
from sae_kernels.config.output import OutputConfig
from sae_kernels.data import ShuffledBatches
from sae_kernels.nn import TopKConfig
from sae_kernels.runs.folder import RunFolder
from sae_kernels.training.trainable import ActivationTraining

TURNS = {"bfloat16": 60, "float32": 25}  # steps, in which a write comes to its end


def measure(folder: Path, rounds: int, compute: str) -> dict[str, object]:
    """A turn with and without a save, and what one save costs and holds."""
    x, W = activations("zipf", 8 * B, D, F, K)
    step = fused(TopKConfig(D, F, K), W, compute=compute, auxk_alpha=1 / 32)
    training = ActivationTraining(step, TrainConfig(steps=1 << 30, batch_size=B), None)
    batches = list(ShuffledBatches(x, B, epochs=1))
    turn = TURNS[compute]
    copies, awaited = list[float](), list[float]()

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
    each, cost = plain / turn, saved - plain
    return {
        "compute": compute,
        "step_ms": each,
        "save_adds_ms": cost,
        "copy_ms": 1e3 * sorted(copies)[len(copies) // 2],
        "awaited_ms": 1e3 * sorted(awaited)[len(awaited) // 2],
        "overhead_every_200": cost / (200 * each),
        "overhead_every_1000": cost / (1000 * each),
        "checkpoint_bytes": files,
        "extra_memory_bytes": extra,
        "turns_ms": {n: [t.p20_ms, t.median_ms, t.p80_ms] for n, t in timings.items()},
        "rounds": rounds,
    }


def main() -> None:
    """Measures, prints, and writes a line for each compute dtype."""
    made = parser(__doc__, rounds=9)
    made.add_argument("--data", type=Path, help="Where the checkpoints go; a real disk.")
    made.add_argument("--compute", nargs="+", choices=TURNS, default=list(TURNS))
    options = made.parse_args()

    def records() -> Records:
        for compute in options.compute:
            torch.manual_seed(0)
            with tempfile.TemporaryDirectory(dir=options.data) as folder:
                yield measure(Path(folder, "run"), options.rounds, compute)

    report("checkpoints", records(), options.out)


if __name__ == "__main__":
    main()
