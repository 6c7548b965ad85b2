"""Description length of scikit-learn's 8x8 digits over an SAE's width and sparsity.

A sender describes digits by their codes and by what the codes leave over, both to the same
precision. More latents a digit cost bits for codes and save bits of the residual; a wide SAE names
a latent at a higher price, and its decoder has to be sent too, once for all digits. So the sum has
a least value: the width and sparsity that explain digits most briefly (after Ayonrinde, Pearce and
Sharkey, arXiv 2410.11179; ``sae_kernels.training.DescriptionLengthSums`` says how bits are
counted). Bits of codes and residual are those of digits that were not trained on.

Run it: ``python examples/mdl_digits.py``; it takes a minute on two cores and leaves
``examples-out/mdl-digits.png``, with the features of the shortest description.
"""

from __future__ import annotations

import itertools
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import sae_kernels as sk
from sae_kernels.plotting.figure import Drawing, render
from sae_kernels.training.description_length import PRECISION

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTHS, KEPT = (8, 16, 32, 64, 128, 256), (0.5, 1, 2, 4, 8)
SIDE, SHOWN = 8, 32  # pixels; features, those that fire most
BITS_A_WEIGHT = math.log2(1 + 1 / PRECISION) / 2  # to the precision of the pixels


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """Digits to train on and held-out ones, [n, 64] each, pixels from 0 to 1."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("mdl_digits: expected scikit-learn, got none; pip install 'sae-kernels[examples]'")
    pixels = torch.from_numpy(load_digits().data).float() / 16
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return pixels[order[:1400]], pixels[order[1400:]]


def trained(width: int, k: float, x: torch.Tensor) -> sk.BatchTopKSAE:
    """An SAE of this width with k latents a digit on average."""
    sae = sk.BatchTopKSAE(SIDE**2, width, k=k)
    settings = {"steps": 400, "batch_size": 256, "lr": 5e-3, "log_every": 400}
    sk.train(sae, x, dead_after_tokens=10_000, **settings)
    return sae


def draw(found: dict[tuple[int, float], float], best: torch.Tensor) -> Drawing:
    """The description lengths over width, a line for each k, and decoder rows of the shortest."""
    least = min(found, key=found.__getitem__)

    def draw_on(figure: Figure) -> None:
        figure.set_size_inches(10, 4.2)
        left, right = figure.subplots(1, 2)
        for k in KEPT:
            left.plot(WIDTHS, [found[width, k] for width in WIDTHS], marker="o", label=f"k = {k}")
        left.annotate("shortest", (least[0], found[least]), (0, -10), textcoords="offset points",
                      ha="center", va="top")  # fmt: skip
        left.set_xscale("log", base=2)
        left.set_xticks(WIDTHS, [str(width) for width in WIDTHS])
        left.set_xlabel("latents")
        left.set_ylabel("bits a digit")
        left.margins(y=0.15)
        left.legend(ncols=2)
        tiles = torch.nn.functional.pad(best.unflatten(1, (SIDE, SIDE)), (1, 1, 1, 1))
        rows = [torch.cat(list(row), 1) for row in tiles.split(8)]
        size = float(best.abs().max())
        right.imshow(torch.cat(rows), cmap="RdBu_r", vmin=-size, vmax=size)
        right.set_axis_off()
        right.set_title(f"features of {least[0]} latents, k = {least[1]}: red adds ink")

    return Drawing("mdl-digits", draw_on)


def main() -> None:
    """Trains an SAE for each width and k, finds the shortest description, draws it."""
    train, held_out = digits()
    n_digits = len(train) + len(held_out)
    found: dict[tuple[int, float], float] = {}
    saes: dict[tuple[int, float], sk.BatchTopKSAE] = {}
    for width, k in itertools.product(WIDTHS, KEPT):
        sae = saes[width, k] = trained(width, k, train)
        decoder = BITS_A_WEIGHT * sae.W_dec.numel() / n_digits
        found[width, k] = sk.evaluate(sae, held_out).bits_per_token + decoder
    print("latents" + "".join(f"{f'k = {k}':>9}" for k in KEPT))
    for width in WIDTHS:
        print(f"{width:7}" + "".join(f"{found[width, k]:9.1f}" for k in KEPT))
    least = min(found, key=found.__getitem__)
    best = sk.evaluate(saes[least], held_out)
    print(f"shortest: {least[0]} latents, k = {least[1]}: {found[least]:.1f} bits a digit, "
          f"{best.bits_without_sae:.1f} without an SAE")  # fmt: skip
    used = best.latent_density.argsort(descending=True)[:SHOWN]
    (picture,) = render([draw(found, saes[least].W_dec.detach()[used])], "the example")
    Path("examples-out").mkdir(exist_ok=True)
    Path("examples-out/mdl-digits.png").write_bytes(picture.png)


if __name__ == "__main__":
    main()
