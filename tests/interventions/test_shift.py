"""SHIFT: means of documents against dense codes, the probe's optimum, and latents' parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense_edits import VOCABULARY, D, F, causal_model

from sae_kernels.harvest.splice import record
from sae_kernels.interventions import fit_probe, mean_documents, separation
from sae_kernels.nn import JumpReLUSAE, SparseAutoencoder, TopKSAE

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

LAYER = "h.1"


@pytest.fixture(scope="module")
def model() -> Any:
    return causal_model()


@pytest.fixture(scope="module", params=["topk", "jumprelu"])
def sae(request: pytest.FixtureRequest) -> SparseAutoencoder:
    if request.param == "jumprelu":
        return JumpReLUSAE(D, F).double()
    return TopKSAE(D, F, k=5, activation_scale=2.0).double()


def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for width, lengths in ((6, [6, 2, 5]), (3, [3, 1])):
        ids = torch.randint(1, VOCABULARY, (len(lengths), width), generator=generator)
        mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
        found.append({"input_ids": ids, "attention_mask": mask})
    return found


def test_documents_are_means_over_their_tokens(model: Any, sae: SparseAutoencoder) -> None:
    documents = mean_documents(model, LAYER, sae, batches())
    means, codes, ablated = [], [], []
    gone = torch.tensor([1, 5, 17, 30])
    for batch in batches():
        with torch.no_grad(), record(model, (LAYER,)) as outputs:
            model(**batch)
        for x, mask in zip(outputs[LAYER], batch["attention_mask"].bool(), strict=True):
            with torch.no_grad():
                dense = sae.encode(x[mask]).to_dense()
            less = dense.clone()
            less[:, gone] = 0
            means.append(x[mask].mean(0))
            codes.append(dense.mean(0))
            ablated.append((x[mask] - (dense - less) @ sae.W_dec / sae.target_scale).mean(0))
    torch.testing.assert_close(documents.x, torch.stack(means))
    torch.testing.assert_close(documents.codes.to_dense(), torch.stack(codes))
    removed = documents.without(sae, gone)
    torch.testing.assert_close(removed, torch.stack(ablated).detach())


def test_parts_are_what_ablation_takes_from_the_distance(
    model: Any, sae: SparseAutoencoder
) -> None:
    documents = mean_documents(model, LAYER, sae, batches())
    labels = torch.tensor([True, False, False, True, True])
    probe = fit_probe(documents.x, labels)

    def distance(x: torch.Tensor) -> float:
        margins = probe.margins(x)
        return float(margins[labels].mean() - margins[~labels].mean())

    latents, parts = separation(probe, sae, documents, labels)
    assert (parts.abs().diff() <= 0).all()
    assert set(latents.tolist()) == set(documents.codes.indices.tolist())
    for latent, part in zip(latents[:5].tolist(), parts[:5].tolist(), strict=True):
        lost = distance(documents.x) - distance(documents.without(sae, [latent]))
        assert part == pytest.approx(lost, abs=1e-9)


def test_the_probe_is_the_optimum() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(200, 5, generator=generator).double() * 3 + 1
    labels = x[:, 0] + torch.randn(200, generator=generator) > 1
    probe = fit_probe(x, labels, l2=0.01)
    scale = (x - x.mean(0)).square().mean().sqrt()
    weight, bias = probe.weight.clone().requires_grad_(), probe.bias.clone().requires_grad_()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ weight + bias, labels.double())
    loss = loss + 0.01 * (weight * scale).square().sum() / 2
    by_weight, by_bias = torch.autograd.grad(loss, [weight, bias])
    # The gradient by the standardised weight, which is the one that the penalty is about.
    assert float((by_weight / scale - by_bias * x.mean(0) / scale).abs().max()) < 1e-6
    assert abs(float(by_bias)) < 1e-6
    assert probe.accuracy(x, labels) > 0.75


def test_refusals(model: Any, sae: SparseAutoencoder) -> None:
    for labels in (torch.ones(3, dtype=torch.bool), torch.tensor([0, 1, 1]), torch.ones(2) > 0):
        with pytest.raises(ValueError, match="of both classes"):
            fit_probe(torch.zeros(3, 2), labels)
    empty = {"input_ids": torch.ones(2, 3).long(), "attention_mask": torch.zeros(2, 3).long()}
    with pytest.raises(ValueError, match="a token in each document"):
        mean_documents(model, LAYER, sae, [empty])
    with pytest.raises(ValueError, match="at least one, got none"):
        mean_documents(model, LAYER, sae, [])
    documents = mean_documents(model, LAYER, sae, [torch.ones(2, 3).long()])
    with pytest.raises(ValueError, match=r"latents: expected numbers from 0 to .* got -1"):
        documents.without(sae, [-1])
