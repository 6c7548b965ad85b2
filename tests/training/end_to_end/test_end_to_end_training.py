"""Training through a language model: what it learns, what it leaves, where it starts."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from sae_kernels.config import TrainConfig
from sae_kernels.config.toml import read_tables
from sae_kernels.errors import ModelError, NonFiniteError
from sae_kernels.harvest import TokenBatch
from sae_kernels.nn import (
    BatchTopKConfig,
    BatchTopKSAE,
    GatedConfig,
    GatedSAE,
    JumpReLUConfig,
    JumpReLUSAE,
    ReLUConfig,
    TopKConfig,
    TopKSAE,
    build,
    geometric_median,
)
from sae_kernels.testing import assert_bitwise
from sae_kernels.training.end_to_end import (
    EndToEnd,
    end_to_end_loss,
    prepare_end_to_end,
    train_end_to_end,
)
from sae_kernels.training.end_to_end.layer import layer_width
from tests.harvest.causal import D, gpt2
from tests.settings import settings

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.nn import SAEConfig
    from sae_kernels.training import TrainingResult

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

F, K, V, LAYER, LATER = 48, 4, 15, "h.0", ("h.1", "h.2")
ALL = EndToEnd(0.7, 1.3, 0.4, downstream_layers=LATER)
KEYS = {"step", "tokens", "loss", "kl", "downstream", "fvu", "l0", "sparsity", "aux_loss"} | {
    "dead_fraction",
    "lr",
    "k",
    "skipped",
    "tokens_per_second",
}


def _sae() -> TopKSAE:
    return TopKSAE(TopKConfig(D, F, K))


def _ids(batch: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(V, (batch, length), generator=torch.Generator().manual_seed(seed))


def _train(sae_config: SAEConfig, **changes: Any) -> TrainingResult:
    """From its own start, on a hundred sequences."""
    given = {"lr": 1e-2, "compute": "float32", "sparsity_warmup_steps": 0, **changes}
    config = settings(sae_config, **given)
    batches = [_ids(20, 12, seed) for seed in range(5)]
    sae = prepare_end_to_end(gpt2(), batches, LAYER, sae_config, config)
    return train_end_to_end(gpt2(), batches, LAYER, sae, config)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_training_lowers_the_loss_and_leaves_the_model(kind: str) -> None:
    model = gpt2().train()
    model.transformer.wpe.weight.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sae = _sae() if kind == "topk" else BatchTopKSAE(BatchTopKConfig(D, F, k=K)).eval()
    mode = sae.training
    config = settings(sae, steps=30, lr=1e-2, clip_norm=1.0, log_every=7)
    seen: list[tuple[int, bool]] = []
    result = train_end_to_end(
        model,
        (_ids(8, 12, seed=i) for i in range(40)),
        LAYER,
        sae,
        config,
        ALL,
        on_step=lambda step, line: seen.append((step, line is not None)),
    )
    lines = result.metrics
    assert [line["step"] for line in lines] == [7, 14, 21, 28, 30]
    assert [step + 1 for step, logged in seen if logged] == [line["step"] for line in lines]
    assert len(seen) == 30
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"]
    assert lines[-1]["kl"] < 0.7 * lines[0]["kl"]
    assert lines[-1]["tokens"] == 30 * 8 * 12
    assert lines[-1]["l0"] <= K
    assert lines[0].keys() == KEYS
    assert result.sae is sae
    # Normalised at the end of each step: two roundings of the norm.
    assert (sae.W_dec.norm(dim=1) - 1).abs().max() < 2**-20
    assert sae.training is mode
    if isinstance(sae, BatchTopKSAE):
        assert sae.threshold > 0
    assert model.training
    assert not model.transformer.wpe.weight.requires_grad
    assert model.transformer.wte.weight.requires_grad
    for name, tensor in model.state_dict().items():
        assert_bitwise(name, tensor, before[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.full
def test_a_penalty_makes_codes_sparse() -> None:
    free = _train(ReLUConfig(D, F), steps=60)
    held = _train(ReLUConfig(D, F), steps=60, sparsity="l1", sparsity_coefficient=0.02)
    assert free.metrics[-1]["sparsity"] == 0
    assert held.metrics[-1]["sparsity"] > 0
    assert held.metrics[-1]["l0"] < 0.7 * free.metrics[-1]["l0"]


@pytest.mark.full
def test_jumprelu_thresholds_move_l0_to_the_target() -> None:
    penalty = {"sparsity": "target_l0", "target_l0": 5.0, "sparsity_coefficient": 0.3}
    config = JumpReLUConfig(D, F, threshold_init=0.3, bandwidth=0.2)
    result = _train(config, steps=100, **penalty)
    assert isinstance(result.sae, JumpReLUSAE)
    first, last = result.metrics[0], result.metrics[-1]
    assert abs(last["l0"] - 5) < 0.5 * abs(first["l0"] - 5)
    moved = (result.sae.thresholds() - 0.3).abs()
    assert (moved > 1e-3).float().mean() > 0.5
    # The penalty is reported as it counts.
    assert last["sparsity"] == pytest.approx(0.3 * (last["l0"] / 5 - 1) ** 2, rel=1e-5)


def test_a_gate_learns() -> None:
    result = _train(GatedConfig(D, F), steps=40, sparsity="l1", sparsity_coefficient=0.01)
    assert isinstance(result.sae, GatedSAE)
    assert (result.sae.b_enc.abs() > 1e-3).float().mean() > 0.5
    assert result.metrics[-1]["kl"] < 0.7 * result.metrics[0]["kl"]


def test_latents_that_no_longer_fire_are_counted_and_revived() -> None:
    """With 240 tokens a step a latent is dead once it has missed one step."""
    result = _train(TopKConfig(D, F, k=1), steps=20, dead_after_tokens=240)
    assert result.metrics[-1]["dead_fraction"] == pytest.approx(float(result.dead.float().mean()))
    assert 0 < result.dead.sum() < F
    assert result.metrics[-1]["aux_loss"] > 0


def test_k_can_fall_to_its_end() -> None:
    lines = _train(TopKConfig(D, F, k=2), steps=10, k_start=8, k_anneal_steps=6, log_every=1)
    assert [line["k"] for line in lines.metrics] == [8, 7, 6, 5, 4, 3, 2, 2, 2, 2]
    assert lines.metrics[0]["l0"] > 5


def test_a_list_is_gone_through_again_and_an_iterator_is_not() -> None:
    sae = _sae()
    before = sae.W_enc.detach().clone()
    config = TrainConfig(steps=5, log_every=5)
    batches = [_ids(2, 4), _ids(1, 1), _ids(3, 4)]  # one token has no variance: passed over
    with pytest.raises(ValueError, match=r"each of the 5 steps, got 2; lower steps"):
        train_end_to_end(gpt2(), iter(batches), LAYER, sae, config)
    assert not torch.equal(before, sae.W_enc)
    (line,) = train_end_to_end(gpt2(), batches, LAYER, sae, config).metrics
    assert line["tokens"] == 8 + 12 + 8 + 12 + 8
    with pytest.raises(ValueError, match="each of the 5 steps, got 0"):
        train_end_to_end(gpt2(), [], LAYER, sae, config)
    kept = TokenBatch.of(_ids(5, 1)).keeping_first()
    with pytest.raises(ValueError, match="each of the 5 steps, got 0"):
        train_end_to_end(gpt2(), [kept], LAYER, sae, config)


def test_a_loss_that_is_not_finite_stops_or_is_skipped() -> None:
    sae, batches = _sae(), [_ids(2, 4)] * 3
    with torch.no_grad():
        sae.W_dec[:, 0] = math.nan
    before = {name: p.detach().clone() for name, p in sae.named_parameters()}
    with pytest.raises(NonFiniteError, match="step 1: expected a finite loss"):
        train_end_to_end(gpt2(), batches, LAYER, sae, TrainConfig(steps=3))
    config = TrainConfig(steps=3, on_nonfinite="skip")
    result = train_end_to_end(gpt2(), batches, LAYER, sae, config)
    assert result.skipped == result.metrics[-1]["skipped"] == 3
    for name, p in sae.named_parameters():
        assert_bitwise(name, p.data, before[name])


def test_the_folder_of_a_run(tmp_path: Path) -> None:
    config = TrainConfig(steps=4, log_every=2)
    result = train_end_to_end(
        gpt2(),
        [_ids(3, 5)],
        LAYER,
        _sae(),
        config,
        ALL,
        folder=tmp_path / "run",
        metadata={"context_length": 5},
    )
    used = read_tables(tmp_path / "run" / "run.toml")
    assert used["sae"]["k"] == K
    assert used["train"]["steps"] == 4
    assert used["end_to_end"]["layer"] == LAYER
    assert used["end_to_end"]["downstream_layers"] == list(LATER)
    assert used["end_to_end"]["context_length"] == 5
    written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in written] == result.metrics
    saved = TopKSAE.from_pretrained(tmp_path / "run" / "sae")
    assert_bitwise("W_dec", saved.W_dec.data, result.sae.W_dec.data)


@pytest.mark.parametrize("keep_first", [False, True])
def test_a_fresh_sae_fits_the_layer(keep_first: bool) -> None:
    ids = _ids(4, 6)
    mask = torch.arange(6) < torch.tensor([6, 3, 1, 5])[:, None]
    batches = [TokenBatch(ids[i : i + 2], mask[i : i + 2], mask[i : i + 2]) for i in (0, 2)]
    if keep_first:
        batches = [batch.keeping_first() for batch in batches]
    model = gpt2()
    config = settings(TopKConfig, compute="float32")
    sae = prepare_end_to_end(model, batches, LAYER, TopKConfig(D, F, K), config)
    # Attention goes one way, so what pads a sequence does not reach its tokens.
    states = model.transformer(ids, output_hidden_states=True).hidden_states[1].detach()
    kept = mask & (torch.arange(6) > 0) if keep_first else mask
    x = states[kept]
    scale = D**0.5 / float(x.norm(dim=1).mean())
    assert sae.config.activation_scale == pytest.approx(scale, rel=2**-18)
    torch.testing.assert_close(
        sae.b_dec.detach(), geometric_median(x) * scale, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="at least one token to replace, got none"):
        prepare_end_to_end(model, [], LAYER, TopKConfig(D, F, K), config)
    with pytest.raises(ValueError, match=f"d_in: expected {D}, the width of the activations"):
        prepare_end_to_end(model, batches, LAYER, TopKConfig(D + 1, F, K), config)


@pytest.mark.parametrize("once", [False, True], ids=["list", "generator"])
def test_a_fresh_sae_fits_text_from_everywhere(once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text sorted by word; of a generator, which is read once, the start alone is at hand."""
    from sae_kernels.training.end_to_end import layer as module

    monkeypatch.setattr(module, "SAMPLE", 16)
    model = gpt2()
    words = list(range(2, 14))
    batches = [torch.full((2, 4), word) for word in words for _ in range(3)]
    config = settings(TopKConfig, init_b_dec="mean", normalize_activations="none")
    given = iter(batches) if once else batches
    sae = prepare_end_to_end(model, given, "wte", TopKConfig(D, F, K), config)
    table = model.transformer.wte.weight.detach()
    weights = torch.linalg.lstsq(table[words].T, sae.b_dec.detach()[:, None]).solution.flatten()
    if once:  # two batches of eight tokens
        assert weights.tolist() == pytest.approx([1.0] + [0.0] * 11, abs=1e-3)
    else:  # 64 tokens at most are run: every fourth or eighth batch, more evenly than at random
        assert int((weights > 0.01).sum()) >= 5


