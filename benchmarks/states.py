"""Quality with smaller optimizer states: ``python -m benchmarks.states ACTS --out FILE``.

ACTS holds two folders of activations, ``train`` and ``held_out``, as `sae-kernels demo` leaves
them. The same SAE is trained with each layout of masters and moments; nothing is timed.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.study import Records, parser, report
from sae_kernels.data import ShardDataset
from sae_kernels.nn import TopKConfig
from sae_kernels.training import evaluate, train

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYOUTS: dict[str, dict[str, str]] = {
    "fp32 masters, fp32 moments": {},
    "split masters, fp32 moments": {"master_weights": "split"},
    "fp32 masters, bf16 moments": {"moment_dtype": "bfloat16"},
    "split masters, bf16 moments": {"master_weights": "split", "moment_dtype": "bfloat16"},
}


def main() -> None:
    """Trains, evaluates on held-out activations, writes a line per layout."""
    made = parser(__doc__, steps=600, seeds=3)
    made.add_argument("acts", type=Path)
    options = made.parse_args()
    data, held_out = (ShardDataset(options.acts / side) for side in ("train", "held_out"))
    shape = TopKConfig(d_in=data.d_in, n_latents=8 * data.d_in, k=32)

    def fvu(layout: dict[str, Any]) -> Iterator[float]:
        for seed in range(options.seeds):
            settings = {"steps": options.steps, "seed": seed, "device": "cpu", **layout}
            trained = train(shape, data, compute="bfloat16", **settings)
            yield evaluate(trained.sae, held_out).fvu

    def records() -> Records:
        for name, layout in LAYOUTS.items():
            found = list(fvu(layout))
            yield {"layout": name, "fvu": found, "mean_fvu": statistics.mean(found)}

    report("states", records(), options.out, sae=shape.to_dict())


if __name__ == "__main__":
    main()
