"""Circuits: edges against a dense Jacobian, the file, the curves and the picture."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from dense_edits import VOCABULARY, D, F, causal_model
from torch import Tensor

from sae_kernels.errors import DataError
from sae_kernels.interventions import (
    Attribution,
    Circuit,
    Node,
    circuit_curves,
    draw_circuit,
    find_circuit,
    strongest,
)
from sae_kernels.nn import TopKSAE

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

LAYERS, B, S = ("h.0", "h.1", "h.2"), 2, 4


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 5] - logits[:, -1, 6]).mean()


@pytest.fixture(scope="module")
def study() -> Attribution:
    saes = {}
    for seed, layer in enumerate(reversed(LAYERS)):  # the order of the model does not depend on it
        sae = TopKSAE(D, F, k=5, activation_scale=2.0, seed=seed).double()
        sae.b_dec.data.normal_(generator=torch.Generator().manual_seed(seed))
        saes[layer] = sae
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (B, S), generator=generator)
    return Attribution(causal_model(), saes, ids, metric)


def test_edges_are_products_with_a_dense_jacobian(study: Attribution) -> None:
    circuit = find_circuit(study, study.effects(), n_nodes=F + 1, n_edges=10**6)
    assert circuit.layers == LAYERS
    below, above = LAYERS[:2]
    sae, upper = study.saes[below], study.saes[above]
    model: Any = study.model
    run = study.record()
    x, grad = run.x[below].detach(), torch.autograd.grad(run.value, run.x[above])[0]

    def parts(z: Tensor) -> tuple[Tensor, Tensor]:
        """Dense codes and error of the layer above as functions of the layer below."""
        out = model.transformer.h[1](z.view(B, S, D))
        out = (out[0] if isinstance(out, tuple) else out).reshape(B * S, D)
        codes = upper.encode(out).to_dense()
        return codes, out - (codes @ upper.W_dec + upper.b_dec) / upper.target_scale

    def jacobian(number: int) -> Tensor:
        return torch.autograd.functional.jacobian(lambda z: parts(z)[number], x).detach()

    own = sae.encode(x).to_dense().detach()
    by_code = grad @ upper.W_dec.T / upper.target_scale
    to_latents = torch.einsum("tf,tfsd->fsd", by_code, jacobian(0))
    to_error = torch.einsum("te,tesd->sd", grad, jacobian(1))
    error = (x - (own @ sae.W_dec + sae.b_dec) / sae.target_scale).detach()
    weights = {(edge.start, edge.end): edge.weight for edge in circuit.edges}
    for end in (node for node in circuit.effects if node.layer == above):
        product = to_error if end.latent is None else to_latents[end.latent]
        expected = -((product @ sae.W_dec.T / sae.target_scale) * own).sum(0)
        got = torch.tensor([weights.get((Node(below, f), end), 0.0) for f in range(F)])
        torch.testing.assert_close(got.double(), expected.detach().double(), rtol=1e-5, atol=1e-9)
        from_error = -float((product.detach() * error).sum())
        assert weights[Node(below, None), end] == pytest.approx(from_error)


def test_edges_out_of_a_node_add_up_to_its_effect(study: Attribution) -> None:
    circuit = find_circuit(study, study.effects(), n_nodes=F + 1, n_edges=10**6)
    for node, effect in circuit.effects.items():
        if node.layer != LAYERS[-1]:
            out = sum(edge.weight for edge in circuit.edges if edge.start == node)
            assert out == pytest.approx(effect, abs=1e-12)


def test_pruning_keeps_the_strongest(study: Attribution) -> None:
    effects = study.effects()
    whole = find_circuit(study, effects, n_nodes=F + 1, n_edges=10**6)
    circuit = find_circuit(study, effects, n_nodes=4, n_edges=7)
    assert len(circuit.effects) == 12
    assert len(circuit.edges) == 7
    for layer in LAYERS:
        own = [node for node in circuit.effects if node.layer == layer]
        assert own == [node for node, _ in strongest({layer: effects[layer]}, 4)]
    among = [e for e in whole.edges if {e.start, e.end} <= set(circuit.effects)]
    assert [e[:2] for e in circuit.edges] == [e[:2] for e in among[:7]]
    assert circuit.clean == pytest.approx(study.without([]))
    assert circuit.ablated == pytest.approx(study.only([]))


def test_a_file_gives_the_circuit_back(study: Attribution, tmp_path: Path) -> None:
    circuit = find_circuit(study, study.effects(), n_nodes=3, n_edges=5)
    circuit.save(tmp_path / "circuit.json")
    assert Circuit.load(tmp_path / "circuit.json") == circuit
    json.loads((tmp_path / "circuit.json").read_text())
    for wrong in ({}, {"layers": [], "nodes": [{}], "edges": []}):
        (tmp_path / "wrong.json").write_text(json.dumps(wrong))
        with pytest.raises(DataError, match="expected a circuit"):
            Circuit.load(tmp_path / "wrong.json")


def test_curves_start_and_end_where_they_must(study: Attribution) -> None:
    effects = study.effects()
    curves = circuit_curves(study, effects, [0, 5, 10**6])
    assert curves.counts == [0, 5, 10**6]
    assert curves.faithfulness[0] == 0
    assert curves.completeness[0] == 1
    ranked = [node for node, _ in strongest(effects, 5)]
    low, high = study.only([]), study.without([])
    assert curves.faithfulness[1] == pytest.approx((study.only(ranked) - low) / (high - low))
    assert curves.completeness[1] == pytest.approx((study.without(ranked) - low) / (high - low))
    # All nodes that are active: the first layer is whole, so all others are as they were.
    assert curves.faithfulness[2] == pytest.approx(1)
    flat = Attribution(study.model, study.saes, study.batch, lambda logits: 0 * logits.sum())
    with pytest.raises(ValueError, match="ablating all layers changes"):
        circuit_curves(flat, effects, [1])
    with pytest.raises(ValueError, match="counts: expected a whole number of at least 0, got -1"):
        circuit_curves(study, effects, [2, -1])
    with pytest.raises(ValueError, match="n_nodes: expected a whole number of at least 1, got 0"):
        find_circuit(study, effects, n_nodes=0)
    with pytest.raises(ValueError, match="n_edges: expected a whole number of at least 0, got -2"):
        find_circuit(study, effects, n_edges=-2)


def test_a_picture_is_drawn(study: Attribution) -> None:
    pytest.importorskip("matplotlib", reason="needs sae-kernels[report]")
    effects = study.effects()
    circuit = find_circuit(study, effects, n_nodes=3, n_edges=5)
    curves = circuit_curves(study, effects, [0, 2, 4])
    first = next(iter(circuit.effects))
    plain = draw_circuit(circuit)
    named = draw_circuit(circuit, {first: "$a name_ that is too long for its place$"}, curves, "m")
    assert plain.png[1:4] == named.png[1:4] == b"PNG"
    assert len(named.png) > len(plain.png)
