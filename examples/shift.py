"""SHIFT: a classifier trained on confounded documents, mended by looking at its latents.

Documents are windows of Python's own text. The task is whether a window is code or prose; but where
the probe is trained, all code has capitals and no prose has any. Latents that the probe relies on
are ranked, and those that fire on capitals are ablated. Run it: ``python examples/shift.py``. The
picture is ``examples-out/shift.png``.
"""

from __future__ import annotations

from pydoc_data import topics

import torch
from tiny_causal_model import documents, load, out, outputs, train_sae, windows
from torch import Tensor

from sae_kernels.harvest.tokens import TokenBatch
from sae_kernels.interventions import fit_probe, mean_documents, separation
from sae_kernels.plotting.charts import bars
from sae_kernels.plotting.figure import Drawing, render
from sae_kernels.plotting.style import BLUE, MUTED, ORANGE

LAYER, WIDTH, EACH, SHOWN = "layers.1", 48, 300, 200


def capitals(batch: Tensor) -> Tensor:
    """Whether each byte is a capital letter."""
    return (batch >= ord("A")) & (batch <= ord("Z"))


def drawn(texts: list[bytes], has_capitals: bool, seed: int) -> Tensor:
    """Windows [EACH, WIDTH] of texts, with two capitals or more, or without any."""
    batch = windows(texts, 4000, seed)[:, :WIDTH]
    n = capitals(batch).sum(1)
    return batch[n >= 2 if has_capitals else n == 0][:EACH]


def on_capitals(sae, x: Tensor, batch: Tensor, latents: Tensor) -> Tensor:
    """The part of each latent's activity that is at a capital or at the byte after one, [n]."""
    there = capitals(batch)
    near = (there[:, 1:] | there[:, :-1]).flatten()
    values = sae.encode(x).columns(latents)
    return values[near].sum(0) / values.sum(0).clamp(min=1e-9)


def main() -> None:
    model, texts = load(), documents()
    prose, code = texts[: len(topics.topics)], texts[len(topics.topics) :]
    batch = windows(texts, 384)
    x = outputs(model, [LAYER], batch)[LAYER]
    sae = train_sae(x)

    def means(kinds: list[tuple[list[bytes], bool]], seed: int):
        parts = [drawn(text, has, seed + i) for i, (text, has) in enumerate(kinds)]
        batches = [TokenBatch.of(part).keeping_first() for part in parts]
        return mean_documents(model, LAYER, sae, batches)

    train, labels = means([(code, True), (prose, False)], 10), torch.arange(2 * EACH) < EACH
    kinds = [(text, has) for text in (code, prose) for has in (True, False)]
    test, fair = means(kinds, 20), means(kinds, 30)  # here code and capitals are independent
    is_code = torch.arange(4 * EACH) < 2 * EACH
    has_capitals = torch.tensor([has for _, has in kinds]).repeat_interleave(EACH)

    probe = fit_probe(train.x, labels, l2=1e-2)
    latents, _ = separation(probe, sae, train, labels)
    latents = latents[:SHOWN]
    # The rule; one may as well look at what they fire on and choose by hand.
    unwanted = latents[on_capitals(sae, x, batch, latents) > 0.3]
    mended = test.without(sae, unwanted)
    again = fit_probe(train.without(sae, unwanted), labels, l2=1e-2)
    rows = {
        "the probe": (probe, test.x),
        f"{len(unwanted)} latents ablated": (probe, mended),
        "and the probe trained again": (again, mended),
        "a probe trained without the confounder": (fit_probe(fair.x, is_code, l2=1e-2), test.x),
    }
    found = {
        name: [100 * which.accuracy(activations, y) for y in (is_code, has_capitals)]
        for name, (which, activations) in rows.items()
    }
    for name, (task, confounder) in found.items():
        print(f"{name}: right about code {task:.1f} %, about capitals {confounder:.1f} %")

    def draw(figure) -> None:
        scores = [score for pair in found.values() for score in pair]
        spreads = [(score, score, score) for score in scores]
        names = [label for name in found for label in (name, "")]
        what = ["code", "capitals"] * len(found)
        written = [f"{score:.0f} % {kind}" for score, kind in zip(scores, what, strict=True)]
        axes = bars(figure, names, spreads, written, [BLUE, ORANGE] * len(found), bold=4)
        axes.axvline(50, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlabel("accuracy in %, where code and capitals are independent (dashed: chance)")

    (picture,) = render([Drawing("shift", draw)], "the picture", size=(7.5, 3.6))
    out("shift.png").write_bytes(picture.png)


if __name__ == "__main__":
    main()
