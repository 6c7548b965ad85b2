"""The example of description length: what it adds up, and what it says without scikit-learn."""

from __future__ import annotations

import sys

import pytest
import torch

from examples import mdl_digits
from sae_kernels.nn import BatchTopKSAE
from sae_kernels.training import evaluate


def test_its_digits_are_split_once_and_its_sae_shortens_them() -> None:
    pytest.importorskip("sklearn", reason="needs scikit-learn, of the extra examples")
    train, held_out = mdl_digits.digits()
    assert (train.shape, held_out.shape) == ((1400, 64), (397, 64))
    assert float(train.min()) == 0
    assert float(train.max()) == 1
    before = evaluate(BatchTopKSAE(64, 16, k=1), held_out).bits_per_token
    found = evaluate(mdl_digits.trained(16, 1, train), held_out)
    assert found.bits_per_token < min(before, found.bits_without_sae)
    # Half a log2 of signal and noise over noise, which is a hundredth of the signal.
    assert pytest.approx(0.5 * float(torch.tensor(101.0).log2())) == mdl_digits.BITS_A_WEIGHT


def test_without_scikit_learn_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        SystemExit, match=r"scikit-learn, got none; pip install 'sae-kernels\[examples\]'"
    ):
        mdl_digits.digits()
