"""Model diffing: what one model has and another lacks, by a crosscoder of both.

The second model is a small one of Python's text with something planted into it: in every fourth
window it is in a state, a direction, of which the first model has nothing. A crosscoder reads a
layer of both; a few of its latents are the second model's alone, and they fire where it was
planted. Run it: ``python examples/model_diffing.py``. The picture is
``examples-out/model_diffing.png``.
"""

from __future__ import annotations

from functools import partial

import torch
from tiny_causal_model import documents, load, out, outputs, train_sae, windows

import sae_kernels as sk
from sae_kernels.analyze import analyze
from sae_kernels.analyze.latent_plots import difference_row
from sae_kernels.interventions import steer
from sae_kernels.plotting.figure import Drawing, render

PLANTED, LAYER = "layers.1", "layers.2"
ROWS = range(0, 384, 4)


def main() -> None:
    model, batch = load(), windows(documents(), 384)
    base = outputs(model, [PLANTED, LAYER], batch)
    v = torch.nn.functional.normalize(torch.randn(base[LAYER].shape[1]), dim=0)
    planted = steer(v, 0.7 * float(base[PLANTED].norm(dim=1).mean()), rows=ROWS)
    with sk.intervene(model, {PLANTED: None}, [planted]):
        second = outputs(model, [LAYER], batch)[LAYER]
    x = torch.cat([base[LAYER], second], 1)
    # Decoder norms are free, or there would be nothing to compare.
    crosscoder = train_sae(x, 512, n_layers=2, unit_norm_decoder=False, lr=5e-3)
    found = analyze(crosscoder, x, name="a direction of its own")
    whose = found.difference
    assert whose is not None
    print({name: n for name, n in whose.values().items() if isinstance(n, int)})
    codes, there = crosscoder.encode(x), torch.zeros(len(batch), dtype=torch.bool)
    there[list(ROWS)] = True
    there = there.repeat_interleave(batch.shape[1] - 1)
    for latent in whose.chat_only.nonzero()[:, 0].tolist():
        fired = codes.columns([latent])[:, 0] != 0
        share = float(there[fired].double().mean())
        print(f"latent {latent} of the second alone: {share:.0%} of its tokens are where it is")
    draw = partial(difference_row, analyses=[found])
    (picture,) = render([Drawing("difference", draw)], "the picture")
    out("model_diffing.png").write_bytes(picture.png)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
