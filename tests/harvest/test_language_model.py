"""Losses of a spliced model, against runs of single sequences with a block exchanged by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from causal import CONTEXT, VOCABULARY, D, Replaced, documents, gpt2, sae_of, tokenizer
from torch import Tensor

from sae_kernels.errors import ModelError
from sae_kernels.harvest import LanguageModelLoss, TokenBatch, language_model_loss, token_batches
from sae_kernels.nn import (
    BatchTopKConfig,
    BatchTopKSAE,
    ReLUConfig,
    ReLUSAE,
    SparseAutoencoder,
    TopKConfig,
    TopKSAE,
)
from sae_kernels.testing.budgets import gamma

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

LAYER = "h.1"
IDENTITY, ZEROS = sae_of(lambda x: x), sae_of(torch.zeros_like)


@pytest.fixture(scope="module")
def model() -> Any:
    return gpt2()


@pytest.fixture(scope="module")
def batches(model: Any) -> list[TokenBatch]:
    options = {"batch_size": 3, "context_length": CONTEXT}
    return list(token_batches(model, tokenizer(), documents(40), **options))


def _sequences(batches: list[TokenBatch]) -> list[Tensor]:
    return [
        ids[mask]
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]


def _direct(sequences: list[Tensor], function: Any, keep_first: bool = False) -> tuple[float, int]:
    """Loss per token, one sequence at a time without padding, in fp64."""
    model = gpt2().double()

    def replace(x: Tensor) -> Tensor:
        return torch.cat([x[:, :1], function(x[:, 1:])], 1) if keep_first else function(x)

    model.transformer.h[1] = Replaced(model.transformer.h[1], replace)
    total, n = 0.0, 0
    with torch.no_grad():
        for ids in sequences:
            logits = model(input_ids=ids[None]).logits[0, :-1]
            total += float(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum"))
            n += len(ids) - 1
    return total / n, n


def test_batches_hold_every_token_once(model: Any, batches: list[TokenBatch]) -> None:
    words = tokenizer()
    want = []
    for text in documents(40):
        ids = words(text)["input_ids"]
        want += [ids[i : i + CONTEXT] for i in range(0, len(ids), CONTEXT)]
    assert sorted(s.tolist() for s in _sequences(batches)) == sorted(want)
    assert all(batch.input_ids.numel() <= 3 * CONTEXT for batch in batches)
    padding = sum(int((~batch.attention_mask).sum()) for batch in batches)
    assert 0 < padding < 0.1 * sum(map(len, want))  # some, so that the tests here see it
    options = {"batch_size": 2, "context_length": CONTEXT, "max_tokens": 57}
    limited = list(token_batches(model, words, documents(40), **options))
    assert sum(int(batch.attention_mask.sum()) for batch in limited) == 57


def test_the_clean_loss_is_the_models_own(model: Any, batches: list[TokenBatch]) -> None:
    total, n = 0.0, 0
    for ids, mask, _ in batches:
        labels = ids.masked_fill(~mask, -100)
        if not (labels[:, 1:] != -100).any():
            continue  # transformers divides by 0 there
        with torch.no_grad():
            loss = model(input_ids=ids, attention_mask=mask.long(), labels=labels).loss
        count = int((labels[:, 1:] != -100).sum())
        total, n = total + float(loss) * count, n + count
    got = language_model_loss(model, batches, LAYER, IDENTITY)
    assert got.n_predictions == n
    # The same logits; a log softmax over V and a mean over a batch, either in fp32.
    budget = gamma(len(VOCABULARY) + 3 * CONTEXT, torch.float32)
    assert got.clean_loss == pytest.approx(total / n, rel=budget)


def test_a_perfect_and_a_useless_sae(model: Any, batches: list[TokenBatch]) -> None:
    perfect = language_model_loss(model, batches, LAYER, IDENTITY)
    assert perfect.spliced_loss == perfect.clean_loss
    assert perfect.kl == 0
    assert perfect.loss_recovered == perfect.loss_recovered_from_mean == 1
    useless = language_model_loss(model, batches, LAYER, ZEROS)
    assert useless.spliced_loss == useless.zero_loss != useless.clean_loss
    assert useless.loss_recovered == 0
    assert useless.kl > 0


@pytest.mark.parametrize("keep_first", [False, True])
def test_losses_are_those_of_single_sequences(batches: list[TokenBatch], keep_first: bool) -> None:
    def bent(x: Tensor) -> Tensor:
        return 0.5 * x.sin()

    model = gpt2().double()
    given = [batch.keeping_first() for batch in batches] if keep_first else batches
    got = language_model_loss(model, given, LAYER, sae_of(bent))
    sequences = [ids for ids in _sequences(batches) if len(ids) > 1]
    rows: list[Tensor] = []

    def collect(x: Tensor) -> Tensor:
        rows.append(x.flatten(0, 1))
        return x

    want = {"clean_loss": _direct(sequences, lambda x: x)[0]}
    want["spliced_loss"] = _direct(sequences, bent, keep_first)[0]
    want["zero_loss"] = _direct(sequences, torch.zeros_like, keep_first)[0]
    # The mean is over all replaced tokens, those that predict nothing among them.
    _direct([ids for ids in _sequences(batches) if len(ids)], collect, keep_first)
    mean = torch.cat(rows).mean(0)
    want["mean_loss"], n = _direct(sequences, lambda x: mean.expand(x.shape), keep_first)
    assert got.n_predictions == n
    # fp64 throughout, three blocks of a few hundred roundings that padding may order otherwise.
    for name, value in want.items():
        assert getattr(got, name) == pytest.approx(value, rel=1e-11), name


def test_kl_is_its_definition(batches: list[TokenBatch]) -> None:
    model, bent = gpt2().double(), lambda x: 0.5 * x
    got = language_model_loss(model, batches, LAYER, sae_of(bent)).kl
    other = gpt2().double()
    other.transformer.h[1] = Replaced(other.transformer.h[1], bent)
    total, n = 0.0, 0
    with torch.no_grad():
        for ids in _sequences(batches):
            p, q = (m(input_ids=ids[None]).logits[0, :-1].softmax(-1) for m in (model, other))
            total += float((p * (p / q).log()).sum())
            n += len(p)
    assert got == pytest.approx(total / n, rel=1e-11)


SAES: list[SparseAutoencoder] = [
    TopKSAE(TopKConfig(D, 32, k=4)),
    ReLUSAE(ReLUConfig(D, 32)),
    BatchTopKSAE(BatchTopKConfig(D, 32, k=3)),
]


@pytest.mark.full
@pytest.mark.parametrize("sae", SAES, ids=lambda sae: type(sae).__name__)
def test_how_tokens_are_batched_does_not_matter(
    batches: list[TokenBatch], sae: SparseAutoencoder
) -> None:
    """An SAE runs in evaluation mode, where a token's codes are its own."""
    model, sae = gpt2().double(), sae.double().train()
    single = [TokenBatch.of(ids[None]) for ids in _sequences(batches)]
    together, apart = (language_model_loss(model, b, LAYER, sae) for b in (batches, single))
    assert sae.training
    assert together.n_predictions == apart.n_predictions
    for name, value in apart.scalars().items():
        # fp64; a ratio of differences of losses is the least exact.
        assert together.scalars()[name] == pytest.approx(value, rel=1e-10), name


