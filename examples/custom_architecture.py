"""An architecture of your own: at most k latents, each at least a share of the token's largest.

The package does not have it. Registered by one line it has both training steps, files, the command
line and evaluation. Run it; the picture is ``examples-out/custom-architecture.png``.

A package of yours registers it for everybody who installs it, with an entry point::

    [project.entry-points."sae_kernels.architectures"]
    relative_topk = "your_package.relative_topk:RelativeTopKSAE"
"""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import ClassVar

import torch

import sae_kernels as sk
from sae_kernels.config.base import FRACTION, POSITIVE_INTEGER, setting
from sae_kernels.nn import Preset, SAEConfig, register


@dataclasses.dataclass(frozen=True)
class RelativeTopKConfig(SAEConfig):
    """At most k latents per token, without those that are small beside its largest."""

    architecture: ClassVar[str] = "relative_topk"

    k: int = setting(32, "latents kept per token at most, K", POSITIVE_INTEGER)
    share: float = setting(0.2, "least code of a token, over its largest", FRACTION)


@register
class RelativeTopKSAE(sk.SparseAutoencoder):
    """``x_hat = b_dec + W_dec^T f``, f the k largest h without those below share times the first.

    A token of one strong feature then has few codes, one of many has k.
    """

    config: RelativeTopKConfig
    config_class = RelativeTopKConfig
    presets: ClassVar[dict[str, Preset]] = {
        "relative_topk": Preset("the k largest latents that are not small beside the first"),
    }

    def select(
        self,
        x_centred: torch.Tensor,
        *,
        W_enc: torch.Tensor | None = None,
        k: float | None = None,
    ) -> sk.SparseCodes:
        """The k largest pre-activations, by the kernel that never stores the others."""
        return sk.encode_topk(
            x_centred,
            self.W_enc if W_enc is None else W_enc,
            self.b_enc,
            int(self.config.k if k is None else k),
            relu=False,
            compute_dtype=self.compute_dtype,
            backend=self.backend,
        )

    def activate(self, preacts: sk.SparseCodes) -> sk.SparseCodes:
        """ReLU, and 0 where a value is below its share; entries of 0 get no gradient."""
        h = preacts.values  # [..., k], largest first
        least = self.config.share * h[..., :1].detach()
        return preacts.with_values(torch.where(h >= least, h.relu(), 0))


def activations(n: int, d_in: int = 32) -> torch.Tensor:
    """A few of many directions and noise: [n, d_in]."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(96, d_in, generator=g))
    strength = torch.rand(n, 96, generator=g) * (torch.rand(n, 96, generator=g) < 0.04)
    return strength @ directions + 0.02 * torch.randn(n, d_in, generator=g)


def main() -> None:
    """Trains it on both routes, saves and loads it, evaluates it, and trains it from the shell."""
    import matplotlib.pyplot as plt

    from sae_kernels.cli import main as command

    x = activations(8192)
    for route in ("fused", "autograd"):
        sae = RelativeTopKSAE(32, 256, k=8)
        result = sk.train(sae, x, steps=300, batch_size=512, lr=3e-3, route=route)
        last = result.metrics[-1]
        print(f"{route}: FVU {last['fvu']:.3f} with {last['l0']:.1f} latents per token")
        plt.plot([line["fvu"] for line in result.metrics], label=route)
    Path("examples-out").mkdir(exist_ok=True)
    plt.legend(title="FVU").figure.savefig("examples-out/custom-architecture.png")
    with tempfile.TemporaryDirectory() as folder:
        sae.save_pretrained(Path(folder, "sae"))
        loaded = sk.load(Path(folder, "sae"))
        print(f"loaded {type(loaded).__name__}: FVU {sk.evaluate(loaded, x).fvu:.3f}")
        with sk.data.ShardWriter(Path(folder, "acts"), d_in=32) as writer:
            writer.write(x)
        run = "--arch relative_topk --k 8 --steps 50 --batch-size 512"
        command(f"train {folder}/acts {run} --out {folder}/run".split())


if __name__ == "__main__":
    main()
