"""circuit-tracer's attribution graphs: ``python -m benchmarks.attribution_graphs [--out FILE]``.

The graph of a prompt of 512 tokens on a random model of 6 layers with a cross-layer transcoder, as
shipped and accelerated, at two batch sizes: its time, and its peak memory above the model, each in
a process of its own. Bars: the accelerated one takes at most half of either. Runs where
circuit-tracer is installed.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

import sae_kernels as sk
from benchmarks.study import Records, Runs, bars, peak_of, peaks, ratios
from sae_kernels.nn import CrossLayerJumpReLU

SHIPPED, ACCELERATED = "as shipped", "accelerated"
VOCABULARY, LOGITS = 1000, 3


class Shape(NamedTuple):
    """Layers, their width and heads, latents that read one, tokens, feature nodes; batch sizes."""

    layers: int
    width: int
    heads: int
    latents: int
    tokens: int
    nodes: int
    batches: tuple[int, ...]


ASKED = Shape(6, 256, 8, 2048, 512, 64, (8, 32))
SMALL = Shape(2, 16, 2, 512, 12, 8, (4,))


def transcoder(shape: Shape) -> CrossLayerJumpReLU:
    """Random encoders, of which 1 % fire on normalised activations, and small random decoders."""
    L, D, F = shape.layers, shape.width, shape.latents
    clt = CrossLayerJumpReLU(D, L * F, n_layers=L, d_out=D, threshold_init=2.35)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        clt.W_enc.copy_(torch.randn(clt.W_enc.shape, generator=generator) / D**0.5)
        clt.W_dec.copy_(torch.randn(clt.W_dec.shape, generator=generator) / (10 * D))
    return clt.eval()


def model(shape: Shape) -> Any:
    """circuit-tracer's replacement model: a random transformer with the transcoder."""
    from transformer_lens import HookedTransformerConfig

    from sae_kernels.integrations.circuit_tracer import transcoder as as_theirs

    config = HookedTransformerConfig(
        n_layers=shape.layers,
        d_model=shape.width,
        n_ctx=shape.tokens,
        d_head=shape.width // shape.heads,
        n_heads=shape.heads,
        d_mlp=4 * shape.width,
        d_vocab=VOCABULARY,
        act_fn="gelu",
        normalization_type="LN",
        seed=0,
        device="cpu",
    )
    clt = as_theirs(transcoder(shape), feature_input_hook="ln2.hook_normalized")
    return replacement_model(config, clt)


def replacement_model(config: Any, transcoders: Any) -> Any:
    """circuit-tracer's model of a TransformerLens configuration, with a tokenizer of no words."""
    from circuit_tracer.replacement_model import replacement_model_transformerlens as theirs

    made = theirs.TransformerLensReplacementModel.from_config(config, transcoders)
    special = {f"{name}_token_id": 1 for name in ("bos", "pad", "eos")}
    made.tokenizer = SimpleNamespace(
        decode=lambda tokens: "",
        all_special_ids=[1],
        padding_side="right",
        vocab_size=config.d_vocab,
        **special,
    )
    return made


def graph(made: Any, shape: Shape, batch: int, accelerated: bool) -> Any:
    """A graph of random tokens."""
    from circuit_tracer.attribution.attribute import attribute

    tokens = torch.randint(0, VOCABULARY, (shape.tokens,), generator=torch.manual_seed(5))
    tokens[0] = 1  # else another one is put before them
    with sk.accelerate("circuit_tracer", strict=True) if accelerated else nullcontext():
        return attribute(
            tokens, made, batch_size=batch, max_feature_nodes=shape.nodes, max_n_logits=LOGITS
        )


def runs_of(shape: Shape, batch: int) -> Runs:
    """Each way to the graph, by name, on one model."""
    made = model(shape)
    ways = ((SHIPPED, False), (ACCELERATED, True))
    return {name: partial(graph, made, shape, batch, accelerated) for name, accelerated in ways}


def peak(name: str, batch: int, shape: Shape, threads: int) -> int:
    """Bytes that a graph takes at its highest above the model.

    Raises:
        OSError: another system than Linux.
    """
    torch.set_num_threads(threads)
    runs_of(SMALL, SMALL.batches[0])[name]()  # libraries and thread pools
    return peak_of(runs_of(shape, batch)[name])


def time(kind: str, rounds: int, shape: Shape = ASKED) -> Records:
    """Time of a graph."""
    for batch in shape.batches:
        runs = runs_of(shape, batch)
        yield from ratios(f"graph, batches of {batch}", runs, SHIPPED, rounds)


def memory(kind: str, rounds: int, shape: Shape = ASKED) -> Records:
    """Peak of a graph above the model."""
    for batch in shape.batches:
        ways, threads = (SHIPPED, ACCELERATED), torch.get_num_threads()
        runs = {name: partial(peak, name, batch, shape, threads) for name in ways}
        yield from peaks(f"graph memory, batches of {batch}", runs, SHIPPED)


GROUPS = {"time": time, "memory": memory}


if __name__ == "__main__":
    bars(GROUPS, __doc__, "attribution_graphs")
