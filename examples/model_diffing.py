"""Model diffing: what a model learned in fine-tuning, by a crosscoder of both.

A small model of Python's text is trained some more on the same text in capitals. A crosscoder reads
a layer of both; its latents are shared, or one model's own. Leaves model_diffing.png beside this
file. Run it: ``python examples/model_diffing.py``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from tiny_causal_model import documents, load, outputs, train_sae, windows

from sae_kernels.analyze import analyze
from sae_kernels.analyze.latent_plots import difference_row
from sae_kernels.plotting.figure import Drawing, render

LAYER = "layers.2"


def fine_tuned(texts: list[bytes], steps: int = 60):
    """The model after some steps on these texts."""
    model = load().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(steps):
        batch = windows(texts, 16, seed=step)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def main() -> None:
    texts = documents()
    capitals = [text.upper() for text in texts]
    base, chat = load(), fine_tuned(capitals)
    batch = torch.cat([windows(texts, 192), windows(capitals, 192)])
    x = torch.cat([outputs(model, [LAYER], batch)[LAYER] for model in (base, chat)], 1)
    # Decoder norms are free, or there would be nothing to compare.
    crosscoder = train_sae(x, 768, n_layers=2, unit_norm_decoder=False)
    found = analyze(crosscoder, x, name="before and after training on capitals")
    whose = found.difference
    assert whose is not None
    print({name: n for name, n in whose.values().items() if isinstance(n, int)})
    codes = crosscoder.encode(x)
    at = batch[:, 1:].flatten()
    for name, mask in (("after alone", whose.chat_only), ("before alone", whose.base_only)):
        latents = mask.nonzero()[:, 0]
        if len(latents):
            fired = at[codes.columns(latents).any(1)]
            upper = ((fired >= ord("A")) & (fired <= ord("Z"))).double().mean()
            print(f"latents of the model {name} fire at a capital in {upper:.0%} of their tokens")
    draw = partial(difference_row, analyses=[found])
    (picture,) = render([Drawing("difference", draw)], "the picture")
    Path(__file__).with_suffix(".png").write_bytes(picture.png)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
