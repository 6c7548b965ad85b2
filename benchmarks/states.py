"""What smaller optimizer states cost in quality: ``python -m benchmarks.states ACTS --out FILE``.

ACTS holds two folders of activations, ``train`` and ``held_out``, as `sae-kernels demo` leaves
them. The same SAE is trained with each layout of masters and moments; nothing is timed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from sae_kernels.bench.provenance import provenance
from sae_kernels.config import OptimizerConfig, TrainConfig
from sae_kernels.data import ShardDataset
from sae_kernels.nn import TopKConfig
from sae_kernels.training import evaluate, train

LAYOUTS: dict[str, dict[str, str]] = {
    "fp32 masters, fp32 moments": {},
    "split masters, fp32 moments": {"master_weights": "split"},
    "fp32 masters, bf16 moments": {"moment_dtype": "bfloat16"},
    "split masters, bf16 moments": {"master_weights": "split", "moment_dtype": "bfloat16"},
}


def main() -> None:
    """Trains, evaluates on held-out activations, writes a line per layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("acts", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    data, held_out = (ShardDataset(options.acts / side) for side in ("train", "held_out"))
    shape = TopKConfig(d_in=data.d_in, n_latents=8 * data.d_in, k=32)
    facts = provenance("python -m benchmarks.states")
    lines: list[dict[str, object]] = [{"provenance": facts, "sae": shape.to_dict()}]
    for name, layout in LAYOUTS.items():
        fvu = []
        for seed in range(options.seeds):
            optimizer = OptimizerConfig(compute="bfloat16", **layout)  # type: ignore[arg-type]
            config = TrainConfig(steps=options.steps, device="cpu", seed=seed, optimizer=optimizer)
            fvu.append(evaluate(train(shape, data, config).sae, held_out).fvu)
        lines.append({"layout": name, "fvu": fvu, "mean_fvu": statistics.mean(fvu)})
        print(f"{name:30} {statistics.mean(fvu):.5f}  {min(fvu):.5f} to {max(fvu):.5f}")
    options.out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
