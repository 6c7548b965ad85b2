"""Options that save memory: split masters, bf16 moments, one compute copy; what a device needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.gpu import training_device
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.primitives.row_update import halves
from sae_kernels.testing import assert_bitwise
from sae_kernels.training import evaluate, train
from tests.step.harness import VARIANTS, B, Variant, build, tokens

if TYPE_CHECKING:
    from sae_kernels.step import FusedStep

LR = 1e-3


def variant(**settings: Any) -> Variant:
    """bf16 compute and some dead latents, with these settings of the training."""
    return Variant(train={"compute": "bfloat16", **settings}, n_dead=30)


def trained(steps: int = 5, **settings: Any) -> FusedStep:
    """A few steps of such a variant; the module has its fp32 weights back."""
    step = build(variant(**settings))
    for i in range(steps):
        step(tokens(B, seed=i), lr=LR)
    step.restore_()
    return step


@pytest.mark.parametrize("clip", [None, 0.05], ids=["free", "clipped"])
@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
@pytest.mark.parametrize("adam", ["dense", "lazy"])
def test_a_split_master_trains_bit_for_bit_like_an_fp32_one(
    adam: str, moments: str, clip: float | None, either_backend: str
) -> None:
    split, whole = (
        build(variant(master_weights=master, moment_dtype=moments, clip_norm=clip, adam=adam))
        for master in ("split", "float32")
    )
    for i in range(5):
        for step in (split, whole):
            step.sae.backend = either_backend
            step(tokens(B, seed=i), lr=LR)
        for name in ("W_enc", "W_dec"):
            # Halfway between two bf16 numbers torch rounds to the even one, halves away from zero:
            # one weight in 65536.
            copy = whole.matrices[name].copy
            assert copy is not None
            copy.copy_(halves.split(whole.matrices[name].param)[0])
            assert_bitwise(name, split.sae.get_parameter(name).data, copy)
    split.restore_()
    for name, parameter in whole.sae.named_parameters():
        assert_bitwise(name, split.sae.get_parameter(name).data, parameter.data)


def test_in_between_the_module_holds_the_upper_halves() -> None:
    step = build(variant(master_weights="split"))
    assert step.sae.W_dec.dtype == torch.bfloat16
    output = step.sae(tokens(3))
    assert output.x_hat.isfinite().all()
    with pytest.raises(
        ValueError, match="compute: expected 'bfloat16' with master_weights 'split'"
    ):
        build(Variant(train={"compute": "float32", "master_weights": "split"}))


def test_bf16_moments_learn_as_fp32_ones_do() -> None:
    fvu = []
    for states in ("float32", "bfloat16"):
        step = trained(100, moment_dtype=states)
        row = step.matrices["W_dec"]
        assert row.m is not None
        assert row.m.dtype == getattr(torch, states)
        fvu.append(evaluate(step.sae, tokens(2000, seed=999)).fvu)
    assert fvu[0] < 0.7, "nothing was learnt, so nothing was compared"
    assert fvu[1] == pytest.approx(fvu[0], rel=0.02)


def test_without_a_decoder_copy_the_decoder_is_read_in_fp32() -> None:
    step = trained(compute_copies="encoder")
    assert step.matrices["W_dec"].copy is None
    assert step.matrices["W_enc"].copy is not None
    both = trained(compute_copies="both")
    assert not torch.equal(both.sae.W_dec, step.sae.W_dec)


def test_a_trained_sae_is_fp32_again_and_saved_so(tmp_path: Any) -> None:
    small = {"compute": "bfloat16", "master_weights": "split", "moment_dtype": "bfloat16"}
    config = TopKConfig(32, 128, 4)
    result = train(config, tokens(400), steps=12, batch_size=64, folder=tmp_path, **small)
    assert result.sae.W_enc.dtype == torch.float32
    loaded = TopKSAE.from_pretrained(tmp_path / "sae")
    assert loaded.W_dec.dtype == torch.float32
    assert_bitwise("W_dec", loaded.W_dec.data, result.sae.W_dec.data)


@pytest.mark.parametrize("name", ["default", "few-dead", "many-dead"])
def test_a_padded_set_of_dead_latents_gives_the_same_step(name: str) -> None:
    """AuxK that is not to know how many are dead, as on a GPU, against AuxK that counts."""
    results = []
    for backend in ("cpu", "reference"):
        step = build(VARIANTS[name])
        step.sae.backend = backend
        step.dead.padded = backend == "reference"
        results.append([step(tokens(B, seed=i), lr=LR) for i in range(3)])
    for counted, padded in zip(*results, strict=True):
        assert (float(counted.aux_loss) > 0) == (name != "default")
        assert float(padded.aux_loss) == pytest.approx(float(counted.aux_loss), rel=1e-4)
        assert float(padded.loss) == pytest.approx(float(counted.loss), rel=1e-4)


def test_the_learning_rate_may_be_a_tensor() -> None:
    numbers, tensors = (build(Variant()) for _ in range(2))
    for i, lr in enumerate((1e-3, 3e-4)):
        numbers(tokens(B, seed=i), lr=lr)
        tensors(tokens(B, seed=i), lr=torch.tensor(lr, dtype=torch.float64))
    for name, parameter in numbers.sae.named_parameters():
        assert_bitwise(name, dict(tensors.sae.named_parameters())[name].data, parameter.data)


def test_counters_stay_where_they_are() -> None:
    """A CUDA graph replays on addresses."""
    step = build(Variant())
    places = step.dead.since_fired.data_ptr(), step.n_updates.data_ptr()
    step(tokens(B), lr=LR)
    assert places == (step.dead.since_fired.data_ptr(), step.n_updates.data_ptr())


def test_a_device_that_is_not_there_is_named() -> None:
    assert training_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="device: expected auto, cpu or cuda:0, got 'gpu'"):
        training_device("gpu")
    with pytest.raises(ValueError, match=r"device: expected a GPU that is there, got 'cuda:99'"):
        training_device("cuda:99")
