"""select_threshold: the encoder product and every score above its latent's bound, as ragged codes.

``h = x W^T + b`` in the accumulator dtype; token by token every latent whose h is not ``<=`` its
bound, in latent order, so NaN is kept. The entries of token t are
``values[offsets[t]:offsets[t + 1]]``. How many there are is known when they are all found: no
capacity, nothing is ever left out. ReLU (bound 0), JumpReLU (a threshold per latent, lowered by
half the bandwidth where the straight-through estimator asks for the entries just below it) and
BatchTopK (one bound for all) are this with other bounds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sae_kernels.primitives import checks
from sae_kernels.primitives.operator import Operator, fake_ragged

if TYPE_CHECKING:
    import torch


def _check(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None, bounds: torch.Tensor) -> None:
    checks.encoder(x, W, b, bounds=bounds)


select_threshold = Operator(
    "select_threshold(Tensor x, Tensor W, Tensor? b, Tensor bounds, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _check,
    lambda x, *_: fake_ragged(x),
)
