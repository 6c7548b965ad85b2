"""benchmarks.quality: every preset is given the layers that it is for."""

from __future__ import annotations

import pytest

from benchmarks.quality import layers_of, settings_of
from sae_kernels.nn import presets


@pytest.mark.parametrize("arch", presets())
def test_settings_are_of_the_layers_that_are_read_and_predicted(arch: str) -> None:
    sources, targets = layers_of(arch)
    sae = settings_of(arch, d_in=64, steps=800, seed=0, lr=None).sae
    assert sae.n_layers == len(sources)
    assert sae.transcodes == bool(targets)
