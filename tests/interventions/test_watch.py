"""Codes read at every decoded token."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import pytest
import torch
from dense_edits import VOCABULARY, D, F
from torch import Tensor

import sae_kernels as sk
from sae_kernels.errors import ModelError
from sae_kernels.harvest.splice import record
from sae_kernels.interventions import set_to
from sae_kernels.nn import JumpReLUSAE, TopKSAE

if TYPE_CHECKING:
    from sae_kernels.interventions import Watch

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

NEW = 4


@pytest.fixture(scope="module")
def saes() -> dict[str, Any]:
    return {
        "h.0": TopKSAE(D, F, k=5, seed=1).double(),
        "h.2": JumpReLUSAE(D, F, seed=2).double(),
    }


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    ids[0, :2] = mask[0, :2] = 0
    return {"input_ids": ids, "attention_mask": mask}


def test_every_decoded_token_is_read(
    model: Any, saes: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    seen: dict[str, list[Tensor]] = {layer: [] for layer in saes}
    positions: list[Tensor] = []

    def each(now: Watch) -> None:
        for layer, codes in now.codes.items():
            seen[layer].append(codes.to_dense())
        positions.append(now.positions)

    plain = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    with sk.watch(model, saes, each) as watched:
        out = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        assert watched.passes == NEW
    assert torch.equal(out, plain)
    assert [step.shape[1] for step in positions] == [6, 1, 1, 1]
    assert torch.cat(positions, 1)[:, -4:].tolist() == [[3, 4, 5, 6], [5, 6, 7, 8]]
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids = torch.cat([batch["input_ids"][row, mask], out[row, 6:-1]])[None]
        with torch.no_grad(), record(model, tuple(saes)) as outputs:
            model(ids, use_cache=False)
        for layer, sae in saes.items():
            got = torch.cat(seen[layer], 1)[row, -ids.shape[1] :]
            want = sae.encode(outputs[layer][0]).to_dense()
            # Another order of sums through the model; which latents are kept does not hang on it.
            torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8], ids=["float64", "int8"])
def test_an_inference_sae_is_watched_as_its_sae_is(
    model: Any, saes: dict[str, Any], batch: dict[str, Tensor], dtype: torch.dtype
) -> None:
    if dtype == torch.int8:
        saes = {name: sae.folded().float() for name, sae in saes.items()}
    frozen = {name: sae.for_inference(dtype) for name, sae in saes.items()}
    seen: list[list[Tensor]] = []
    for each in (saes, frozen):
        with sk.watch(model, each) as watched:
            model.generate(**batch, max_new_tokens=NEW, do_sample=False)
        seen.append([codes.to_dense() for codes in watched.codes.values()])
    close = 1e-12 if dtype == torch.float64 else 1e-4  # b_dec's part is added in another order
    for came, wanted in zip(*seen, strict=True):
        torch.testing.assert_close(came, wanted, rtol=0, atol=close)
        assert bool(came.any())


def test_memory_does_not_grow(model: Any, saes: dict[str, Any]) -> None:
    """Tensors alive, the cache of the model aside, after a short and a long generation."""
    ids = torch.tensor([[3, 4, 5]])

    def alive(n: int) -> tuple[int, int]:
        counts = []

        def each(_: Watch) -> None:
            gc.collect()
            # Not the fakes that a compiler has left, whose shapes are questions.
            tensors = [t for t in gc.get_objects() if type(t) is Tensor]
            counts.append(sum(t.shape[-1:] == (5,) for t in tensors))

        with sk.watch(model, {"h.0": saes["h.0"]}, each):
            model.generate(ids, max_new_tokens=n, min_new_tokens=n, do_sample=False)
        return counts[1], counts[-1]

    early, late = alive(8)
    assert early > 0, "the codes, of 5 entries, are seen"
    assert early == late


def test_inside_of_an_intervention_edits_are_seen(model: Any, saes: dict[str, Any]) -> None:
    ids, layer = torch.tensor([[3, 4, 5]]), "h.0"
    sae, mine = saes[layer], {layer: saes[layer]}
    quiet = int((sae.encode(torch.zeros(1, D).double()).to_dense()[0] == 0).nonzero()[0])
    edits = [set_to(quiet, 50.0)]
    with torch.no_grad():
        with sk.watch(model, mine) as before, sk.intervene(model, mine, edits):
            model(ids)
        with sk.intervene(model, mine, edits), sk.watch(model, mine) as after:
            model(ids)
    assert (after.codes[layer].columns([quiet]) > 10).all()
    assert (before.codes[layer].columns([quiet]) < 10).all()


def test_an_error_of_the_caller_leaves_no_hook(model: Any, saes: dict[str, Any]) -> None:
    def each(_: Watch) -> None:
        raise ArithmeticError

    with pytest.raises(ArithmeticError), sk.watch(model, saes, each):
        model.generate(torch.tensor([[3, 4]]), max_new_tokens=3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert "generate" not in vars(model)


@pytest.mark.parametrize(
    ("saes", "message"),
    [
        ({"h.7": TopKSAE(D, F, k=4)}, "expected the dotted path of a module"),
        ({"h.1": TopKSAE(D + 1, F, k=4)}, "as wide as what the SAE reads, 17, got 16"),
        ({"h": TopKSAE(D, F, k=4)}, "h: expected a layer that runs, it did not"),
        ({"transformer": TopKSAE(D, F, k=4)}, r"puts out \[B, S, D\], got BaseModel"),
    ],
)
def test_refusals(model: Any, saes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message), sk.watch(model, saes):
        model(torch.tensor([[3, 4]]))


def test_a_model_that_is_fed_nothing_is_refused(model: Any, saes: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match="is fed input_ids"), sk.watch(model, saes):
        model()
