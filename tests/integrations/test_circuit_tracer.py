"""circuit-tracer on these kernels: the same attribution graphs, from their transcoders and ours.

Runs where circuit-tracer is installed.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("circuit_tracer", reason="needs circuit-tracer")

import torch
from circuit_tracer.attribution import context_nnsight, context_transformerlens
from circuit_tracer.attribution.attribute import attribute
from circuit_tracer.transcoder.cross_layer_transcoder import CrossLayerTranscoder, load_clt
from transformer_lens import HookedTransformerConfig

import sae_kernels as sk
from benchmarks.attribution_graphs import replacement_model
from sae_kernels.formats import LazyCrossLayer, write_cross_layer
from sae_kernels.integrations.circuit_tracer import transcoder
from sae_kernels.nn import CrossLayerBatchTopK, CrossLayerJumpReLU, CrossLayerTopK
from sae_kernels.nn.layer_features import Decoders

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

L, D, F, VOCABULARY, PROMPT = 3, 16, 40, 30, 12
PLACE = {"hook_name": "hook_resid_mid", "hook_name_out": "hook_mlp_out"}


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    owners = [CrossLayerTranscoder, context_transformerlens.AttributionContext]
    owners += [context_nnsight.AttributionContext]
    before = [dict(vars(owner)) for owner in owners]
    yield
    assert [dict(vars(owner)) for owner in owners] == before


def clt(kind: str = "jumprelu") -> Any:
    made: Any = {
        "jumprelu": lambda: CrossLayerJumpReLU(D, L * F, n_layers=L, d_out=D, threshold_init=0.3),
        "batchtopk": lambda: CrossLayerBatchTopK(D, L * F, n_layers=L, d_out=D, k=4),
    }[kind]()
    g = torch.Generator().manual_seed(2)
    with torch.no_grad():
        made.W_enc.copy_(torch.randn(made.W_enc.shape, generator=g))
        made.W_dec.copy_(0.1 * torch.randn(made.W_dec.shape, generator=g))
        made.b_enc.copy_(-1.5 + 0.1 * torch.randn(made.b_enc.shape, generator=g))
        made.b_dec.copy_(0.1 * torch.randn(made.b_dec.shape, generator=g))
        if kind == "batchtopk":
            made.threshold.fill_(0.4)
    return made.eval()


def model(transcoders: Any) -> Any:
    config = HookedTransformerConfig(
        n_layers=L,
        d_model=D,
        n_ctx=32,
        d_head=8,
        n_heads=2,
        d_mlp=32,
        d_vocab=VOCABULARY,
        act_fn="gelu",
        normalization_type="LN",
        seed=0,
        device="cpu",
    )
    return replacement_model(config, transcoders)


def tokens() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(5))


def graph(transcoders: Any, batch_size: int = 7) -> Any:
    return attribute(tokens(), model(transcoders), batch_size=batch_size, max_n_logits=3)


def assert_same_graph(ours: Any, theirs: Any) -> None:
    assert torch.equal(ours.active_features, theirs.active_features)
    assert len(theirs.active_features) > 50
    torch.testing.assert_close(ours.activation_values, theirs.activation_values)
    assert torch.equal(ours.selected_features, theirs.selected_features)
    size = theirs.adjacency_matrix.abs().max()
    assert size > 0
    off = (ours.adjacency_matrix - theirs.adjacency_matrix).abs().max()
    assert off <= 1e-5 * size


@pytest.mark.parametrize("lazy", [False, True])
def test_graphs_are_the_same(tmp_path: Path, lazy: bool) -> None:
    made = clt()
    write_cross_layer(tmp_path, made.config, made.state_dict(), {"activations": PLACE})
    options: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float32}
    options |= {"lazy_decoder": lazy, "lazy_encoder": lazy}
    theirs = graph(load_clt(str(tmp_path), **options))
    with sk.accelerate("circuit_tracer", strict=True) as run:
        ours = graph(load_clt(str(tmp_path), **options))
    assert_same_graph(ours, theirs)
    assert run.report().taken["attribution"] == 1


def test_a_batch_has_one_attention_pattern() -> None:
    made, shapes = transcoder(clt()), []
    for accelerated in (False, True):
        replaced = model(made)
        keep = partial(lambda kept, pattern, hook: kept.append(list(pattern.shape)), shapes)
        replaced.blocks[1].attn.hook_pattern.add_hook(keep, is_permanent=True)
        with sk.accelerate(made) if accelerated else nullcontext():
            replaced.run_forward_pass(tokens(), 7, replaced.setup_attribution(tokens()))
    one, many = [1, 2, PROMPT, PROMPT], [7, 2, PROMPT, PROMPT]
    assert shapes == [one, many, one, one]


@pytest.mark.parametrize("kind", ["jumprelu", "batchtopk"])
def test_ours_run_without_files(tmp_path: Path, kind: str) -> None:
    made = clt(kind)
    write_cross_layer(tmp_path, made.config, made.state_dict(), {"activations": PLACE})
    theirs = graph(load_clt(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32))
    assert_same_graph(graph(transcoder(made)), theirs)
    with sk.accelerate("circuit_tracer", strict=True):
        assert_same_graph(graph(transcoder(made)), theirs)


def test_components_are_theirs() -> None:
    """Vectors one layer at a time; the rest is what their own function gives."""
    made = transcoder(clt())
    x = torch.randn(L, PROMPT, D, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        theirs = made.compute_attribution_components(x, slice(0, 2))
    with sk.accelerate(made):
        ours = made.compute_attribution_components(x, slice(0, 2))
        features, encoders = made.encode_sparse(x, slice(0, 2))
    assert torch.equal(features.indices(), theirs["activation_matrix"].indices())
    assert torch.equal(encoders, theirs["encoder_vecs"])
    for name in ("encoder_to_decoder_map", "decoder_locations"):
        assert torch.equal(ours[name], theirs[name]), name
    torch.testing.assert_close(ours["reconstruction"], theirs["reconstruction"])
    assert isinstance(ours["decoder_vecs"], Decoders)
    some = torch.tensor([5, 2, 9])
    assert torch.equal(ours["encoder_vecs"][some], theirs["encoder_vecs"][some])
    grads = torch.randn(4, PROMPT, D)
    for layer in range(L):
        mask = theirs["decoder_locations"][0] == layer
        vectors, where = theirs["decoder_vecs"][mask], theirs["decoder_locations"][1][mask]
        expected = torch.einsum("bpd,pd->pb", grads[:, where], vectors)
        torch.testing.assert_close(ours["decoder_vecs"][mask].scores(grads), expected)


@pytest.mark.parametrize("lazy", [False, True])
def test_our_modules_have_the_calls_themselves(tmp_path: Path, lazy: bool) -> None:
    made = clt()
    write_cross_layer(tmp_path, made.config, made.state_dict(), {"activations": PLACE})
    own, x = LazyCrossLayer(tmp_path) if lazy else made, torch.randn(L, PROMPT, D)
    with torch.no_grad():
        theirs = load_clt(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
        features, encoders = theirs.encode_sparse(x, slice(0, 2))
        *places, vectors, entries = theirs.select_decoder_vectors(features)
        outputs = theirs.compute_reconstruction(*places[:2], vectors)
    our_features, our_encoders = own.encode_sparse(x, slice(0, 2))
    assert torch.equal(our_features.indices(), features.indices())
    torch.testing.assert_close(our_features.values(), features.values())
    assert torch.equal(our_encoders, encoders)
    found = own.select_decoder_vectors(our_features)
    positions, layers, _, decoders, _ = found
    for ours, others in zip((*found[:3], found[4]), (*places, entries), strict=True):
        assert torch.equal(ours, others)
    torch.testing.assert_close(own.compute_reconstruction(positions, layers, decoders), outputs)
    torch.testing.assert_close(own.decode_sparse(our_features), outputs)


def test_the_other_backend_of_models_takes_the_same_vectors() -> None:
    made = transcoder(clt())
    x = torch.randn(L, PROMPT, D, generator=torch.Generator().manual_seed(3))
    grads = torch.randn(4, PROMPT, D)
    compute = "compute_score"
    buffers = []
    for accelerated in (False, True):
        handle = sk.accelerate("circuit_tracer") if accelerated else None
        with torch.no_grad():
            parts = made.compute_attribution_components(x)
        mask = parts["decoder_locations"][0] == 1
        where = parts["encoder_to_decoder_map"][mask]
        context: Any = SimpleContext(torch.zeros(int(where.max()) + 1, 4))
        positions = parts["decoder_locations"][1][mask]
        method = getattr(context_nnsight.AttributionContext, compute)
        read = (slice(None), positions)
        method(context, grads, parts["decoder_vecs"][mask], where, read)
        buffers.append(context._batch_buffer)
        if handle is not None:
            handle.undo()
    torch.testing.assert_close(buffers[1], buffers[0])
    assert buffers[0].abs().max() > 0


class SimpleContext:
    """What compute_score uses of a context."""

    def __init__(self, buffer: torch.Tensor) -> None:
        self._batch_buffer = buffer


def test_a_prompt_without_active_features() -> None:
    quiet = clt()
    with torch.no_grad():
        quiet.b_enc.fill_(-1e3)
    made = transcoder(quiet)
    x = torch.randn(L, PROMPT, D)
    with sk.accelerate(made):
        parts = made.compute_attribution_components(x)
    assert parts["activation_matrix"]._nnz() == 0
    torch.testing.assert_close(parts["reconstruction"], made.b_dec[:, None].expand(L, PROMPT, D))


def test_other_activations_are_left_to_it() -> None:
    made = transcoder(clt())
    x = torch.randn(L, PROMPT, D)
    with sk.accelerate(made) as run, pytest.raises(RuntimeError):
        made.encode_sparse(x.double())  # as shipped, which refuses them
    assert "activations of torch.float64" in run.report().left[0].why


def test_what_it_cannot_be() -> None:
    with pytest.raises(ValueError, match="expected JumpReLU or BatchTopK"):
        transcoder(CrossLayerTopK(D, L * F, n_layers=L, d_out=D, k=3))
