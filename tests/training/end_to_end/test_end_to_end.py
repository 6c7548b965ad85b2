"""The end-to-end loss against a model with a block exchanged by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sae_kernels.errors import ModelError
from sae_kernels.harvest import TokenBatch
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.training.end_to_end import EndToEnd, end_to_end_loss
from tests.harvest.causal import D, gpt2

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

F, K, V, LAYER, LATER = 48, 4, 15, "h.0", ("h.1", "h.2")
ALL = EndToEnd(0.7, 1.3, 0.4, downstream_layers=LATER)


def _sae() -> TopKSAE:
    return TopKSAE(TopKConfig(D, F, K))


def _ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


class _Spliced(nn.Module):
    def __init__(self, block: nn.Module, sae: TopKSAE) -> None:
        super().__init__()
        self.block, self.sae = block, sae

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.x: Tensor = self.block(*args, **kwargs)
        self.x_hat: Tensor = self.sae.decode(self.sae.encode(self.x))
        return self.x_hat


def _direct(sae: TopKSAE, ids: Tensor, weights: EndToEnd) -> tuple[Tensor, list[float]]:
    """The formula, on hidden states that transformers itself hands out."""
    clean, spliced = gpt2().double(), gpt2().double()
    spliced.transformer.h[0] = block = _Spliced(spliced.transformer.h[0], sae)
    a, b = (m(input_ids=ids, output_hidden_states=True) for m in (clean, spliced))
    p, q = a.logits.softmax(-1), b.logits.softmax(-1)
    kl = (p * (p / q).log()).sum() / ids.numel()

    def fvu(y: Tensor, x: Tensor) -> Tensor:
        x, y = x.reshape(-1, D), y.reshape(-1, D)
        return (x - y).square().sum() / (x - x.mean(0)).square().sum()

    # The last hidden state is that after the final norm: of block 2 there is none to compare.
    downstream = fvu(b.hidden_states[2], a.hidden_states[2])
    here = fvu(block.x_hat, block.x)
    loss = (
        weights.kl_coefficient * kl
        + weights.downstream_coefficient * downstream
        + weights.reconstruction_coefficient * here
    )
    return loss, [float(kl.detach()), float(downstream.detach()), float(here.detach())]


def test_the_loss_and_its_gradients_are_those_of_a_splice_by_hand() -> None:
    weights = EndToEnd(0.7, 1.3, 0.4, downstream_layers=("h.1",))
    model, sae, ids = gpt2().double(), _sae().double(), _ids(3, 7)
    got = end_to_end_loss(model, ids, LAYER, sae, weights)
    want, parts = _direct(sae, ids, weights)
    # fp64 both; a few hundred roundings, in another order.
    assert [float(v) for v in (got.kl, got.downstream, got.fvu)] == pytest.approx(parts, rel=1e-12)
    assert float(got.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-12)
    codes = sae.encode(model.transformer(ids, output_hidden_states=True).hidden_states[1])
    assert float(got.l0) == float((codes.values != 0).sum()) / ids.numel()
    names, parameters = zip(*sae.named_parameters(), strict=True)
    ours = torch.autograd.grad(got.loss, parameters)
    theirs = torch.autograd.grad(want, parameters)
    for name, a, b in zip(names, ours, theirs, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12 * float(b.abs().max()))


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec"])
def test_gradients_are_slopes(name: str) -> None:
    """Along a direction, the selection staying the same over so short a way."""
    model, sae, ids = gpt2().double(), _sae().double(), _ids(2, 6)
    parameter = sae.get_parameter(name)
    end_to_end_loss(model, ids, LAYER, sae, ALL).loss.backward()
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    direction /= direction.norm()
    step, losses = 1e-4, []
    for sign in (1, -1, 2, -2):
        with torch.no_grad():
            parameter.add_(sign * step * direction)
            losses.append(float(end_to_end_loss(model, ids, LAYER, sae, ALL).loss))
            parameter.sub_(sign * step * direction)
    near = (losses[0] - losses[1]) / (2 * step)
    far = (losses[2] - losses[3]) / (4 * step)
    assert parameter.grad is not None
    got = float((parameter.grad * direction).sum())
    # Richardson: the error of `near` is a third of the difference, of order step^2; that of the
    # extrapolation of order step^4, beside the roundings of the losses over the step.
    rounding = 1e3 * 2.0**-53 * max(losses) / step
    assert got == pytest.approx(near + (near - far) / 3, abs=rounding + abs(near - far) * step)
    assert abs(got) > 100 * rounding


def test_padding_does_not_count() -> None:
    model, sae = gpt2().double(), _sae().double()
    lengths = [4, 7]
    ids, mask = _ids(2, 7), torch.arange(7) < torch.tensor(lengths)[:, None]
    other = ids.masked_fill(~mask, 3)
    batches = (TokenBatch(t, mask, mask) for t in (ids, other))
    a, b = (end_to_end_loss(model, batch, LAYER, sae, ALL) for batch in batches)
    assert [float(v.detach()) for v in a] == [float(v.detach()) for v in b]
    # KL is a mean over tokens: that of the sequences by themselves, weighed by their lengths.
    alone = [end_to_end_loss(model, ids[i : i + 1, :n], LAYER, sae) for i, n in enumerate(lengths)]
    want = sum(n * float(part.kl) for n, part in zip(lengths, alone, strict=True)) / sum(lengths)
    assert float(a.kl) == pytest.approx(want, rel=1e-12)


def test_the_first_token_can_be_kept() -> None:
    model, sae = gpt2().double(), _sae().double()
    weights = EndToEnd(reconstruction_coefficient=1.0)
    whole, one = (TokenBatch.of(_ids(3, n)).keeping_first() for n in (5, 1))
    assert end_to_end_loss(model, whole, LAYER, sae, weights).kl > 0
    with pytest.raises(ValueError, match="at least one token to replace, got none"):
        end_to_end_loss(model, one, LAYER, sae, weights)
    # One token replaced has no variance; its FVU stays out of a loss that gives it no weight.
    single = end_to_end_loss(model, TokenBatch.of(_ids(1, 2)).keeping_first(), LAYER, sae)
    assert not single.fvu.isfinite()
    assert single.loss.isfinite()


def test_a_perfect_reconstruction_costs_nothing() -> None:
    """An SAE with a latent for each direction and its opposite."""
    sae = TopKSAE(TopKConfig(D, 2 * D, D, subtract_b_dec=False))
    with torch.no_grad():
        for W in (sae.W_enc, sae.W_dec):
            W.copy_(torch.cat([torch.eye(D), -torch.eye(D)]))
    got = end_to_end_loss(gpt2(), _ids(2, 6), LAYER, sae, ALL)
    # x_hat is x bit for bit.
    assert (float(got.loss.detach()), float(got.fvu)) == (0, 0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": None}, ValueError, "needs the model that the SAE sits in, got None; load it"),
        ({"layer": "h.5"}, ModelError, "nearest"),
        ({"sae": TopKSAE(TopKConfig(D + 1, F, K))}, ValueError, "what the SAE reads, 17, got 16"),
        (
            {"layer": "h.1", "weights": EndToEnd(downstream_layers=("h.0",))},
            ValueError,
            r"expected layers that run after h\.1, got h\.0",
        ),
        (
            {"weights": EndToEnd(downstream_layers=(LAYER,))},
            ValueError,
            r"run after h\.0, got h\.0",
        ),
        ({"inputs": torch.ones(2)}, ValueError, r"token ids \[B, S\]"),
    ],
    ids=["no-model", "layer", "width", "before", "itself", "tokens"],
)
def test_refusals(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model": gpt2(), "inputs": _ids(1, 3), "layer": LAYER, "sae": _sae()}
    with pytest.raises(error, match=message):
        end_to_end_loss(**given | changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_coefficient": -1.0}, "kl_coefficient: expected a number >= 0, got -1.0"),
        ({"downstream_coefficient": math.nan}, "downstream_coefficient: expected"),
        ({"reconstruction_coefficient": math.inf}, "reconstruction_coefficient: expected"),
        ({"kl_coefficient": 0.0}, "expected a coefficient above 0"),
        ({"downstream_layers": ("h.1", "h.1")}, "downstream_layers: expected each once"),
    ],
)
def test_weights_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EndToEnd(**options)
