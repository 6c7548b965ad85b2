"""Go on from an SAE that somebody published, on activations of yours, and hand it on.

``python examples/go_on_from_a_public_sae.py [SAE ACTS]``: a folder or hub name in any format that
``sk.load`` reads (SAELens, sparsify, dictionary_learning, Gemma Scope, ours), and a folder of
stored activations. Without them it makes both: an SAE in SAELens' format, trained on one mixture of
directions, and activations of another. The picture is ``examples-out/go-on.png``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import sae_kernels as sk
from sae_kernels.formats import Weights, write

OUT = Path("examples-out")


def activations(n: int, first: int, d_in: int = 64) -> torch.Tensor:
    """Sparse sums of 128 directions of 192 and noise, [n, d_in]: which ones depends on `first`."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(192, d_in, generator=g))
    some = directions[first : first + 128]
    strength = torch.rand(n, 128, generator=g) * (torch.rand(n, 128, generator=g) < 0.04)
    return strength @ some + 0.02 * torch.randn(n, d_in, generator=g)


def published(folder: Path) -> str:
    """Somebody's SAE in SAELens' format, trained on the first directions."""
    sae = sk.TopKSAE(64, 512, k=6)
    sk.train(sae, activations(16384, first=0), steps=300, batch_size=512, lr=3e-3)
    tensors = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    origin = {"activations": {"model": "a-model", "hook_name": "blocks.3.hook_resid_post"}}
    write(folder, Weights(sae.config, tensors, origin), "saelens")
    return str(folder)


def main(name: str = "", acts_folder: str = "") -> None:
    """Loads, measures, goes on, compares with a fresh start, writes."""
    with tempfile.TemporaryDirectory() as folder:
        sae = sk.load(name or published(Path(folder, "public")))
    assert isinstance(sae, sk.TopKSAE)
    if acts_folder:
        rows = sk.data.ShardDataset(acts_folder)
        x = rows.rows(0, min(rows.n_tokens, 65536)).activations.float()
    else:
        x = activations(20480, first=64)
    train, held_out = x[:-4096], x[-4096:]
    print(f"{type(sae).__name__} of {sae.metadata['activations']}")
    print(f"as published: FVU {sk.evaluate(sae, held_out).fvu:.3f} on these activations")

    fresh = sk.TopKSAE(sae.config.d_in, sae.config.n_latents, k=sae.config.k)
    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, start in (("published", sae), ("fresh", fresh)):
        run = sk.train(start, train, steps=300, batch_size=512, lr=1e-3, log_every=10)
        found = sk.evaluate(start, held_out)
        print(f"from {label} weights: FVU {found.fvu:.3f} after 300 steps")
        curve = [(line["step"], line["fvu"]) for line in run.metrics]
        axes.plot(*zip(*curve, strict=True), label=f"from {label} weights")
    axes.set(xlabel="step", ylabel="FVU of the batch", yscale="log", title="Going on from an SAE")
    axes.legend(frameon=False)
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "go-on.png", dpi=150)

    tensors = {name: tensor.detach() for name, tensor in sae.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder, "mine"), Weights(sae.config, tensors, sae.metadata), "saelens")
        print("written for SAELens:", sorted(path.name for path in Path(folder, "mine").iterdir()))


if __name__ == "__main__":
    main(*sys.argv[1:])
