"""A small report whose numbers are known exactly, for the tests to change one field of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

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
