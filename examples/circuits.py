"""A sparse feature circuit: how a model knows which bracket it has to close.

The metric is the logit of ``)`` less that of ``]`` after an open ``(``; what is ablated becomes
what it is after an open ``[``. Run it: ``python examples/circuits.py``. The picture is
``examples-out/circuits.png``, the graph ``examples-out/circuits.json``.
"""

from __future__ import annotations

import itertools
import re

import torch
from tiny_causal_model import documents, load, out, outputs, train_sae, windows
from torch import Tensor

from sae_kernels.interventions import (
    Attribution,
    Node,
    circuit_curves,
    draw_circuit,
    find_circuit,
    rank_correlation,
    strongest,
)

LAYERS = ["layers.0", "layers.1", "layers.2"]
BEFORE = ["        return self.get", "    for name in list", "  value = tuple", "if not items"]
INSIDE = ["name", "self.value", "key", "data, index"]


def prompts(bracket: str) -> list[bytes]:
    """Some code with an open bracket."""
    pairs = itertools.product(BEFORE, INSIDE)
    return [f"{before}{bracket}{inside}".encode() for before, inside in pairs]


def padded(texts: list[bytes]) -> dict[str, Tensor]:
    """Token ids [B, S] and attention mask, padded on the left."""
    width = max(map(len, texts))
    rows = [list(text.rjust(width, b" ")) for text in texts]
    lengths = torch.tensor([len(text) for text in texts])
    mask = torch.arange(width) >= width - lengths[:, None]
    return {"input_ids": torch.tensor(rows), "attention_mask": mask.long()}


def closing(logits: Tensor) -> Tensor:
    """The logit of ``)`` less that of ``]`` after each prompt, mean over the prompts."""
    return (logits[:, -1, ord(")")] - logits[:, -1, ord("]")]).mean()


def names(saes, activations: dict[str, Tensor], batch: Tensor, nodes: list[Node]) -> dict:
    """For each latent the text before the byte at which it fires most, which is in quotes."""
    found = {}
    for layer, sae in saes.items():
        latents = [node.latent for node in nodes if node.layer == layer and node.latent is not None]
        values = sae.encode(activations[layer]).columns(latents)
        for latent, place in zip(latents, values.argmax(0).tolist(), strict=True):
            row, column = divmod(place, batch.shape[1] - 1)
            text = bytes(batch[row, max(0, column - 9) : column + 2].tolist())
            shown = re.sub(r"\s+", " ", text.decode(errors="replace"))
            found[Node(layer, latent)] = f"{shown[:-1]}«{shown[-1:]}»"
    return found


def main() -> None:
    model, texts = load(), documents()
    batch = windows(texts, 384)
    activations = outputs(model, LAYERS, batch)
    saes = {layer: train_sae(x) for layer, x in activations.items()}
    study = Attribution(model, saes, padded(prompts("(")), closing, against=padded(prompts("[")))
    for steps in (0, 8):
        effects = study.effects(steps)
        ranked = strongest(effects, 40)
        exact = study.exact([node for node, _ in ranked])
        agree = rank_correlation([effect for _, effect in ranked], exact)
        print(f"{steps} steps: rank correlation with exact ablation {agree:.3f}")
    circuit = find_circuit(study, effects, n_nodes=6, n_edges=30)
    circuit.save(out("circuits.json"))
    curves = circuit_curves(study, effects, [0, 2, 5, 10, 20, 40, 80, 160, 320])
    labels = names(saes, activations, batch, list(circuit.effects))
    title = "logit of ) less that of ], with an open ("
    picture = draw_circuit(circuit, labels, curves, title)
    out("circuits.png").write_bytes(picture.png)
    print(f"metric {circuit.clean:.2f}, with an open [ {circuit.ablated:.2f}")
    for node, effect in list(circuit.effects.items()):
        print(f"{node.layer} {labels.get(node, 'error')!r}: {-effect:+.3f}")


if __name__ == "__main__":
    main()
