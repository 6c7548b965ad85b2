"""An architecture of your own: AbsTopK, which keeps the k latents of largest magnitude.

The package does not have it. Registered by one line it has both training steps, files, the command
line and evaluation. Run it; the picture is ``examples-out/custom-architecture.png``.

A package of yours registers it for everybody who installs it, with an entry point::

    [project.entry-points."sae_kernels.architectures"]
    abstopk = "your_package.abstopk:AbsTopKSAE"
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import ClassVar

import torch

import sae_kernels as sk
from sae_kernels.config.base import POSITIVE_INTEGER, setting
from sae_kernels.nn import Preset, SAEConfig, register


@dataclasses.dataclass(frozen=True)
class AbsTopKConfig(SAEConfig):
    """The k latents of largest magnitude, whose codes may be negative."""

    architecture: ClassVar[str] = "abstopk"

    k: int = setting(32, "latents kept per token, K", POSITIVE_INTEGER)


@register
class AbsTopKSAE(sk.SparseAutoencoder):
    """``x_hat = b_dec + W_dec^T abstopk(W_enc (x - b_dec) + b_enc)``."""

    config: AbsTopKConfig
    config_class = AbsTopKConfig
    presets: ClassVar[dict[str, Preset]] = {
        "abstopk": Preset("the k latents of largest magnitude, of either sign"),
    }

    def select(
        self,
        x_centred: torch.Tensor,
        *,
        W_enc: torch.Tensor | None = None,
        k: float | None = None,
    ) -> sk.SparseCodes:
        """The k largest and the k smallest pre-activations, and of those the k farthest from 0."""
        W_enc = self.W_enc if W_enc is None else W_enc
        k = int(self.config.k if k is None else k)
        values, indices, keys = [], [], []
        for sign in (1, -1):  # h of the negated input is -h
            found = sk.encode_topk(
                sign * x_centred,
                W_enc,
                sign * self.b_enc,
                k,
                relu=False,
                compute_dtype=self.compute_dtype,
                backend=self.backend,
            )
            values.append(sign * found.values)
            indices.append(found.indices)
            # Among few latents one may be found from both sides: it counts on its own.
            mine = found.values >= 0 if sign == 1 else found.values > 0
            keys.append(torch.where(mine, found.values.detach(), -1))
        order = torch.cat(keys, -1).sort(dim=-1, descending=True, stable=True).indices[..., :k]
        return sk.SparseCodes(
            torch.cat(values, -1).gather(-1, order),
            torch.cat(indices, -1).gather(-1, order),
            self.config.n_latents,
        )

    def activate(self, preacts: sk.SparseCodes) -> sk.SparseCodes:
        """The pre-activations themselves."""
        return preacts

    @property
    def drops_zeros(self) -> bool:
        """A kept 0 is a code like any other."""
        return False


def activations(n: int, d_in: int = 32) -> torch.Tensor:
    """A few of many directions, of either sign, and noise: [n, d_in]."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, d_in, generator=g))
    strength = torch.randn(n, 96, generator=g) * (torch.rand(n, 96, generator=g) < 0.04)
    return strength @ directions + 0.02 * torch.randn(n, d_in, generator=g)


def main() -> None:
    """Trains it on both routes, saves and loads it, evaluates it, and trains it from the shell."""
    import matplotlib.pyplot as plt

    from sae_kernels.cli import main as command

    x = activations(8192)
    for route in ("fused", "autograd"):
        sae = AbsTopKSAE(32, 256, k=4)
        result = sk.train(sae, x, steps=300, batch_size=512, lr=3e-3, route=route)
        print(f"{route}: FVU {result.metrics[-1]['fvu']:.3f}")
        plt.plot([line["fvu"] for line in result.metrics], label=route)
    Path("examples-out").mkdir(exist_ok=True)
    plt.legend(title="FVU").figure.savefig("examples-out/custom-architecture.png")
    with tempfile.TemporaryDirectory() as folder:
        sae.save_pretrained(Path(folder, "sae"))
        loaded = sk.load(Path(folder, "sae"))
        print(f"loaded {type(loaded).__name__}: FVU {sk.evaluate(loaded, x).fvu:.3f}")
        with sk.data.ShardWriter(Path(folder, "acts"), d_in=32) as writer:
            writer.write(x)
        command(f"train {folder}/acts --arch abstopk --k 4 --steps 50 --out {folder}/run".split())


if __name__ == "__main__":
    main()
