"""Peers' trainers on quality.py's tokens: ``python -m benchmarks.quality_peers ACTS --out FILE``.

SAELens and dictionary_learning train in their own environments (``sae-kernels bench
--setup-peers``), on the same scaled tokens, with our learning rate and schedule and L0 aimed at the
same number; their files are read and evaluated here, on the held-out documents. Nothing is timed.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from benchmarks.quality import TOKENS, of_layer
from benchmarks.study import parser, report
from sae_kernels.bench.environments import python_of
from sae_kernels.config import TrainConfig
from sae_kernels.data.rows import estimate_scale
from sae_kernels.formats.load import load
from sae_kernels.training import evaluate

if TYPE_CHECKING:
    from collections.abc import Iterator

PEERS, ARCHITECTURES = ("sae_lens", "dictionary_learning"), ("jumprelu", "batchtopk")
N_LATENTS, L0, BATCH = 3072, 32, 1024


def scaled(acts: Path) -> dict[str, torch.Tensor]:
    """Both sides' rows of layer 4, in the scale in which we train."""
    sides = {side: of_layer(acts, side, 4) for side in TOKENS}
    rows = {side: each.rows(0, each.n_tokens).activations.float() for side, each in sides.items()}
    scale = estimate_scale(rows["train"], len(rows["train"]))
    return {side: part * scale for side, part in rows.items()}


def runs(acts: Path, options: Any) -> Iterator[dict[str, Any]]:
    """Trains and evaluates each peer's architectures."""
    rows = scaled(acts)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        save_file({"rows": rows["train"]}, folder / "rows.safetensors")
        for seed, peer, arch in itertools.product(options.seeds, options.peers, options.only):
            out = folder / f"{peer}-{arch}-{seed}"
            task = {
                "peer": peer,
                "arch": arch,
                "seed": seed,
                "steps": options.steps,
                "target_l0": L0,
                "d_in": rows["train"].shape[1],
                "n_latents": N_LATENTS,
                "batch_size": BATCH,
                "lr": TrainConfig(steps=options.steps).learning_rate(options.steps // 2, N_LATENTS),
                "threads": torch.get_num_threads(),
            }
            (folder / "task.json").write_text(json.dumps(task))
            script = Path(__file__).with_name("peer_training.py")
            command = [python_of(peer), script, folder / "task.json", folder / "rows.safetensors"]
            subprocess.run([*map(str, command), str(out)], check=True)
            sae = load(out / "trainer_0" if peer == "dictionary_learning" else out)
            yield {**task, **evaluate(sae, rows["held_out"]).scalars()}


def main() -> None:
    """Trains, evaluates, writes a line per peer, architecture and seed."""
    made = parser(__doc__, steps=800)
    made.add_argument("acts", type=Path)
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS))
    made.add_argument("--only", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    options = made.parse_args()
    report("quality_peers", runs(options.acts, options), options.out)


if __name__ == "__main__":
    main()
