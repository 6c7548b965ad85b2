"""Edits inside a running model, against blocks exchanged by hand, a row at a time without cache."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from dense_edits import (
    VOCABULARY,
    D,
    F,
    Place,
    edit_activation,
    logits_by_hand,
)
from torch import Tensor, nn

import sae_kernels as sk
from sae_kernels.errors import ModelError
from sae_kernels.harvest.splice import record
from sae_kernels.interventions import add, keep_only, scale, set_to, steer
from sae_kernels.nn import TopKSAE

if TYPE_CHECKING:
    from sae_kernels.interventions import Edit

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

NEW = 4
# fp64 through three blocks of width 16: a cache, padding or another order of sums moves logits
# of about 1 by some hundred roundings.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-11}
DIRECTION = torch.linspace(-1, 1, D, dtype=torch.float64)


@pytest.fixture(scope="module")
def saes() -> dict[str, Any]:
    return {
        "h.0": TopKSAE(D, F, k=5, seed=1).double(),
        "h.2": TopKSAE(D, F, k=7, seed=2, activation_scale=2.0).double(),
    }


@pytest.fixture
def batch() -> dict[str, Tensor]:
    ids = torch.randint(1, VOCABULARY, (3, 6), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, padding in enumerate((2, 0, 4)):
        ids[row, :padding] = mask[row, :padding] = 0
    return {"input_ids": ids, "attention_mask": mask}


def untouched(model: nn.Module) -> bool:
    """Whether no hook and no replaced method is left."""
    hooks = (len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return sum(hooks) == 0 and "generate" not in vars(model)


def by_hand(
    ids: Tensor,
    row: int,
    saes: dict[str, Any],
    edits: dict[str, list[Edit]],
    prompt: int,
    **skip: Any,
) -> Tensor:
    """Logits [S, V] of a row without padding."""
    first, tokens = skip.get("skip_first", 0), skip.get("skip_tokens", ())

    def function(layer: str) -> Any:
        def edited(x: Tensor) -> Tensor:
            out = []
            for position, token in enumerate(x):
                left = position < first or int(ids[position]) in tokens
                place = Place(row, position, prompt)
                out.append(
                    token if left else edit_activation(saes[layer], token, edits[layer], place)
                )
            return torch.stack(out)

        return edited

    return logits_by_hand(ids, {int(layer[-1]): function(layer) for layer in edits})


EDITS: dict[str, dict[str, list[Edit]]] = {
    "one layer": {"h.0": [set_to(3, 4.0), scale(range(5, 15), 3.0)]},
    "two layers": {
        "h.0": [set_to(3, 4.0, at="prompt"), scale(4, 2.0)],
        "h.2": [set_to(9, 5.0, at="generated"), keep_only(range(20), at="generated")],
    },
    "rows": {"h.2": [set_to(3, 4.0, rows=0), add(9, -6.0, rows=[2]), set_to(8, 1.0, rows=2)]},
    "positions": {"h.0": [set_to(3, 4.0, at=-1), set_to(5, 6.0, at=[0, 1])]},
    "steer": {"h.0": [steer(DIRECTION, 2.0, at="generated")]},
    "steer rows": {"h.2": [steer(DIRECTION, 3.0, rows=1), steer(-DIRECTION, rows=2, at="prompt")]},
}


@pytest.mark.parametrize("name", EDITS)
@pytest.mark.parametrize("cache", ["dynamic", "none", "static", "chunks"])
def test_generation_is_that_of_a_model_edited_by_hand(
    model: Any, saes: dict[str, Any], batch: dict[str, Tensor], name: str, cache: str
) -> None:
    edits = EDITS[name]
    how: dict[str, Any] = {
        "dynamic": {},
        "none": {"use_cache": False},
        "static": {"cache_implementation": "static"},
        "chunks": {"prefill_chunk_size": 4},
    }[cache]
    mine = {layer: saes[layer] for layer in edits}
    with sk.intervene(model, mine, edits):
        out = model.generate(
            **batch,
            max_new_tokens=NEW,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **how,
        )
    assert untouched(model)
    got = torch.stack(out.logits, 1)  # [B, NEW, V]
    for row, mask in enumerate(batch["attention_mask"]):
        prompt = int(mask.sum())
        ids = out.sequences[row, -(prompt + NEW) :]
        want = by_hand(ids[:-1], row, mine, edits, prompt)
        # generate() gives logits in fp32.
        eps = torch.finfo(torch.float32).eps
        torch.testing.assert_close(got[row], want[prompt - 1 :].float(), rtol=eps, atol=1e-11)
    plain = model.generate(
        **batch,
        max_new_tokens=NEW,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert not torch.allclose(got[0, -1], plain.logits[-1][0]) or name == "steer rows"


@pytest.mark.parametrize(
    "skip", [{"skip_first": 1}, {"skip_tokens": (7, 8, 9, 10, 11, 12)}], ids=["first", "special"]
)
def test_forward_leaves_out_what_is_skipped(
    model: Any, saes: dict[str, Any], batch: dict[str, Tensor], skip: dict[str, Any]
) -> None:
    edits, layer = [set_to(3, 4.0)], "h.0"
    with torch.no_grad(), sk.intervene(model, {layer: saes[layer]}, edits, **skip):
        positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
        got = model(**batch, position_ids=positions).logits
    for row, mask in enumerate(batch["attention_mask"].bool()):
        ids = batch["input_ids"][row, mask]
        want = by_hand(ids, row, saes, {layer: edits}, len(ids), **skip)
        torch.testing.assert_close(got[row, mask], want, **CLOSE)


def test_beams_have_the_edits_of_their_row(
    model: Any, saes: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    edits = {"h.2": [set_to(3, 9.0, rows=1), add(9, -6.0, rows=2, at="generated")]}
    how: dict[str, Any] = {"max_new_tokens": NEW, "num_beams": 3, "do_sample": False}
    with sk.intervene(model, {"h.2": saes["h.2"]}, edits):
        got = model.generate(**batch, num_return_sequences=2, **how)
    for row, mask in enumerate(batch["attention_mask"].bool()):
        mine = [edit for edit in edits["h.2"] if edit.rows == (row,)]
        mine = [dataclasses.replace(edit, rows=None) for edit in mine]
        alone = {"input_ids": batch["input_ids"][row : row + 1, mask]}
        alone["attention_mask"] = torch.ones_like(alone["input_ids"])
        with sk.intervene(model, {"h.2": saes["h.2"]}, mine):
            want = model.generate(**alone, num_return_sequences=2, **how)
        assert torch.equal(got[2 * row : 2 * row + 2, -NEW:], want[:, -NEW:])


def test_a_cache_of_ones_own_keeps_the_prompt(model: Any, saes: dict[str, Any]) -> None:
    ids, layer = torch.tensor([[3, 4, 5, 6, 7]]), "h.0"
    edits = [set_to(3, 4.0, at="prompt"), set_to(3, 8.0, at="generated")]
    with torch.no_grad(), sk.intervene(model, {layer: saes[layer]}, edits):
        first = model(ids[:, :3], use_cache=True)
        rest = model(ids[:, 3:], past_key_values=first.past_key_values, use_cache=True)
    want = by_hand(ids[0], 0, saes, {layer: edits}, 3)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], 1)[0], want, **CLOSE)


def test_tokens_without_an_edit_keep_their_bits(model: Any, saes: dict[str, Any]) -> None:
    ids, layer = torch.tensor([[3, 4, 5, 6, 7]]), "h.0"
    with torch.no_grad():
        before = model(ids).logits
        with sk.intervene(model, {layer: saes[layer]}, [set_to(3, 4.0, at=3)]):
            got = model(ids).logits
        with sk.intervene(model, {layer: saes[layer]}, []):
            assert torch.equal(model(ids).logits, before)
    assert torch.equal(got[:, :3], before[:, :3])
    assert (got[:, 3:] != before[:, 3:]).any(-1).all()


def test_the_banks_can_be_written_between_passes(model: Any, saes: dict[str, Any]) -> None:
    ids, layer = torch.tensor([[3, 4, 5]]), "h.2"
    sae = saes[layer]
    with torch.no_grad(), sk.intervene(model, {layer: sae}, [set_to(3, 4.0)]) as banks:
        model(ids)
        banks[layer].write(0, [set_to(9, 2.0)])
        got = model(ids).logits
    torch.testing.assert_close(
        got[0], by_hand(ids[0], 0, saes, {layer: [set_to(9, 2.0)]}, 3), **CLOSE
    )


def test_everything_is_as_before_whatever_happens(model: Any, saes: dict[str, Any]) -> None:
    ids = torch.tensor([[3, 4, 5]])
    sae = saes["h.2"].train()
    passes = []

    class Stop(Exception):
        pass

    def fails(_module: Any, _inputs: Any, _output: Any) -> None:
        passes.append(1)
        if len(passes) == 3:
            raise Stop

    late = model.transformer.h[1].register_forward_hook(fails)
    try:
        with pytest.raises(Stop), sk.intervene(model, {"h.2": sae}, [set_to(3, 4.0)]):
            model.generate(ids, max_new_tokens=9, do_sample=False)
    finally:
        late.remove()
    assert len(passes) == 3, "in the middle of generate"
    assert untouched(model)
    assert (sae.training, sae.W_dec.requires_grad) == (True, True)
    with pytest.raises(ModelError), sk.intervene(model, {"h.2": sae, "h.9": sae}, {}):
        pass
    assert untouched(model)


def test_nested_blocks_come_apart_in_order(model: Any, saes: dict[str, Any]) -> None:
    ids, layer = torch.tensor([[3, 4, 5]]), "h.0"
    other = saes["h.0"]
    with sk.intervene(model, {layer: other}, [scale(3, 2.0), steer(DIRECTION)]):
        with sk.intervene(model, {layer: other}, [steer(DIRECTION)]):
            model.generate(ids, max_new_tokens=2)
        with torch.no_grad():
            got = model(ids).logits
    want = by_hand(ids[0], 0, saes, {layer: [scale(3, 2.0), steer(DIRECTION)]}, 3)
    torch.testing.assert_close(got[0], want, **CLOSE)
    assert untouched(model)


@pytest.mark.parametrize(
    ("saes", "edits", "message"),
    [
        ({"h.9": TopKSAE(D, F, k=4)}, [], "expected the dotted path of a module"),
        (
            {"h.1": TopKSAE(D + 1, F, k=4)},
            [scale(1, 2.0)],
            "h.1: expected a layer as wide",
        ),
        ({"h.1": TopKSAE(D, F, k=4)}, [scale(F, 2.0)], f"latent: expected from 0 to {F - 1}"),
        (
            {"h.1": TopKSAE(D, F, k=4)},
            [scale(1, 2.0, rows=3)],
            "rows: expected edits of rows 0 to 1 of the batch, got one of row 3",
        ),
        (
            {"h.1": TopKSAE(D, F, k=4)},
            {"h.2": [scale(1, 2.0)]},
            "expected layers that have an SAE, got 'h.2'; did you mean 'h.1'",
        ),
        (
            {"h.1": TopKSAE(D, F, k=4), "h.2": None},
            [scale(1, 2.0)],
            "expected a list for each layer by its name, got one for 2 layers",
        ),
        ({"h.1": TopKSAE(D, F, k=4)}, scale(1, 2.0), "edits: expected a list of .* got Edit"),
        ({"h.1": TopKSAE(D, F, k=4)}, {"h.1": ["scale"]}, r"the like, got list \['scale'\]"),
        (
            {1: TopKSAE(D, F, k=4)},
            [scale(1, 2.0)],
            "dotted path of a module of .* got 1; nearest: transformer.h.1",
        ),
        ({"h.1": None}, [scale(1, 2.0)], "expected steer alone for a layer without an SAE"),
        ({"h.1": None}, [steer(torch.ones(D + 2))], r"hidden: expected \[tokens, 18\]"),
        (
            {"h": TopKSAE(D, F, k=4)},
            [scale(1, 2.0)],
            "h: expected a layer that runs, it did not; choose a whole block",
        ),
        (
            {"transformer": TopKSAE(D, F, k=4)},
            [scale(1, 2.0)],
            r"transformer: expected a layer that puts out \[B, S, D\], got BaseModel",
        ),
        (
            {"h.1.mlp.act": TopKSAE(D, F, k=4)},
            [scale(1, 2.0)],
            "act: expected a layer as wide as what the SAE reads, 16, got 64",
        ),
    ],
)
def test_refusals(model: Any, saes: Any, edits: Any, message: str) -> None:
    ids = torch.tensor([[3, 4], [5, 6]])
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=message),
        sk.intervene(model, saes, edits),
    ):
        model(ids)
    assert untouched(model)


def test_an_sae_of_another_layer_is_refused(model: Any) -> None:
    sae = TopKSAE(D, F, k=4)
    sae.metadata["activations"] = {"layer": "transformer.h.1"}
    with sk.intervene(model, {"h.1": sae}, [scale(1, 2.0)]):
        pass
    with (
        pytest.raises(
            ModelError, match=r"h.2: expected an SAE of this layer, got one of transformer"
        ),
        sk.intervene(model, {"h.2": sae}, [scale(1, 2.0)]),
    ):
        pass


def test_another_model_than_the_one_that_runs_is_refused(model: Any) -> None:
    with sk.intervene(model, {"h.1": None}, [steer(DIRECTION)]):
        with pytest.raises(ModelError, match="expected a call of the model that was given"):
            model.transformer(torch.tensor([[3, 4]]))
        model(torch.tensor([[3, 4]]))


def test_padding_is_never_edited(
    model: Any, saes: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    layer, edits = "h.0", [set_to(3, 4.0), steer(DIRECTION)]
    for ids, mask in (batch.values(), [side.flip(1) for side in batch.values()]):
        inputs = {"input_ids": ids, "attention_mask": mask}
        with torch.no_grad():
            with record(model, (layer,)) as before:
                model(**inputs)
            with sk.intervene(model, {layer: saes[layer]}, edits), record(model, (layer,)) as after:
                model(**inputs)
        padding = mask == 0
        assert torch.equal(after[layer][padding], before[layer][padding])
        assert (after[layer] != before[layer]).any(-1)[~padding].all()


@pytest.mark.parametrize("name", [name for name in EDITS if "steer" not in name])
def test_an_inference_sae_is_edited_as_its_sae_is(
    model: Any, saes: dict[str, Any], batch: dict[str, Tensor], name: str
) -> None:
    logits = []
    for make in (lambda sae: sae.folded(), lambda sae: sae.for_inference()):
        mine = {layer: make(saes[layer]) for layer in EDITS[name]}
        with sk.intervene(model, mine, EDITS[name]), torch.no_grad():
            logits.append(model(**batch).logits[batch["attention_mask"].bool()])
    torch.testing.assert_close(*logits, **CLOSE)
    with torch.no_grad():
        assert not torch.equal(logits[0], model(**batch).logits[batch["attention_mask"].bool()])


def test_a_failed_pass_leaves_nothing_behind(model: Any) -> None:
    """What a pass was fed is forgotten when it raises, inside of the block, too."""
    with sk.intervene(model, {"h.1": None}, [steer(DIRECTION)]), torch.no_grad():
        with pytest.raises(IndexError):
            model(torch.tensor([[3, VOCABULARY]]))
        with pytest.raises(ModelError, match="expected a call of the model that was given"):
            model.transformer(torch.tensor([[3, 4]]))
        model(torch.tensor([[3, 4]]))
