"""One SAE over several devices: torchrun starts the processes, each has a part of the latents.

``python examples/several_devices.py`` starts torchrun with this file on two processes of one thread
each, and on one, and compares the runs: with ``blocks`` both end with the same bits. On GPUs it is
``init_device_mesh("cuda", ...)`` and a process for each; that was not tried (docs/distributed.md).
The picture is ``examples-out/several_devices.png``.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from tiny_causal_model import documents, load, out, outputs, windows
from torch.distributed.device_mesh import init_device_mesh

import sae_kernels as sk
from sae_kernels.config import ParallelConfig
from sae_kernels.plotting.figure import Drawing, render
from sae_kernels.runs.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYER, N_LATENTS, STEPS = "layers.2", 1024, 300


def train_a_part() -> None:
    """Trains the SAE: every process makes this same call, and has its part of the latents."""
    mesh = init_device_mesh("cpu", (int(os.environ["WORLD_SIZE"]),))
    run = sk.train(
        sk.TopKConfig(128, N_LATENTS, k=16),
        out("several_devices-acts"),
        steps=STEPS,
        batch_size=1024,
        log_every=10,
        folder=out(f"several_devices-{mesh.size()}"),
        overwrite=True,
        mesh=mesh,
        parallel=ParallelConfig(blocks=2),
    )
    print(f"process {mesh.get_rank()} of {mesh.size()} had latents {run.sae.latents}", flush=True)
    dist.destroy_process_group()


def draw(saes: dict[int, sk.SparseAutoencoder], acts: sk.data.ShardDataset) -> Drawing:
    """Both runs' losses, and how often the latents of each of the two processes fire."""
    density = sk.evaluate(saes[2], acts).latent_density

    def draw_on(figure: Figure) -> None:
        figure.set_size_inches(10, 3.9)
        left, right = figure.subplots(1, 2)
        for n, name, width in ((1, "one process", 5.0), (2, "two processes", 1.5)):
            lines = read_metrics(out(f"several_devices-{n}") / "metrics.jsonl")
            steps, fvu = [line["step"] for line in lines], [line["fvu"] for line in lines]
            left.plot(steps, fvu, linewidth=width, label=name)
        left.set(xlabel="step", ylabel="fraction of variance unexplained", yscale="log")
        left.legend()
        for rank, part in enumerate(density.chunk(2)):
            latents = torch.arange(len(part)) + rank * len(part)
            right.scatter(latents, part, s=4, label=f"latents of process {rank}")
        right.set(xlabel="latent", ylabel="share of tokens on which it fires", yscale="log")
        right.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)

    return Drawing("several_devices", draw_on)


def main() -> None:
    """Stores activations, trains on one and on two processes, compares and draws."""
    folder = out("several_devices-acts")
    x = outputs(load(), [LAYER], windows(documents(), 384))[LAYER]
    with sk.data.ShardWriter(folder, x.shape[1], overwrite=True) as writer:
        writer.write(x)
    for n in (1, 2):
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        ranks = [*torchrun, "--nproc-per-node", str(n), __file__]
        subprocess.run(ranks, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    saes = {n: sk.load(out(f"several_devices-{n}") / "sae") for n in (1, 2)}
    weights = {n: sae.state_dict() for n, sae in saes.items()}
    if not all(torch.equal(tensor, weights[2][name]) for name, tensor in weights[1].items()):
        sys.exit("several_devices: expected the same bits on one process and on two")
    print("the same bits on one process and on two")
    (picture,) = render([draw(saes, sk.data.ShardDataset(folder))], "the picture")
    out("several_devices.png").write_bytes(picture.png)


if __name__ == "__main__":
    train_a_part() if "WORLD_SIZE" in os.environ else main()
