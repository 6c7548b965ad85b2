"""Sizes and numbers of tokens as people write them on the command line."""

from __future__ import annotations

import pytest

from sae_kernels.cli import numbers


@pytest.mark.parametrize(
    ("text", "latents", "tokens"),
    [
        ("131072", 131072, 131072),
        ("16M", 16 * 2**20, 16_000_000),
        ("40g", 40 * 2**30, 40_000_000_000),
        ("0.5K", 512, 500),
        ("1_000", 1000, 1000),
        ("1e3", 1000, 1000),
    ],
)
def test_sizes_are_binary_and_tokens_decimal(text, latents, tokens):
    assert numbers.size(text, "x") == latents
    assert numbers.tokens(text, "x") == tokens


@pytest.mark.parametrize("text", ["", "M", "-1", "0", "1.5", "16 Mi", "12x", "nan", "1e99", "²"])
def test_what_is_no_number_is_refused(text):
    with pytest.raises(ValueError, match="--k: expected a whole number"):
        numbers.size(text, "--k")
