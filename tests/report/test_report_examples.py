"""Which latents are shown and where they fire, on an SAE whose codes are known."""

from __future__ import annotations

import pytest
import torch

from sae_kernels.data import ShardDataset, ShardWriter
from sae_kernels.report.examples import decoder_cosine, latent_examples


def test_contexts_are_the_strongest_tokens_of_different_documents(sae, source, to_tokens):
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


def test_latents_too_rare_or_too_frequent_are_not_shown(sae, source, to_tokens):
    assert latent_examples(sae, source, to_tokens, density=(0.2, 0.5)) == []
    assert latent_examples(sae, source, to_tokens, density=(0.05, 0.5), n_contexts=21) == []


def test_rows_without_text_are_refused(sae, to_tokens, tmp_path):
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
