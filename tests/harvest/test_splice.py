"""A layer's output replaced, against a model in which a block was exchanged by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from causal import LAYER, VOCABULARY, D, Replaced, gpt2
from torch import Tensor, nn

from sae_kernels.errors import ModelError
from sae_kernels.harvest import TokenBatch, resolve_layer, splice, spliced_logits
from sae_kernels.harvest.splice import clean_logits, frozen, record
from sae_kernels.nn import TopKConfig, TopKSAE
from sae_kernels.testing import assert_bitwise

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

PLACES = [(0, 3), (0, 4), (1, 0), (1, 3), (1, 4)]  # padding on either side


@pytest.fixture(scope="module")
def model() -> Any:
    return gpt2()


@pytest.fixture
def batch() -> TokenBatch:
    ids = torch.randint(len(VOCABULARY), (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    for place in PLACES:
        mask[place] = 0
    return TokenBatch.of({"input_ids": ids, "attention_mask": mask})


def _bent(x: Tensor) -> Tensor:
    return 0.5 * x.sin() + 1


def _exchanged(function: Any) -> Any:
    other = gpt2()
    other.transformer.h[1] = Replaced(other.transformer.h[1], function)
    return other


def test_the_model_runs_on_with_the_replacement(model: Any, batch: TokenBatch) -> None:
    whole = TokenBatch.of(batch.input_ids)
    with torch.no_grad():
        want = clean_logits(_exchanged(_bent), whole)
        assert_bitwise("function", spliced_logits(model, whole, LAYER, _bent), want)
        with splice(model, LAYER, _bent):
            assert_bitwise("context", model(input_ids=whole.input_ids).logits, want)
        assert not torch.equal(clean_logits(model, whole), want)


def test_what_is_left_out_keeps_its_bits(model: Any, batch: TokenBatch) -> None:
    seen: list[Tensor] = []

    def shifted(x: Tensor) -> Tensor:
        seen.append(x)
        return x + 1

    with torch.no_grad():
        with record(model, (LAYER,)) as outputs:
            clean_logits(model, batch)
        before = outputs[LAYER]
        for given in (batch, batch.keeping_first()):
            mask = positions = given.replaced
            with splice(model, LAYER, shifted, positions), record(model, (LAYER,)) as outputs:
                clean_logits(model, batch)
            assert_bitwise("kept", outputs[LAYER][~mask], before[~mask])
            assert_bitwise("replaced", outputs[LAYER][mask], before[mask] + 1)
            assert_bitwise("rows", seen.pop(), before[mask])
            with splice(model, LAYER, shifted, positions):
                want = clean_logits(model, batch)
            got = spliced_logits(model, given, LAYER, shifted)
            assert_bitwise("function", got, want)
            seen.clear()


def test_the_first_token_is_the_first_attended_one(batch: TokenBatch) -> None:
    assert batch.attention_mask.logical_xor(batch.keeping_first().replaced).nonzero().tolist() == [
        [0, 0],
        [1, 1],
        [2, 0],
    ]


def test_gradients_flow_into_what_replaces_and_into_what_is_replaced() -> None:
    model, gain = gpt2().double(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    exchanged = _exchanged(lambda x: gain * x).double()
    batch = TokenBatch.of(torch.tensor([[3, 4, 5, 6]]))
    got = spliced_logits(model, batch, LAYER, lambda x: gain * x).square().mean()
    want = clean_logits(exchanged, batch).square().mean()
    ours = [model.transformer.h[0].mlp.c_fc.weight, gain]
    theirs = [exchanged.transformer.h[0].mlp.c_fc.weight, gain]
    for a, b in zip(torch.autograd.grad(got, ours), torch.autograd.grad(want, theirs), strict=True):
        # The same operations but for the scatter, whose gradient is exact.
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


def test_a_frozen_model_still_lets_the_sae_learn() -> None:
    model, sae = gpt2(), TopKSAE(TopKConfig(D, 32, 4))
    with frozen(model):
        batch = TokenBatch.of(torch.tensor([[3, 4, 5]]))
        logits = spliced_logits(model, batch, LAYER, lambda x: sae(x).x_hat)
    logits.logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in sae.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_frozen_gives_everything_back() -> None:
    model = gpt2().train()
    model.transformer.h[0].eval()
    model.transformer.wpe.weight.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    needs = [p.requires_grad for p in model.parameters()]

    def fail() -> None:
        with frozen(model):
            assert not any(module.training for module in model.modules())
            assert not any(p.requires_grad for p in model.parameters())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs


class _Tuple(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        return x, "beside"


def test_of_a_tuple_the_first_element_is_replaced_in_its_dtype() -> None:
    model = nn.Sequential(_Tuple())
    x = torch.ones(1, 2, 3, dtype=torch.bfloat16)
    with splice(model, "0", lambda rows: rows.double() / 3, torch.tensor([[False, True]])):
        y, beside = model(x)
    assert beside == "beside"
    assert_bitwise("y", y[0], torch.stack([x[0, 0], x[0, 0] / 3]))


def test_no_hook_stays(model: Any, batch: TokenBatch) -> None:
    def fail(_x: Tensor) -> Tensor:
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        spliced_logits(model, batch, LAYER, fail)
    with record(model, ("transformer.h.0", LAYER)):
        pass
    with pytest.raises(ModelError), record(model, (LAYER, "nowhere")):
        pass
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_go_by_the_name_they_have_without_the_head(model: Any) -> None:
    assert resolve_layer(model, "h.1") is resolve_layer(model, "transformer.h.1")
    assert resolve_layer(model.transformer, "h.1") is model.transformer.h[1]
    with pytest.raises(ModelError, match=r"nearest: transformer\.h\.2"):
        resolve_layer(model, "transformer.h.22")


@pytest.mark.parametrize(
    ("layer", "function", "message"),
    [
        ("h.7", _bent, r"nearest: h\."),
        (
            "transformer",
            _bent,
            r"transformer: expected a layer that puts out \[3, 5, D\], got Base",
        ),
        ("lm_head", _bent, None),
        ("h", _bent, "h: expected a layer that runs, it did not"),
        ("h.1", lambda x: x[:, :3], r"a replacement \[10, 16\], as the activations, got \[10, 3\]"),
    ],
    ids=["unknown", "no-tensor", "any-module-will-do", "does-not-run", "shape"],
)
def test_refusals(model: Any, batch: TokenBatch, layer: str, function: Any, message: str) -> None:
    if message is None:
        assert spliced_logits(model, batch, layer, function).shape == (3, 5, len(VOCABULARY))
        return
    with pytest.raises(ValueError, match=message):
        spliced_logits(model, batch, layer, function)


def test_a_model_without_logits_is_refused(model: Any, batch: TokenBatch) -> None:
    with pytest.raises(ModelError, match="GPT2Model puts out no logits; load it with load_causal"):
        clean_logits(model.transformer, batch)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.tensor([1, 2]), r"token ids \[B, S\], whole numbers, got torch.int64 \[2\]"),
        (torch.ones(1, 2), r"got torch.float32 \[1, 2\]"),
        (torch.ones(1, 0).long(), r"got torch.int64 \[1, 0\]"),
        (
            {"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)},
            r"an attention mask \[1, 2\], as the ids, got \[1, 3\]",
        ),
    ],
    ids=["flat", "floats", "empty", "mask"],
)
def test_tokens_that_are_none(inputs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBatch.of(inputs)
