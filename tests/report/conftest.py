"""A small report and a small SAE whose numbers are known exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.data import ShardDataset, ShardWriter
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.report import CurvePoint, LatentExamples, RunReport, TokenContext

if TYPE_CHECKING:
    from collections.abc import Callable

N_LATENTS, N_NEVER = 500, 37


@pytest.fixture(scope="session")
def make_report() -> Callable[..., RunReport]:
    """Return a builder of reports: 500 latents, 37 of which never fired."""

    def make(**changes: Any) -> RunReport:
        density = torch.logspace(-6, -0.01, N_LATENTS)
        density[torch.arange(N_NEVER) * 13] = 0
        context = TokenContext(["the", "river", "##bank", "was"], [0.0, 1.5, 6.0, 0.0], 2)
        fields: dict[str, Any] = {
            "title": "A run",
            "subtitle": "of a test",
            "facts": {"tokens": "2,000,000", "seconds": "20"},
            "metrics": {"fvu": 0.5, "l0": 32.26, "dead_fraction": N_NEVER / N_LATENTS},
            "curve": [CurvePoint(s, 1 / (s + 1), 1 / (s + 2), 40.0, 0.01 * s) for s in range(9)],
            "measured_fvu": 0.125,
            "latent_density": density,
            "decoder_cosine": torch.linspace(0.05, 1.0, N_LATENTS),
            "examples": [LatentExamples(17, 0.0125, 6.0, [context])],
            "command": "sae-kernels demo --seed 0",
        }
        return RunReport(**{**fields, **changes})

    return make


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


@pytest.fixture
def to_tokens():
    """The words by id: ten times the latent and its place in SUBJECTS; any other is "and"."""
    words = {10 * latent + i: w for latent, ws in SUBJECTS.items() for i, w in enumerate(ws)}
    return lambda ids: [words.get(i, "and") for i in ids]
