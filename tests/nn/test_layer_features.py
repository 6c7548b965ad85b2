"""Active features of cross-layer architectures: their rows, vectors and outputs, layer by layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.nn.test_cross_layer import D_OUT, EACH, KINDS, D, L, _clt, causalities, kinds

N = 9  # positions
SCALES = {"activation_scale": 0.7, "target_scale": 1.9}


def _made(kind: str, causality: str) -> tuple[Any, Tensor]:
    clt = _clt(kind, causality, **SCALES).eval()
    if hasattr(clt, "threshold") and clt.threshold is not None:
        clt.threshold.data.fill_(0.4)
    return clt, torch.randn(L, N, D, generator=torch.Generator().manual_seed(2))


def _flat(layers: Tensor) -> Tensor:
    return layers.transpose(0, 1).flatten(1)


@kinds
@causalities
def test_features_are_the_codes(kind: str, causality: str) -> None:
    clt, x = _made(kind, causality)
    features, encoders = clt.encode_sparse(x, slice(2, 4))
    dense = torch.zeros(N, L * EACH)
    codes = clt.encode(_flat(x)).to_dense()
    dense[:, : codes.shape[1]] = codes
    dense[2:4] = 0
    assert torch.equal(_flat(features.to_dense()), dense)
    assert features.coalesce().values().count_nonzero() == features._nnz() > N
    # The pre-activation of every feature, by its own encoder row and layer.
    layers, positions, numbers = features.indices()
    own = (encoders * x[layers, positions]).sum(1) + clt.b_enc[layers * EACH + numbers]
    preacts = clt.preactivations(_flat(x), range(clt.config.n_latents))
    torch.testing.assert_close(own, preacts[positions, layers * EACH + numbers])


@kinds
@causalities
def test_decoder_vectors_add_up_to_the_outputs(kind: str, causality: str) -> None:
    clt, x = _made(kind, causality)
    features, _ = clt.encode_sparse(x, slice(0))
    positions, layers, numbers, vectors, entries = clt.select_decoder_vectors(features)

    rows = clt.decoder_rows().unflatten(1, (L, D_OUT)).detach() / SCALES["target_scale"]
    expected = []
    for entry, (source, position, number) in enumerate(features.indices().T.tolist()):
        first = {"weak": source, "strict": source + 1, "none": 0}[causality]
        expected += [(position, layer, number, entry, source) for layer in range(first, L)]
    found = zip(
        positions.tolist(), layers.tolist(), numbers.tolist(), entries.tolist(), strict=True
    )
    assert sorted(found) == sorted(each[:4] for each in expected)

    grads = torch.randn(4, N, D_OUT, generator=torch.Generator().manual_seed(3))
    sources = features.indices()[0][entries]
    values = features.values()[entries]
    whole = values[:, None] * rows[sources * EACH + numbers, layers]
    for layer in sorted(set(layers.tolist())):
        mask = layers == layer
        want = torch.einsum("bpd,pd->pb", grads[:, positions[mask]], whole[mask])
        torch.testing.assert_close(vectors[mask].scores(grads), want)

    outputs = clt.compute_reconstruction(positions, layers, vectors)
    torch.testing.assert_close(_flat(outputs), clt(_flat(x)).x_hat)
    assert torch.equal(clt.decode_sparse(features), outputs)


def test_a_silent_prompt_gives_the_bias() -> None:
    clt, x = _made("jumprelu", "weak")
    features, encoders = clt.encode_sparse(x, slice(None))
    assert features._nnz() == len(encoders) == 0
    bias = clt.b_dec.view(L, 1, D_OUT) / SCALES["target_scale"]
    torch.testing.assert_close(clt.decode_sparse(features), bias.expand(L, N, D_OUT))


@pytest.mark.parametrize("shape", [(L, D), (L + 1, N, D), (L, N, D + 1)])
def test_activations_are_of_all_layers(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"x: expected shape \[{L}, n_pos, {D}\]"):
        _made(next(iter(KINDS)), "weak")[0].encode_sparse(torch.zeros(shape))
