"""Every preset, end to end: built, trained by the library, saved, read again, the same SAE."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config import OptimizerConfig, TrainConfig
from sae_kernels.data import JointRows
from sae_kernels.nn import SAEConfig, SparseAutoencoder, nested_groups, preset, presets
from sae_kernels.runs.metrics import read_metrics
from sae_kernels.testing import assert_bitwise, assert_within, rounding
from sae_kernels.training import RunConfig, evaluate, prepare, train
from tests.step.harness import tokens

if TYPE_CHECKING:
    from pathlib import Path

D, D_OUT, F, N = 12, 9, 64, 300
PRESETS = presets()
CROSSCODERS = ("crosscoder", "crosscoder_relu", "causal_crosscoder")
TRANSCODERS = ("transcoder", "skip_transcoder")
ACROSS_LAYERS = tuple(name for name in PRESETS if name.endswith("clt"))


def configs(name: str, **changes: Any) -> tuple[SAEConfig, TrainConfig]:
    """What a user of the library writes."""
    kind, chosen = preset(name)
    settings: dict[str, Any] = {"d_in": D, "n_latents": F, **chosen.sae}
    if hasattr(kind.config_class, "k"):
        settings["k"] = 6
    if "groups" in settings:
        settings["groups"] = nested_groups(F, settings["groups"])
    if name in TRANSCODERS:
        settings["d_out"] = D_OUT
    if name in ACROSS_LAYERS:
        settings["d_out"] = D
    if name in CROSSCODERS + ACROSS_LAYERS:
        settings["n_layers"] = 2
    plain = {"steps": 3, "batch_size": 50, "lr": 1e-3, "warmup_steps": 0, "compute": "float32"}
    own = {**chosen.objective, **chosen.optimizer}
    config = TrainConfig.of(kind.objective_class, **{**own, **plain, **changes})
    return kind.config_class(**settings), config


def data(name: str) -> dict[str, Any]:
    """Sources for train and evaluate."""
    x = tokens(N, d_in=D, n_features=30)
    layers = JointRows([x, 3 * x.roll(1, dims=1)])
    if name in ACROSS_LAYERS:
        return {"source": layers, "target": torch.cat([x.cos(), x.sin()], 1)}
    if name in CROSSCODERS:
        return {"source": layers}
    if name in TRANSCODERS:
        return {"source": x, "target": x[:, :D_OUT].cos()}
    return {"source": x}


@pytest.mark.parametrize("route", ["fused", pytest.param("autograd", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PRESETS)
def test_it_trains_is_saved_and_read_again(name: str, route: str, tmp_path: Path) -> None:
    sae_config, config = configs(name, route=route, log_every=1)
    result = train(**data(name), sae=sae_config, config=config, folder=tmp_path)
    assert type(result.sae) is PRESETS[name].sae
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(line["loss"] > 0 and line["l0"] > 0 for line in lines)
    assert ("k" in lines[0]) == hasattr(sae_config, "k")
    written = RunConfig.read(tmp_path / "run.toml")
    assert (written.sae, written.train) == (sae_config, config)

    ours, saved = result.sae.eval(), SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert type(saved) is type(ours)
    assert (saved.config.activation_scale, saved.config.target_scale) == (1, 1)
    folded = ours.folded()
    x = data(name)["source"]
    x = x.rows(0, 40).activations if isinstance(x, JointRows) else x[:40]
    for other in (folded, saved):
        assert_bitwise("latents", saved.encode(x).indices, other.encode(x).indices)
        assert_bitwise("values", saved.encode(x).values, other.encode(x).values)
        ours_x_hat, x_hat = other(x).x_hat, saved(x).x_hat
        if not ours.config.skip:
            assert_bitwise("x_hat", x_hat, ours_x_hat)
            continue
        # torch's product with what a file holds, at other addresses, may round otherwise.
        # What is added to it is at most |x_hat| and its own terms; two results, each so far off.
        terms = 2 * (x.abs() @ folded.W_skip.detach().abs().T) + x_hat.abs()
        budget = 2 * rounding(x.shape[1] + 1, terms.double(), torch.float32)
        assert_within("x_hat", x_hat, ours_x_hat, budget)
    # In the scale of training the values are others, by that scale, and rounded elsewhere.
    scale = ours.config.activation_scale
    torch.testing.assert_close(
        saved.encode(x).to_dense(), ours.encode(x).to_dense() / scale, rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(saved(x).x_hat, ours(x).x_hat, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_saved_measures_the_same(name: str, tmp_path: Path) -> None:
    sae_config, config = configs(name)
    result = train(**data(name), sae=sae_config, config=config, folder=tmp_path)
    saved = SparseAutoencoder.from_pretrained(tmp_path / "sae")
    ours, theirs = (evaluate(sae, **data(name)) for sae in (result.sae, saved))
    assert theirs.fvu == pytest.approx(ours.fvu, rel=1e-4)
    # A code within rounding of its threshold may be on either side: one of N F.
    assert theirs.l0 == pytest.approx(ours.l0, abs=1 / N)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_it_learns(name: str) -> None:
    """Its own penalty need not hold this little back; a tenth of it does not."""
    sae_config, config = configs(name, steps=150, lr=5e-3, log_every=1, clip_norm=None)
    objective = config.objective
    assert objective is not None
    coefficient = objective.sparsity_coefficient / 10
    objective = dataclasses.replace(objective, sparsity_coefficient=coefficient)
    weaker = dataclasses.replace(config, objective=objective)
    result = train(**data(name), sae=sae_config, config=weaker)
    fvu = [line["fvu"] for line in result.metrics]
    assert sum(fvu[-10:]) < 0.6 * sum(fvu[:10])
    assert result.skipped == 0


@pytest.mark.parametrize("name", ["topk", "jumprelu", "relu_april", "gated"])
def test_a_seed_names_the_run(name: str) -> None:
    sae_config, config = configs(name, steps=10)
    runs = [train(**data(name), sae=sae_config, config=config) for _ in range(2)]
    for n, t in runs[0].sae.state_dict().items():
        assert_bitwise(n, runs[1].sae.state_dict()[n].reshape(-1), t.reshape(-1))


def test_every_preset_says_what_it_is() -> None:
    for name, (kind, chosen) in PRESETS.items():
        assert chosen.about
        assert "\n" not in chosen.about
        assert preset(name) == (kind, chosen)
        fields = {field.name for field in dataclasses.fields(kind.config_class)}
        assert set(chosen.sae) <= fields
        kind.objective_class(**chosen.objective)
        OptimizerConfig(**chosen.optimizer)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("top_k", "topk"), ("gates", "gated"), ("crosscoder_rel", "crosscoder_relu")],
)
def test_a_name_that_is_none_gets_the_nearest(name: str, nearest: str) -> None:
    message = f"arch: expected a preset, got {name!r}; did you mean {nearest!r}?"
    with pytest.raises(ValueError, match=re.escape(message)):
        preset(name)


@pytest.mark.parametrize("n_latents", [5, 16, 31, 64, 100, 4096])
def test_nested_groups_add_up(n_latents: int) -> None:
    groups = nested_groups(n_latents)
    assert sum(groups) == n_latents
    assert min(groups) > 0
    preset("matryoshka").sae.config_class(d_in=2, n_latents=n_latents, k=1, groups=groups)


# -- what goes in ----------------------------------------------------------------------------


def test_a_crosscoder_sees_its_layers_side_by_side() -> None:
    """Each at its own scale: the decoder rows of a layer three times as large are as well."""
    sae_config, config = configs("crosscoder", steps=150, lr=5e-3)
    result = train(**data("crosscoder"), sae=sae_config, config=config)
    norms = result.sae.decoder_norms().detach().mean(0)
    assert float(norms[1] / norms[0]) > 1.5
    measured = evaluate(result.sae, **data("crosscoder"))
    assert measured.fvu < 0.7


@pytest.mark.parametrize("name", TRANSCODERS)
def test_a_transcoder_reconstructs_its_target(name: str) -> None:
    sae_config, config = configs(name, steps=150, lr=5e-3)
    result = train(**data(name), sae=sae_config, config=config)
    x, y = data(name)["source"], data(name)["target"]
    out = result.sae.eval()(x)
    assert out.x_hat.shape == y.shape
    fvu = float((out.x_hat.detach() - y).square().sum() / (y - y.mean(0)).square().sum())
    assert fvu < 0.6
    scales = result.sae.config.activation_scale, result.sae.config.target_scale
    assert scales[0] != scales[1]
    wanted = (D**0.5 / x.norm(dim=1).mean(), D_OUT**0.5 / y.norm(dim=1).mean())
    assert scales == pytest.approx([float(w) for w in wanted], rel=1e-5)


@pytest.mark.parametrize(
    ("name", "sources", "message"),
    [
        ("crosscoder", {"source": torch.ones(60, D)}, "n_layers: expected activations of 2 layers"),
        (
            "transcoder",
            {"source": torch.ones(60, D)},
            f"expected activations of {D} inputs and {D_OUT} targets side by side, got {D} columns",
        ),
        (
            "transcoder",
            {"source": torch.ones(60, D), "target": torch.ones(60, D_OUT + 1)},
            f"expected activations of {D} inputs and {D_OUT} targets side by side",
        ),
        (
            "transcoder",
            {"source": torch.ones(60, D), "target": torch.ones(59, D_OUT)},
            r"sources: expected the same tokens in each, got \[60, 59\] rows",
        ),
        ("topk", {"source": torch.ones(60, D + 1)}, f"d_in: expected {D + 1}, the width of"),
        ("relu", {"source": torch.ones(60, D), "target": torch.ones(60, D)}, "got"),
    ],
)
def test_what_does_not_fit_is_named(name: str, sources: dict[str, Any], message: str) -> None:
    sae_config, config = configs(name)
    with pytest.raises(ValueError, match=message):
        train(**sources, sae=sae_config, config=config)


@pytest.mark.parametrize("name", ["jumprelu", "batchtopk", "skip_transcoder", "crosscoder_relu"])
@pytest.mark.parametrize("init", ["geometric_median", "mean", "zeros"])
def test_b_dec_starts_from_the_targets(name: str, init: str) -> None:
    sae_config, config = configs(name, init_b_dec=init)
    sources = data(name)
    joint = JointRows(list(sources.values())) if "target" in sources else sources["source"]
    sae = prepare(joint, sae_config, config)
    last = joint if isinstance(joint, torch.Tensor) else joint.rows(0, N).activations
    target = last[:, -sae_config.output_width :]
    if init == "zeros":
        assert not sae.b_dec.any()
    elif init == "mean":
        torch.testing.assert_close(sae.b_dec.data, target.mean(0) * sae.target_scale)
    else:
        distances = [
            float((target * sae.target_scale - point).norm(dim=1).sum())
            for point in (sae.b_dec.data, target.mean(0) * sae.target_scale)
        ]
        assert distances[0] < distances[1]
