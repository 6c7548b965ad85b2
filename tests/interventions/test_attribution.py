"""Effects of latents and errors, against autograd on dense codes and against blocks exchanged."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from dense_edits import VOCABULARY, Block, D, F, causal_model
from torch import Tensor

from sae_kernels.errors import ModelError
from sae_kernels.harvest.model import resolve_layer
from sae_kernels.harvest.tokens import TokenBatch
from sae_kernels.interventions import Attribution, Node, rank_correlation, strongest
from sae_kernels.nn import JumpReLUSAE, TopKSAE
from tests.made_tensors import Sizes

if TYPE_CHECKING:
    from collections.abc import Callable

    from sae_kernels.nn import SparseAutoencoder

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

LAYERS, B, S = ("h.0", "h.1", "h.2"), 3, 5


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 6]).mean()


@pytest.fixture(scope="module")
def model() -> Any:
    return causal_model()


def sae_of(kind: str, seed: int) -> SparseAutoencoder:
    if kind == "jumprelu":
        sae: SparseAutoencoder = JumpReLUSAE(D, F, seed=seed).double()
    else:
        sae = TopKSAE(D, F, k=5, activation_scale=2.0, seed=seed).double()
    generator = torch.Generator().manual_seed(seed)
    for vector in (sae.b_enc, sae.b_dec):
        vector.data.normal_(generator=generator)
    return sae


@pytest.fixture(scope="module", params=["topk", "jumprelu"])
def saes(request: pytest.FixtureRequest) -> dict[str, Any]:
    return {layer: sae_of(request.param, seed) for seed, layer in enumerate(LAYERS)}


def prompts(seed: int, n_tokens: int = S) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (B, n_tokens), generator=generator)


def with_block(model: Any, layer: str, function: Callable[[Tensor], Tensor], ids: Tensor) -> Tensor:
    """The metric with a layer's output changed by a function of a row's hidden states."""
    number, blocks = int(layer[2:]), model.transformer.h
    own = blocks[number]
    blocks[number] = Block(own, function)
    try:
        return metric(model(ids).logits)
    finally:
        blocks[number] = own


def output_of(model: Any, layer: str, ids: Tensor) -> Tensor:
    """A layer's output [B, S, D]."""
    seen: list[Tensor] = []

    def keep(_module: Any, _inputs: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = resolve_layer(model, layer).register_forward_hook(keep)
    model(ids)
    handle.remove()
    return seen[0].detach()


def dense_parts(sae: SparseAutoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        codes = sae.encode(x).to_dense()
        return codes, x - (codes @ sae.W_dec + sae.b_dec) / sae.target_scale


def dense_effects(
    model: Any, sae: SparseAutoencoder, layer: str, ids: Tensor, against: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Effects [B * S, F] and of errors [B * S] by autograd on dense codes."""
    codes, error = dense_parts(sae, output_of(model, layer, ids))
    codes, error = codes.requires_grad_(), error.requires_grad_()
    rows = iter((codes @ sae.W_dec + sae.b_dec) / sae.target_scale + error)
    value = with_block(model, layer, lambda _: next(rows), ids)
    by_codes, by_error = torch.autograd.grad(value, [codes, error])
    other_codes, other_error = torch.zeros_like(codes), torch.zeros_like(error)
    if against is not None:
        other_codes, other_error = dense_parts(sae, output_of(model, layer, against))
    effects = by_codes * (other_codes - codes)
    errors = (by_error * (other_error - error)).sum(-1)
    return effects.detach().flatten(0, 1), errors.detach().flatten()


def scattered(effects: Any, n_tokens: int) -> Tensor:
    dense = torch.zeros(n_tokens, F, dtype=torch.float64)
    assert len(set(zip(effects.tokens.tolist(), effects.latents.tolist(), strict=True))) == len(
        effects.tokens
    )
    dense[effects.tokens, effects.latents] = effects.effects
    return dense


@pytest.mark.parametrize("other", [None, 1], ids=["to zero", "against prompts"])
def test_effects_are_gradient_times_change_on_dense_codes(
    model: Any, saes: dict[str, Any], other: int | None
) -> None:
    ids = prompts(0)
    against = None if other is None else prompts(other)
    found = Attribution(model, saes, ids, metric, against).effects()
    for layer, sae in saes.items():
        effects, errors = dense_effects(model, sae, layer, ids, against)
        torch.testing.assert_close(scattered(found[layer], B * S), effects)
        torch.testing.assert_close(found[layer].errors, errors)
        latents, sums = found[layer].by_latent()
        torch.testing.assert_close(sums, effects.sum(0)[latents])
        assert (sums.abs().diff() <= 0).all()


@pytest.mark.parametrize("other", [None, 1], ids=["to zero", "against prompts"])
def test_integrated_gradients_add_up_to_the_ablation_of_the_layer(
    model: Any, saes: dict[str, Any], other: int | None
) -> None:
    against = None if other is None else prompts(other)
    study = Attribution(model, saes, prompts(0), metric, against)
    off = {}
    for steps in (16, 64):
        for layer, found in study.effects(steps).items():
            everything = [(layer, f) for f in range(F)] + [(layer, None)]
            whole = study.without(everything) - study.without([])
            total = float(found.effects.sum() + found.errors.sum())
            off[layer, steps] = abs(total - whole)
            assert off[layer, steps] < 40 / steps**2
    for layer in saes:
        # The midpoint rule's order: a fourfold of steps is a sixteenth of the error.
        assert off[layer, 64] < off[layer, 16] / 8 or off[layer, 64] < 1e-6


@pytest.mark.parametrize("other", [None, 1], ids=["to zero", "against prompts"])
def test_ablations_are_those_of_exchanged_blocks(
    model: Any, saes: dict[str, Any], other: int | None
) -> None:
    ids, layer = prompts(0), "h.1"
    sae, against = saes[layer], None if other is None else prompts(other)
    study = Attribution(model, saes, ids, metric, against)
    codes, _ = dense_parts(sae, output_of(model, layer, ids))
    latent = int(codes.flatten(0, 1).abs().sum(0).argmax())
    zero = torch.zeros(B, S, F, dtype=torch.float64), torch.zeros(B, S, D, dtype=torch.float64)
    away = zero if against is None else dense_parts(sae, output_of(model, layer, against))
    rows = iter(range(B))

    def no_latent(x: Tensor) -> Tensor:
        own, error = dense_parts(sae, x)
        own[:, latent] = away[0][next(rows), :, latent]
        return (own @ sae.W_dec + sae.b_dec) / sae.target_scale + error

    def no_error(x: Tensor) -> Tensor:
        own, _ = dense_parts(sae, x)
        return (own @ sae.W_dec + sae.b_dec) / sae.target_scale + away[1][next(rows)]

    clean = metric(model(ids).logits).item()
    expected = [with_block(model, layer, no_latent, ids).item() - clean]
    rows = iter(range(B))
    expected.append(with_block(model, layer, no_error, ids).item() - clean)
    got = study.exact([Node(layer, latent), (layer, None)])
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert study.without([]) == pytest.approx(clean)


def test_nothing_kept_against_prompts_is_their_own_metric(model: Any, saes: dict[str, Any]) -> None:
    study = Attribution(model, saes, prompts(0), metric, prompts(1))
    assert study.only([]) == pytest.approx(metric(model(prompts(1)).logits).item())
    everything = [(layer, f) for layer in LAYERS for f in (*range(F), None)]
    assert study.only(everything) == pytest.approx(study.without([]))


def test_only_replaced_tokens_have_effects(model: Any, saes: dict[str, Any]) -> None:
    ids, mask = prompts(0), torch.ones(B, S, dtype=torch.long)
    mask[0, :2] = 0  # padding on the left
    batch = TokenBatch.of({"input_ids": ids, "attention_mask": mask}).keeping_first(1)
    found = Attribution(model, saes, batch, metric).effects()
    whole = Attribution(model, saes, ids, metric).effects()
    there = batch.replaced.flatten()
    for layer, each in found.items():
        assert there[each.tokens].all()
        assert not each.errors[~there].any()
        unpadded = there.clone()
        unpadded[:S] = False  # the padded row has other activations
        expected = scattered(whole[layer], B * S)[unpadded]
        torch.testing.assert_close(scattered(each, B * S)[unpadded], expected)
        torch.testing.assert_close(each.errors[unpadded], whole[layer].errors[unpadded])


def test_estimates_rank_as_exact_effects_do(model: Any, saes: dict[str, Any]) -> None:
    study = Attribution(model, saes, prompts(0), metric)
    ranked = strongest(study.effects(16), 30)
    assert [abs(effect) for _, effect in ranked] == sorted(
        (abs(effect) for _, effect in ranked), reverse=True
    )
    exact = study.exact([node for node, _ in ranked])
    assert rank_correlation([effect for _, effect in ranked], exact) > 0.8


def test_one_forward_and_one_backward_pass_for_all_layers(model: Any, saes: dict[str, Any]) -> None:
    study = Attribution(model, saes, prompts(0), metric)
    passes = {"forward": 0, "backward": 0}

    def forward(*_: Any) -> None:
        passes["forward"] += 1

    def backward(*_: Any) -> None:
        passes["backward"] += 1

    head = model.lm_head
    hooks = [head.register_forward_hook(forward), head.register_full_backward_hook(backward)]
    study.effects()
    assert passes == {"forward": 1, "backward": 1}
    study.effects(4)  # one that finds the activations, then 4 for each layer
    for hook in hooks:
        hook.remove()
    assert passes == {"forward": 2 + 4 * 3, "backward": 1 + 4 * 3}


def test_memory_grows_with_kept_entries_alone(model: Any) -> None:
    totals = {}
    for n_latents, k in ((512, 16), (8192, 16), (512, 32)):
        sae = TopKSAE(D, n_latents, k=k).double()
        study = Attribution(model, {"h.1": sae}, prompts(0, 20), metric)
        study.effects()
        with Sizes() as sizes:
            study.effects()
        totals[n_latents, k] = (sizes.largest, sum(size for size, _ in sizes.made))
    assert totals[8192, 16] == totals[512, 16], "the number of latents does not matter"
    more = totals[512, 32][1] - totals[512, 16][1]
    entries = B * 20 * 16
    assert 0 < more < 300 * entries, "bytes, some tensors of int64 and fp64 an entry"


def test_a_rank_correlation_with_nan_is_nan() -> None:
    assert math.isnan(rank_correlation([1.0, math.nan, 2.0], [2.0, 3.0, 4.0]))


def test_refusals(model: Any, saes: dict[str, Any]) -> None:
    study = Attribution(model, saes, prompts(0), metric)
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: Attribution(model, {}, prompts(0), metric), "at least one layer"),
        (lambda: study.without([("h.9", 1)]), "expected one of h.0, h.1, h.2, got 'h.9'"),
        (lambda: study.exact([("h.1", F)]), f"from 0 to {F - 1}"),
        (lambda: Attribution(model, saes, prompts(0), metric, prompts(0, 4)), "same shape"),
        (lambda: Attribution(model, saes, prompts(0), lambda x: x[0]).effects(), "a scalar"),
        (
            lambda: Attribution(model, saes, prompts(0), lambda x: torch.ones(())).effects(),
            "depends on every layer",
        ),
        (
            lambda: Attribution(model, saes, prompts(0), lambda x: 1.0).effects(),  # type: ignore[arg-type, return-value]
            "a scalar tensor, got float",
        ),
        (lambda: study.effects(-1), "steps: expected a whole number of at least 0, got -1"),
        (lambda: strongest(study.effects(), -1), "n: expected a whole number of at least 0"),
        (lambda: rank_correlation([1.0, 2.0], [1.0]), "of one length, got 2 and 1 values"),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(ValueError, match="as wide as what the SAE reads"):
        Attribution(model, {"h.0": TopKSAE(8, 32, k=4)}, prompts(0), metric).effects()
    with pytest.raises(ModelError, match=r"got 'h\.7'"):
        Attribution(model, {"h.7": saes["h.0"]}, prompts(0), metric).effects()
    assert not any(module._forward_hooks for module in model.modules())
