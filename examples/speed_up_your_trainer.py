"""One line under the trainer that you have: SAELens, dictionary_learning and sparsify.

Each trains as it is installed and then within ``sk.accelerate``, on the same batches. A library
that is not installed is skipped, and said. The picture is ``examples-out/speed-up.png``.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import sae_kernels as sk

if TYPE_CHECKING:
    from collections.abc import Callable

OUT = Path("examples-out")
B, D, F, K, STEPS = 1024, 256, 8192, 32, 4

Batches = list[torch.Tensor]


def sae_lens(batches: Batches) -> Any:
    """A TopK SAE by SAETrainer.fit; the trained module."""
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D, d_sae=F, k=K))
    config = SAETrainerConfig(
        total_training_samples=B * len(batches),
        train_batch_size_samples=B,
        lr_end=3e-5,
        device="cpu",
    )
    return SAETrainer(config, sae, iter([*batches, *batches])).fit()


def dictionary_learning(batches: Batches) -> Any:
    """A TopK SAE by trainSAE; nothing, as it is not saved here."""
    from dictionary_learning.trainers import TopKTrainer
    from dictionary_learning.training import trainSAE

    config = {"trainer": TopKTrainer, "activation_dim": D, "dict_size": F, "k": K}
    config |= {"layer": 0, "lm_name": "none", "device": "cpu", "steps": 100_000}
    trainSAE(iter(batches), [config], steps=len(batches), device="cpu")


def sparsify(batches: Batches) -> Any:
    """sparsify's SparseCoder in a loop of one's own; the trained module."""
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # its Triton kernels need a GPU
    from sparsify import SparseCoder, SparseCoderConfig

    sae = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K))
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-4)
    for x in batches:
        sae(x).fvu.backward()
        optimizer.step()
        optimizer.zero_grad()
    return sae


def seconds(train: Callable[[Batches], Any], batches: Batches) -> float:
    """Seconds a training step takes; the first one, which sets things up, is not counted."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        torch.manual_seed(0)
        train(batches[:1])
        began = time.perf_counter()
        train(batches)
    return (time.perf_counter() - began) / len(batches)


def main() -> None:
    """Runs each library that is here both ways and draws the seconds."""
    g = torch.Generator().manual_seed(0)
    batches = [torch.randn(B, D, generator=g) for _ in range(STEPS)]
    found: dict[str, tuple[float, float]] = {}
    for train in (sae_lens, dictionary_learning, sparsify):
        library = train.__name__
        if importlib.util.find_spec(library) is None:
            print(f"{library}: skipped, it is not installed here")
            continue
        shipped = seconds(train, batches)
        with sk.accelerate(library) as run:  # the one line
            ours = seconds(train, batches)
        print(f"{library}: {1e3 * shipped:.0f} ms a step, accelerated {1e3 * ours:.0f} ms")
        print(run.report())
        found[library] = (shipped, ours)
    if not found or importlib.util.find_spec("matplotlib") is None:
        return print(
            "no picture:", "matplotlib is missing" if found else "there is nothing to draw"
        )
    draw(found)


def draw(found: dict[str, tuple[float, float]]) -> None:
    """Bars of milliseconds, as shipped and accelerated."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    for i, (library, both) in enumerate(found.items()):
        bars = axes.barh([i + 0.2, i - 0.2], [1e3 * s for s in both], 0.38)
        for bar, colour in zip(bars, ("#a3abb5", "#0072b2"), strict=True):
            bar.set_color(colour)
        axes.bar_label(bars, [f"{library} as shipped", "accelerated"], padding=4)
    axes.set(yticks=[], xlabel=f"ms a step: {B} tokens of {D}, {F} latents, K {K}")
    axes.set_title("One line")
    axes.margins(x=0.5)
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "speed-up.png", dpi=150)


if __name__ == "__main__":
    main()
