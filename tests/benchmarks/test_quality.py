"""benchmarks.quality: every preset is given the layers that it is for."""

from __future__ import annotations

import pytest

from benchmarks.quality import REVIVAL, layers_of, settings_of
from sae_kernels.nn import presets


@pytest.mark.parametrize("arch", presets())
def test_settings_are_of_the_layers_that_are_read_and_predicted(arch: str) -> None:
    sources, targets = layers_of(arch)
    sae = settings_of(arch, d_in=64, steps=800, seed=0, lr=None).sae
    assert sae.n_layers == len(sources)
    assert sae.transcodes == bool(targets)


@pytest.mark.parametrize("arch", ["topk", "relu", "jumprelu"])
def test_dead_latents_are_revived_in_one_way_at_most(arch: str) -> None:
    made = {
        way: settings_of(arch, d_in=64, steps=800, seed=0, lr=None, revival=way).train
        for way in REVIVAL
    }
    ways = {
        way: (train.objective.auxk_alpha > 0, train.resample_every is not None)
        for way, train in made.items()
        if way != "default"
    }
    assert ways == {"AuxK": (True, False), "resampling": (False, True), "neither": (False, False)}
