"""Sparse feature circuits: the latents that matter to a metric, and the edges between them."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sae_kernels.errors import DataError
from sae_kernels.interventions.attribution import Node, strongest
from sae_kernels.io.files import json_writer, publish, read_json
from sae_kernels.plotting.figure import Drawing, Picture, render
from sae_kernels.plotting.style import BLUE, INK, MUTED, ORANGE
from sae_kernels.plotting.units import number
from sae_kernels.primitives import checks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from torch import Tensor

    from sae_kernels.interventions.attribution import Attribution, Effects

_NAME = 26  # letters of a label


class Edge(NamedTuple):
    """The part of a node's effect that passes through a node of the next layer."""

    start: Node
    end: Node
    weight: float


@dataclasses.dataclass(frozen=True)
class Circuit:
    """Nodes at several layers and the edges between neighbouring ones (arXiv 2403.19647).

    Attributes:
        layers: in the order of the model.
        effects: of each node, see :class:`~sae_kernels.interventions.Effects`.
        edges: from a layer to the next, the strongest first.
        clean: the metric.
        ablated: the metric with everything at the layers ablated.
    """

    layers: tuple[str, ...]
    effects: dict[Node, float]
    edges: tuple[Edge, ...]
    clean: float
    ablated: float

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, which appears whole."""
        numbers = {node: i for i, node in enumerate(self.effects)}
        content = {
            "layers": list(self.layers),
            "clean": self.clean,
            "ablated": self.ablated,
            "nodes": [
                {"layer": node.layer, "latent": node.latent, "effect": effect}
                for node, effect in self.effects.items()
            ],
            "edges": [[numbers[e.start], numbers[e.end], e.weight] for e in self.edges],
        }
        publish(Path(path), json_writer(content))

    @classmethod
    def load(cls, path: str | Path) -> Circuit:
        """Reads what :meth:`save` wrote.

        Raises:
            DataError: a missing file, or one that holds no circuit.
        """
        content = read_json(Path(path), "a circuit")
        try:
            nodes = [Node(str(n["layer"]), n["latent"]) for n in content["nodes"]]
            effects = [float(n["effect"]) for n in content["nodes"]]
            edges = tuple(Edge(nodes[a], nodes[b], float(w)) for a, b, w in content["edges"])
            layers, ends = tuple(content["layers"]), (content["clean"], content["ablated"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise DataError(f"{path}: expected a circuit as save() writes it: {error}") from error
        return cls(layers, dict(zip(nodes, effects, strict=True)), edges, *ends)


class Curves(NamedTuple):
    """How much of a metric circuits of growing size explain.

    0 is the metric with everything at the layers ablated, 1 the whole model's.

    Attributes:
        counts: nodes of each circuit, the strongest of all layers.
        faithfulness: with all but the circuit ablated; 1 for a circuit that is enough.
        completeness: with the circuit ablated; 0 for a circuit that leaves nothing out.
    """

    counts: list[int]
    faithfulness: list[float]
    completeness: list[float]


def find_circuit(
    study: Attribution, effects: Mapping[str, Effects], n_nodes: int = 8, n_edges: int = 40
) -> Circuit:
    """The strongest nodes of each layer and the strongest edges between them.

    An edge's weight is the effect of its start (by gradient times change of the activation) that
    passes through its end: for latent v of a layer and u of the layer before it, ``sum_t
    dm/dv_t dv_t/du_s`` times the change of u_s, summed over u's tokens s. All edges into v are one
    vector-Jacobian product between the two layers, read at kept entries only. The weights of all
    edges out of u, those to pruned nodes and to the error too, add up to its effect.

    Args:
        study: the metric, model and SAEs.
        effects: as ``study.effects()`` gives them, with any number of steps.
        n_nodes: of each layer.
        n_edges: in all.

    Raises:
        ValueError: less than one node, or less than no edge.

    Example:
        >>> import pytest
        >>> from sae_kernels.interventions import Attribution
        >>> from sae_kernels.nn import TopKSAE
        >>> transformers = pytest.importorskip("transformers")
        >>> config = transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=2, n_head=2)
        >>> model = transformers.GPT2LMHeadModel(config)
        >>> saes = {"h.0": TopKSAE(8, 32, k=4), "h.1": TopKSAE(8, 32, k=4)}
        >>> ids = torch.tensor([[1, 2, 3]])
        >>> study = Attribution(model, saes, ids, lambda logits: logits[:, -1, 5].mean())
        >>> circuit = find_circuit(study, study.effects(), n_nodes=3, n_edges=5)
        >>> len(circuit.effects), len(circuit.edges)
        (6, 5)
    """
    checks.count("n_nodes", n_nodes, least=1)
    checks.count("n_edges", n_edges)
    run = study.record()
    layers = tuple(run.x)  # in the order in which they ran
    nodes = {layer: strongest({layer: effects[layer]}, n_nodes) for layer in layers}
    edges: list[Edge] = []
    for before, layer in itertools.pairwise(layers):
        ends = [node for node, _ in nodes[layer]]
        starts = [node for node, _ in nodes[before]]
        for end, weights in zip(ends, _weights(study, run.value, run.x, before, ends), strict=True):
            edges += [Edge(start, end, weights.get(start, 0.0)) for start in starts]
    edges.sort(key=lambda edge: -abs(edge.weight))
    found = {node: effect for layer in layers for node, effect in nodes[layer]}
    value = float(run.value.detach())
    return Circuit(layers, found, tuple(edges[:n_edges]), value, study.only([]))


def _weights(
    study: Attribution, value: Tensor, x: Mapping[str, Tensor], before: str, ends: Sequence[Node]
) -> list[dict[Node, float]]:
    """By end, the weights of the edges from all nodes of the layer before it."""
    layer = ends[0].layer
    (grad,) = torch.autograd.grad(value, x[layer], retain_graph=True)
    codes, error = study.parts(layer, x[layer])
    W = study.saes[layer].W_dec.detach() / study.saes[layer].target_scale
    found = []
    for end in ends:
        if end.latent is None:
            through = (grad * error).sum()
        else:
            slopes = (grad @ W[end.latent])[codes.tokens.long()]
            through = torch.where(codes.indices == end.latent, slopes * codes.values, 0).sum()
        (product,) = torch.autograd.grad(through, x[before], retain_graph=True)
        entries = study.entries(before, x[before].detach(), product)
        latents, sums = entries.by_latent()
        pairs = zip(latents.tolist(), sums.tolist(), strict=True)
        weights = {Node(before, latent): weight for latent, weight in pairs}
        found.append({**weights, Node(before, None): float(entries.errors.sum())})
    return found


def circuit_curves(
    study: Attribution, effects: Mapping[str, Effects], counts: Sequence[int]
) -> Curves:
    """Faithfulness and completeness of the circuits of the ``counts`` strongest nodes.

    With m the metric and C a circuit, ``(m(C) - m(nothing)) / (m(all) - m(nothing))`` and the same
    of all but C. Nodes downstream see what is ablated upstream. Two forward passes a count.

    Raises:
        ValueError: a metric that ablating everything does not change; a count below 0.
    """
    for n in counts:
        checks.count("counts", n)
    ranked = [node for node, _ in strongest(effects, max(counts, default=0))]
    nothing, whole = study.only([]), study.without([])
    if nothing == whole:
        raise ValueError("metric: expected one that ablating all layers changes, it does not")

    def part(value: float) -> float:
        return (value - nothing) / (whole - nothing)

    kept = [part(study.only(ranked[:n])) for n in counts]
    left = [part(study.without(ranked[:n])) for n in counts]
    return Curves(list(counts), kept, left)


def draw_circuit(
    circuit: Circuit,
    labels: Mapping[Node, str] | None = None,
    curves: Curves | None = None,
    title: str = "",
) -> Picture:
    """The circuit as a graph, a column for each layer, and its curves beside it.

    Blue raises the metric, so that ablating it lowers it, orange lowers it; areas and widths are
    effects and weights. The number beside a name is what the node adds to the metric.

    Args:
        circuit: the graph.
        labels: names of nodes; default: the latent's number.
        curves: as :func:`circuit_curves` gives them.
        title: what the metric is.

    Raises:
        ImportError: matplotlib is not installed.
    """

    def draw(figure: Figure) -> None:
        figure.set_size_inches(3.4 + 2.4 * len(circuit.layers), 5.6 if curves is None else 7.6)
        heights = None if curves is None else [5.2, 2.2]
        n_rows = 1 if curves is None else 2
        axes = figure.subplots(n_rows, 1, squeeze=False, height_ratios=heights)[:, 0]
        _graph(axes[0], circuit, labels or {})
        axes[0].set_title(title, parse_math=False)
        if curves is not None:
            _curves(axes[1], curves)

    drawing = Drawing("circuit", draw, "the circuit's nodes by layer and the edges between them")
    return render([drawing], "the picture of a circuit")[0]


def _graph(axes: Axes, circuit: Circuit, labels: Mapping[Node, str]) -> None:
    places: dict[Node, tuple[float, float]] = {}
    largest = max(map(abs, circuit.effects.values()), default=1.0) or 1.0
    for column, layer in enumerate(circuit.layers):
        nodes = [node for node in circuit.effects if node.layer == layer]
        for row, node in enumerate(sorted(nodes, key=lambda n: -abs(circuit.effects[n]))):
            places[node] = (column, -row)
    last = len(circuit.layers)
    bottom = min([y for _, y in places.values()], default=0.0)
    metric = (last, bottom / 2)
    widest = max([abs(edge.weight) for edge in circuit.edges], default=1.0) or 1.0
    lines = [(places[e.start], places[e.end], e.weight, widest) for e in circuit.edges]
    ends = [node for node in circuit.effects if node.layer == circuit.layers[-1]]
    lines += [(places[node], metric, circuit.effects[node], largest) for node in ends]
    for (x0, y0), (x1, y1), weight, most in lines:
        share = abs(weight) / most
        look: dict[str, Any] = {"color": _colour(weight), "linewidth": 0.3 + 4 * share}
        axes.plot([x0, x1], [y0, y1], alpha=0.15 + 0.5 * share, zorder=1, **look)
    for node, (x, y) in places.items():
        effect = circuit.effects[node]
        size = 20 + 330 * abs(effect) / largest
        axes.scatter([x], [y], s=size, color=_colour(effect), zorder=2, edgecolor="white")
        name = labels.get(node, "error" if node.latent is None else f"latent {node.latent}")
        text = f"{name[:_NAME]}  {number(-effect, 2)}"
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
        axes.text(x, y - 0.26, text, ha="center", va="top", fontsize=7.5, color=INK,
                  parse_math=False, zorder=3, bbox=box)  # fmt: skip
    axes.scatter(*metric, s=350, color=INK, zorder=2, marker="s")
    name = f"metric {number(circuit.clean)}\nablated {number(circuit.ablated)}"
    axes.text(metric[0], metric[1] - 0.5, name, ha="center", va="top", fontsize=8, color=INK)
    axes.set_xticks(range(last + 1), [*circuit.layers, ""])
    axes.xaxis.tick_top()
    axes.tick_params(axis="both", length=0, labelleft=False, labelcolor=INK)
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.set_xlim(-0.5, last + 0.35)
    axes.set_ylim(bottom - 1, 0.5)


def _curves(axes: Axes, curves: Curves) -> None:
    for name, y, colour in (
        ("circuit alone", curves.faithfulness, BLUE),
        ("all but the circuit", curves.completeness, ORANGE),
    ):
        axes.plot(curves.counts, y, color=colour, marker="o", markersize=3, label=name)
    for level in (0, 1):
        axes.axhline(level, color=MUTED, linewidth=0.9, linestyle=(0, (4, 3)), zorder=0)
    axes.set_xlabel("nodes in the circuit, the strongest first")
    axes.set_ylabel("metric (0 ablated, 1 whole)")
    axes.legend(frameon=False, fontsize=8.5, labelcolor="linecolor")


def _colour(effect: float) -> str:
    return BLUE if effect < 0 else ORANGE