def test_the_model_stays_as_it_was(batches: list[TokenBatch]) -> None:
    model = gpt2().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen: list[int] = []
    first = language_model_loss(model, iter(batches), LAYER, ZEROS, progress=seen.append)
    assert sum(seen) == 2 * len(batches)
    assert first == language_model_loss(model, batches, LAYER, ZEROS), "no dropout"
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_where_an_ablation_loses_nothing_nothing_is_recovered() -> None:
    loss = LanguageModelLoss(7, 2.0, 2.5, zero_loss=2.0, mean_loss=3.0, kl=0.1)
    assert math.isnan(loss.loss_recovered)
    assert loss.loss_recovered_from_mean == 0.5
    assert loss.scalars().keys() == {
        "n_predictions",
        "clean_loss",
        "spliced_loss",
        "zero_loss",
        "mean_loss",
        "kl",
        "loss_recovered",
        "loss_recovered_from_mean",
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer": "h.9"}, ModelError, "nearest"),
        ({"sae": TopKSAE(TopKConfig(9, 32, 4))}, ValueError, "what the SAE reads, 9, got 16"),
        ({"sae": sae_of(lambda x: x[:, 1:])}, ValueError, "expected a replacement"),
        (
            {"sae": TopKSAE(TopKConfig(D, 32, 4, d_out=D, subtract_b_dec=False))},
            ValueError,
            "got a transcoder",
        ),
        ({"batches": []}, ValueError, "at least one token with another before it, got none"),
        ({"batches": [torch.tensor([[3], [4]])]}, ValueError, "got none"),
        ({"batches": [torch.tensor([3, 4])]}, ValueError, r"token ids \[B, S\]"),
    ],
)
def test_refusals(
    model: Any, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    given = {"batches": [torch.tensor([[3, 4]])], "layer": LAYER, "sae": IDENTITY}
    with pytest.raises(error, match=message):
        language_model_loss(model, **given | changes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context_length": 21}, "from 1 to 20 for this model, got 21"),
        ({"batch_size": 0}, "batch_size and max_tokens of at least 1"),
        ({"max_tokens": 0}, "batch_size and max_tokens of at least 1"),
    ],
)
def test_options_that_do_not_fit(model: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        token_batches(model, tokenizer(), ["the cat"], **{"context_length": 10} | options)
