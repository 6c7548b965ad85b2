"""Cross-layer transcoders and causal crosscoders: who reads and writes which layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.codes import SparseCodes
from sae_kernels.nn import (
    CrossLayer,
    CrossLayerBatchTopK,
    CrossLayerBatchTopKConfig,
    CrossLayerBatchTopKObjective,
    CrossLayerConfig,
    CrossLayerJumpReLU,
    CrossLayerJumpReLUConfig,
    CrossLayerTopK,
    CrossLayerTopKConfig,
    CrossLayerTopKObjective,
    SparseAutoencoder,
    TopKConfig,
    TopKSAE,
    build,
)
from sae_kernels.nn.cross_layer import side_by_side
from sae_kernels.step import AutogradStep, FusedStep
from tests.step.cross_layer import rows_of, whole

if TYPE_CHECKING:
    from pathlib import Path

D, D_OUT, L, EACH, B = 7, 5, 3, 12, 20
CAUSALITIES = ("weak", "strict", "none")
KINDS: dict[str, tuple[type[CrossLayerConfig], dict[str, Any]]] = {
    "topk": (CrossLayerTopKConfig, {"k": 3}),
    "together": (CrossLayerTopKConfig, {"k": 3, "layers_together": True}),
    "batchtopk": (CrossLayerBatchTopKConfig, {"k": 2.6}),
    "apart": (CrossLayerBatchTopKConfig, {"k": 2.6, "layers_together": False}),
    "jumprelu": (CrossLayerJumpReLUConfig, {"threshold_init": 0.4}),
}
kinds = pytest.mark.parametrize("kind", KINDS)
causalities = pytest.mark.parametrize("causality", CAUSALITIES)


def _config(kind: str, causality: str = "weak", **options: Any) -> Any:
    cls, own = KINDS[kind]
    n = (L - 1 if causality == "strict" else L) * EACH
    given = {"d_in": D, "n_latents": n, "n_layers": L, "d_out": D_OUT, "causality": causality}
    return cls.from_dict({**given, **own, **options})


def _clt(kind: str, causality: str = "weak", **options: Any) -> Any:
    clt = build(_config(kind, causality, **options))
    assert isinstance(clt, CrossLayer)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in (clt.W_dec, clt.b_dec, clt.b_enc):
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=g))
    return clt


def _x(n: int = B, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, L * D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "together"])
@causalities
def test_a_layer_moves_only_what_its_latents_write_to(kind: str, causality: str) -> None:
    """Of layers that share one k all codes move."""
    clt = _clt(kind, causality).eval()
    if hasattr(clt, "threshold"):
        clt.threshold.fill_(0.5)
    x, codes = _x(), clt.encode(_x())
    before = clt.decode(codes).view(B, L, D_OUT)
    for layer in range(L):
        moved = x.view(B, L, D).clone()
        moved[:, layer] += 3.0
        after = clt(moved.flatten(1)).x_hat.view(B, L, D_OUT)
        changed = (after != before).any(2).any(0).tolist()
        expected = {
            "weak": [target >= layer for target in range(L)],
            "strict": [target > layer for target in range(L)],
            "none": [True] * L,
        }[causality]
        assert changed == expected, layer


@causalities
def test_it_is_a_plain_sae_of_matrices_with_zeros(causality: str) -> None:
    """With the k of all layers together it is a TopK crosscoder whose masked numbers are 0."""
    clt = _clt("together", causality, rank_by_decoder_norm=True)
    config = clt.config
    plain = TopKSAE(
        TopKConfig(
            L * D,
            config.n_latents,
            config.k * config.n_sources,
            d_out=L * D_OUT,
            subtract_b_dec=False,
            unit_norm_decoder=False,
            rank_by_decoder_norm=True,
        )
    )
    with torch.no_grad():
        plain.W_enc.copy_(whole(config, "W_enc", clt.W_enc))
        plain.W_dec.copy_(whole(config, "W_dec", clt.W_dec))
        plain.b_enc.copy_(clt.b_enc)
        plain.b_dec.copy_(clt.b_dec)
    codes, expected = clt.encode(_x()), plain.encode(_x())
    assert torch.equal(codes.indices, expected.indices)
    torch.testing.assert_close(codes.values, expected.values)
    torch.testing.assert_close(clt.decode(codes), plain.decode(expected))
    assert torch.equal(clt.decoder_rows(), plain.W_dec)
    assert torch.equal(rows_of(config, "W_dec", clt.decoder_rows()), clt.W_dec)
    norms = plain.W_dec.unflatten(1, (L, -1)).norm(dim=2)
    torch.testing.assert_close(clt.decoder_norms(), norms)
    torch.testing.assert_close(clt.products(_x()[0]), plain.W_enc @ _x()[0])


def test_each_layer_keeps_its_own_number() -> None:
    for kind in ("topk", "together", "batchtopk", "apart"):
        clt = _clt(kind).train()
        codes = clt.encode(_x())
        kept = torch.bincount(codes.indices[codes.values != 0] // EACH, minlength=L)
        total = int(clt.config.k * L * B)
        if kind == "apart":
            assert kept.tolist() == [int(clt.config.k * B)] * L
        elif kind == "topk":
            assert (codes.indices // EACH).tolist() == [[0] * 3 + [1] * 3 + [2] * 3] * B
        else:
            assert total - B * L < int(kept.sum()) <= total
        if kind == "batchtopk":
            assert int(kept.sum()) == total


@pytest.mark.parametrize("together", [False, True])
def test_the_largest_magnitudes_are_kept(together: bool) -> None:
    clt = _clt("topk", relu="none", by_magnitude=True, layers_together=together)
    h = torch.stack([clt.products(row) + clt.b_enc for row in _x()])
    groups = h if together else h.view(B * L, EACH)
    expected = groups.abs().topk(clt.config.k * (L if together else 1)).values.view(B, -1)
    values = clt.encode(_x()).values
    assert (values < 0).any()
    torch.testing.assert_close(values.abs(), expected)


def test_the_batch_keeps_the_largest_of_all_layers() -> None:
    clt = _clt("batchtopk").train()
    for seed in range(4):  # the first without a guess, the others with the last one's
        x = _x(seed=seed)
        h = torch.stack([clt.products(row) + clt.b_enc for row in x])
        count = int(clt.config.k * L * B)
        smallest = h.flatten().topk(count).values[-1]
        codes = clt.encode(x)
        kept = codes.values[codes.values != 0]
        assert kept.numel() == count
        torch.testing.assert_close(kept.min(), smallest)
        clt.after_step_(torch.tensor(True))


def test_thresholds_are_each_layers_own() -> None:
    clt = _clt("apart")
    step = FusedStep(clt)
    for seed in range(3):
        step(_x(seed=seed), lr=1e-3, target=torch.randn(B, L * D_OUT))
    assert clt.threshold.shape == (L,)
    assert (clt.threshold > 0).all()
    assert len(clt.threshold.unique()) == L
    codes = clt.eval().encode(_x())
    assert (codes.values > clt.threshold[(codes.indices // EACH).long()].float()).all()


@pytest.mark.parametrize("route", [FusedStep, AutogradStep])
def test_thresholds_of_layers_need_the_whole_batch(route: Any) -> None:
    step = route(_clt("apart"))
    with pytest.raises(ValueError, match="micro_batch_size: expected None with layers_together"):
        step(_x().split(7), lr=1e-3, target=torch.randn(B, L * D_OUT).split(7))


@kinds
def test_saved_and_loaded_is_the_same(kind: str, tmp_path: Path) -> None:
    clt = _clt(kind, activation_scale=0.7, target_scale=1.3).eval()
    if hasattr(clt, "threshold"):
        clt.threshold.fill_(0.5)
    clt.save_pretrained(tmp_path)
    loaded = SparseAutoencoder.from_pretrained(tmp_path)
    assert type(loaded) is type(clt)
    assert loaded.config.activation_scale == 1
    torch.testing.assert_close(loaded(_x()).x_hat, clt(_x()).x_hat)


@kinds
def test_any_batch_shape(kind: str) -> None:
    clt = _clt(kind).eval()
    if hasattr(clt, "threshold"):
        clt.threshold.fill_(0.5)
    x = _x(24)
    output, flat = clt(x.view(2, 3, 4, -1)), clt(x)
    assert output.codes.batch_shape == (2, 3, 4)
    assert torch.equal(output.x_hat, flat.x_hat.view(2, 3, 4, -1))
    assert clt(x[:0]).x_hat.shape == (0, L * D_OUT)


@causalities
def test_no_row_is_stored_that_causality_forbids(causality: str) -> None:
    clt = _clt("topk", causality)
    pairs = {"weak": 6, "strict": 3, "none": 9}[causality]  # of L = 3
    assert clt.W_dec.shape == (pairs * EACH, D_OUT)
    assert (clt.decoder_norms() > 0).sum() == pairs * EACH
    assert ((clt.decoder_norms() > 0).sum(1) > 0).all()


def test_joined_codes_are_in_the_order_of_tokens_and_parts() -> None:
    dense = [torch.randn(4, 3).relu(), torch.zeros(4, 2), torch.randn(4, 5).relu()]
    parts = []
    for d in dense:
        offsets = torch.nn.functional.pad((d > 0).sum(1).cumsum(0), (1, 0)).to(torch.int32)
        tokens, latents = d.nonzero(as_tuple=True)
        parts.append(SparseCodes(d[tokens, latents], latents.int(), d.shape[1], offsets))
    joined = side_by_side(parts)
    assert torch.equal(joined.to_dense(), torch.cat(dense, 1))
    latents = joined.indices.split(
        joined.offsets.diff().tolist() if joined.offsets is not None else 1
    )
    assert all(torch.equal(each, each.sort().values) for each in latents)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_layers": 1}, "n_layers: expected at least 2 layers to read and write, got 1"),
        ({"n_layers": 1, "causality": "strict"}, "n_layers: expected at least 2 layers"),
        ({"n_latents": 35}, "n_latents: expected as many for each of the 3 layers that latents"),
        ({"causality": "strict", "n_latents": 35}, "each of the 2 layers .* each has a layer to"),
        ({"k": 13}, "k: expected at most 12, the latents of one of 3 layers, got 13"),
        ({"groups": (6, 30)}, "groups: expected none in a cross-layer architecture"),
        ({"subtract_b_dec": True, "d_out": None}, "subtract_b_dec: expected false"),
        ({"skip": True}, "skip: expected false in a cross-layer architecture, got True"),
        ({"causality": "sideways"}, "causality: expected one of weak, strict, none"),
    ],
)
def test_what_does_not_go_together_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CrossLayerTopKConfig.from_dict(
            {"d_in": D, "n_latents": L * EACH, "n_layers": L, "d_out": D_OUT, "k": 3, **options}
        )


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (CrossLayerTopKObjective(auxk_alpha=0.1), "auxk_alpha: expected 0"),
        (CrossLayerTopKObjective(random_prefixes=2), "random_prefixes: expected 0"),
        (CrossLayerTopKObjective(multi_topk=True), "multi_topk: expected False"),
    ],
)
def test_objectives_of_whole_tokens_are_refused(objective: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        FusedStep(_clt("topk"), objective)


def test_tokens_of_other_layers_are_refused() -> None:
    clt = _clt("topk")
    with pytest.raises(ValueError, match=r"x: expected shape \[..., 21\]"):
        clt.encode(torch.zeros(3, 2 * D))
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 21\] .* 3 layers of d_in = 7"):
        FusedStep(clt)(torch.zeros(3, 2 * D), lr=1e-3)
    with pytest.raises(ValueError, match=r"target: expected shape \[3, 15\]"):
        FusedStep(_clt("topk"))(torch.zeros(3, L * D), lr=1e-3, target=torch.zeros(3, 10))


def test_classes_and_objectives_belong_together() -> None:
    for sae in (CrossLayerTopK, CrossLayerBatchTopK, CrossLayerJumpReLU):
        small = {} if sae is CrossLayerJumpReLU else {"k": 4}
        config: Any = sae.config_class(D, L * EACH, n_layers=L, **small)
        step = FusedStep(sae(config))
        step(_x(), lr=1e-3)
        assert config.transcodes is False
    with pytest.raises(TypeError, match="expected a CrossLayerTopKObjective"):
        FusedStep(_clt("topk"), CrossLayerBatchTopKObjective())
