"""Which latents are shown and where they fire, on an SAE whose codes are known."""

from __future__ import annotations

import pytest
import torch

from sae_kernels.data import ShardDataset, ShardWriter
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.report.examples import decoder_cosine, latent_examples

SUBJECTS = {0: ["cat", "kitten"], 1: ["dog"], 2: ["=", "!"]}


@pytest.fixture
def sae():
    """Latent f is input f: activations are the codes."""
    config = TopKConfig(6, 6, k=2)
    sae = TopKSAE(config)
    for parameter in (sae.W_enc, sae.W_dec):
        parameter.data = torch.eye(6)
    return sae


@pytest.fixture
def source(tmp_path):
    """Twenty documents of ten tokens; in each, latents 0 to 2 fire once on one of their words."""
    x, tokens = torch.zeros(20, 10, 6), torch.full((20, 10), 9)
    for document in range(20):
        for latent in SUBJECTS:
            x[document, 3 * latent, latent] = 1 + document / 10 + latent
            tokens[document, 3 * latent] = 10 * latent + document % len(SUBJECTS[latent])
    with ShardWriter(tmp_path, 6) as writer:
        writer.write(x.flatten(0, 1), tokens.flatten(), torch.arange(20).repeat_interleave(10))
    return ShardDataset(tmp_path)


def to_tokens(ids):
    words = {10 * latent + i: w for latent, ws in SUBJECTS.items() for i, w in enumerate(ws)}
    return [words.get(i, "and") for i in ids]


def test_contexts_are_the_strongest_tokens_of_different_documents(sae, source):
    shown = latent_examples(sae, source, to_tokens, density=(0.05, 0.5), n_latents=1)
    (example,) = shown
    assert example.latent == 0  # two words beat one, whatever its strength, and signs are no words
    assert example.density == pytest.approx(0.1)
    assert example.max_activation == pytest.approx(2.9)
    peaks = [context.activations[context.peak] for context in example.contexts]
    assert peaks == pytest.approx([2.9, 2.8, 2.7, 2.6, 2.5, 2.4, 2.3, 2.2])
    assert [c.tokens[c.peak] for c in example.contexts[:2]] == ["kitten", "cat"]
    # The window ends with the document: rows 0 to 9, the peak being the first.
    assert all(c.peak == 0 and len(c.tokens) == 10 for c in example.contexts)


def test_latents_too_rare_or_too_frequent_are_not_shown(sae, source):
    assert latent_examples(sae, source, to_tokens, density=(0.2, 0.5)) == []
    assert latent_examples(sae, source, to_tokens, density=(0.05, 0.5), n_contexts=21) == []


def test_rows_without_text_are_refused(sae, tmp_path):
    with ShardWriter(tmp_path, 6) as writer:
        writer.write(torch.ones(3, 6))
    with pytest.raises(ValueError, match="with their tokens and documents"):
        latent_examples(sae, ShardDataset(tmp_path), to_tokens)


def test_decoder_cosine_in_parts_is_that_of_the_whole_matrix(monkeypatch):
    W = torch.randn(50, 7)
    W[3] = 2 * W[40]
    monkeypatch.setattr("sae_kernels.report.examples._COSINES", 200)
    rows = torch.nn.functional.normalize(W, dim=1)
    expected = (rows @ rows.T).fill_diagonal_(-1).amax(1)
    torch.testing.assert_close(decoder_cosine(W), expected)
    assert decoder_cosine(W)[3] == pytest.approx(1)
    assert decoder_cosine(W[:1]).tolist() == [0]
