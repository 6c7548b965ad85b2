"""Multi-dimensional features: clusters of latents whose points are one thing, not several.

Looks for them in a layer of a small model of Python's own text and says at which bytes each fires.
Run it: ``python examples/multidimensional_features.py``. The picture is
``examples-out/multidimensional_features.png``.
"""

from __future__ import annotations

from collections import Counter

import torch
from tiny_causal_model import documents, load, out, outputs, train_sae, windows

from sae_kernels.analyze import codes_of, find_clusters
from sae_kernels.analyze.latent_plots import cluster_panel
from sae_kernels.plotting.figure import Drawing, render

LAYER, SHOWN = "layers.1", 8


def main() -> None:
    model, texts = load(), documents()
    batch = windows(texts, 384)
    x = outputs(model, [LAYER], batch)[LAYER]
    sae = train_sae(x)
    codes = codes_of(sae.eval(), x)
    clusters = find_clusters(codes, sae.W_dec, threshold=0.3, together=0.1)
    clusters = [cluster for cluster in clusters if cluster.n_tokens >= 1000][:SHOWN]
    at = batch[:, 1:].flatten()
    names = []
    for cluster in clusters:
        fired = codes.columns(cluster.latents).any(1)
        most = Counter(at[fired].tolist()).most_common(6)
        shown = [repr(chr(byte))[1:-1].replace(" ", "␣") for byte, _ in most]
        names.append(" ".join(shown))
        print(
            f"{len(cluster.latents)} latents, {cluster.n_tokens:,} tokens, score "
            f"{cluster.score:.2f}: at {names[-1]}"
        )

    def draw(figure) -> None:
        panels = figure.subplots(2, SHOWN // 2).flat
        for axes, cluster, name in zip(panels, clusters, names, strict=False):
            cluster_panel(axes, cluster)
            axes.set_title(name, fontsize=8, parse_math=False)

    (picture,) = render([Drawing("clusters", draw)], "the picture", size=(8, 5))
    out("multidimensional_features.png").write_bytes(picture.png)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