def test_a_norm_above_the_bound_stays_the_models_own() -> None:
    model = gpt2()
    model.transformer.wte.weight.data[7] *= 300
    ids = _ids(4, 6)
    ids[:, 3] = 7
    config = settings(TopKConfig, compute="float32")
    sae = prepare_end_to_end(model, [ids], "wte", TopKConfig(D, F, K), config)
    (bound,) = sae.metadata["activations"]["max_norm"]
    norms = model.transformer.wte.weight.detach().norm(dim=1)
    assert float(norms[7]) > bound > float(norms[torch.arange(V) != 7].max())
    # The loss is that of a batch which says the same by its positions.
    batch = TokenBatch.of(ids)
    by_hand = batch._replace(replaced=batch.replaced & (ids != 7))
    got = end_to_end_loss(model, ids, "wte", sae)
    sae.metadata.clear()
    want = end_to_end_loss(model, by_hand, "wte", sae)
    assert float(got.loss.detach()) == pytest.approx(float(want.loss.detach()))
    assert float(got.fvu) == pytest.approx(float(want.fvu))
    assert float(end_to_end_loss(model, ids, "wte", sae).fvu) != pytest.approx(float(want.fvu))


def test_the_width_of_a_layer() -> None:
    model = gpt2()
    assert layer_width(model, "transformer.h.2") == D
    assert layer_width(model, "lm_head") == V
    with pytest.raises(ValueError, match=r"run after h\.1, got h\.0"):
        layer_width(model, "h.1", EndToEnd(downstream_layers=("h.0",)))
    model.spare = torch.nn.Linear(D, D)
    with pytest.raises(ModelError, match="spare: expected a layer that runs"):
        layer_width(model, "spare")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model": None}, ValueError, "needs the model that the SAE sits in, got None"),
        ({"layer": "h.7"}, ModelError, "nearest: "),
        ({"sae": TopKSAE(TopKConfig(D + 1, F, K))}, ValueError, "the SAE reads, 17, got 16"),
        (
            {"config": settings(TopKConfig, adam="lazy")},
            ValueError,
            "adam: expected 'dense' with route",
        ),
        (
            {"config": settings(TopKConfig, moment_dtype="bfloat16")},
            ValueError,
            "moment_dtype: expected 'float32'",
        ),
        (
            {"config": settings(ReLUConfig, fix_shrinkage=True)},
            ValueError,
            "fix_shrinkage: expected false",
        ),
        (
            {"config": settings(TopKConfig, multi_topk=True)},
            ValueError,
            "reconstruction_coefficient: exp",
        ),
        ({"config": settings(ReLUConfig)}, TypeError, "expected a TopKObjective"),
        ({"weights": EndToEnd(downstream_layers=("h.0",))}, ValueError, r"run after h\.0"),
    ],
    ids=[
        "model",
        "layer",
        "width",
        "adam",
        "moments",
        "shrinkage",
        "multi",
        "objective",
        "downstream",
    ],
)
def test_what_cannot_be_trained_leaves_no_folder(
    changes: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    sae = ReLUConfig(D, F) if "shrinkage" in message else TopKConfig(D, F, K)
    given = {"model": gpt2(), "batches": [_ids(2, 3)], "layer": LAYER, "config": TrainConfig()}
    given |= {"sae": build(sae), "weights": None}
    with pytest.raises(error, match=message):
        train_end_to_end(**given | changes, folder=tmp_path / "run")
    assert not (tmp_path / "run").exists()
