"""Contrastive directions and direct effects on logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from dense_edits import VOCABULARY, D, F
from torch import Tensor, nn

import sae_kernels as sk
from sae_kernels.errors import DataError, ModelError
from sae_kernels.harvest.splice import record
from sae_kernels.interventions import (
    DirectEffects,
    closest_latents,
    contrast,
    effects,
    latent_effects,
    load_directions,
    save_directions,
    steer,
)
from sae_kernels.nn import TopKSAE

if TYPE_CHECKING:
    from pathlib import Path

pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")


@pytest.fixture(scope="module")
def sae() -> TopKSAE:
    return TopKSAE(D, F, k=5, activation_scale=2.0).double()


PAIRS = [([3, 4, 5], [3, 4, 6]), ([7, 8], [7, 9]), ([1, 2, 3, 4], [1, 2, 3, 5])]


def padded(prompts: list[list[int]], side: str) -> dict[str, Tensor]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        where = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[row, where], mask[row, where] = torch.tensor(prompt), 1
    return {"input_ids": ids, "attention_mask": mask}


def test_a_contrast_is_the_mean_difference_at_last_tokens(model: Any) -> None:
    layers = ["h.0", "h.2"]
    got = contrast(
        model, layers, *(padded(list(side), "right") for side in zip(*PAIRS, strict=True))
    )
    for layer in layers:
        differences = []
        for prompts in PAIRS:
            last = []
            for prompt in prompts:
                with torch.no_grad(), record(model, (layer,)) as outputs:
                    model(torch.tensor([prompt]))
                last.append(outputs[layer][0, -1])
            differences.append(last[0] - last[1])
        want = torch.stack(differences).mean(0)
        torch.testing.assert_close(got[layer], want, rtol=0, atol=1e-12)
    whole = [[prompt[-1:] for prompt in side] for side in zip(*PAIRS, strict=True)]
    left = contrast(model, ["h.0"], *(padded(side, "left") for side in whole))
    right = contrast(model, ["h.0"], *(padded(side, "right") for side in whole))
    assert torch.equal(left["h.0"], right["h.0"])


def test_a_contrast_steers(model: Any) -> None:
    """Added in full at a pair's last token, it makes the negative prompt the positive one."""
    pair = torch.tensor([[3, 4, 5]]), torch.tensor([[3, 4, 6]])
    vector = contrast(model, ["h.0"], *pair)["h.0"]
    with torch.no_grad():
        want = model(pair[0]).logits[0, -1]
        with sk.intervene(model, {"h.0": None}, [steer(vector, at=-1)]):
            got = model(pair[1]).logits[0, -1]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_pairs_come_in_pairs(model: Any) -> None:
    with pytest.raises(ValueError, match="a pair a row, got 1 and 2"):
        contrast(model, ["h.0"], torch.tensor([[1]]), torch.tensor([[1], [2]]))
    with pytest.raises(ValueError, match=r"layers: expected a list of paths .* got 'h\.0'"):
        contrast(model, "h.0", torch.tensor([[1]]), torch.tensor([[2]]))
    with pytest.raises(ModelError, match="h: expected a layer that runs, it did not"):
        contrast(model, ["h"], torch.tensor([[1]]), torch.tensor([[2]]))


def test_directions_survive_a_file(tmp_path: Path) -> None:
    directions = {"h.0": torch.randn(D), "h.2": torch.randn(D).double()}
    path = tmp_path / "directions.safetensors"
    save_directions(path, directions)
    got = load_directions(path)
    assert all(torch.equal(got[layer], vector) for layer, vector in directions.items())
    save_directions(path, {"h.0": torch.randn(D, D)})
    with pytest.raises(ValueError, match=r"h\.0: expected a direction \[D\], got"):
        load_directions(path)
    path.write_bytes(b"no safetensors")
    with pytest.raises(DataError):
        load_directions(path)


def test_a_direction_is_read_in_terms_of_latents(sae: TopKSAE) -> None:
    vector = 3 * sae.W_dec[7] + 0.1 * torch.randn(D, dtype=torch.float64)
    got = closest_latents(sae, vector, k=4)
    cosines = torch.cosine_similarity(sae.W_dec, vector[None])
    want = cosines.topk(4)
    assert got.latents.tolist() == want.indices.tolist()
    assert got.latents[0] == 7
    torch.testing.assert_close(got.cosines, want.values.detach())
    with pytest.raises(ValueError, match=r"a direction \[16\], got \[17\]"):
        closest_latents(sae, torch.ones(D + 1))


def dense_effects(sae: TopKSAE, model: Any) -> Tensor:
    raw = sae.W_dec.detach() @ model.lm_head.weight.detach().T / sae.config.activation_scale
    return raw - raw.mean(1, keepdim=True)


@pytest.mark.parametrize("block", [1 << 24, 100], ids=["one-block", "blocks"])
def test_effects_are_those_of_the_whole_matrix(
    model: Any, sae: TopKSAE, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(effects, "_BLOCK", block)
    dense = dense_effects(sae, model)
    for latents in (None, [5, 2, 40]):
        got = latent_effects(sae, model, latents, k=4)
        want = dense if latents is None else dense[latents]
        torch.testing.assert_close(got.promoted_by, want.topk(4).values)
        torch.testing.assert_close(got.suppressed_by, want.topk(4, largest=False).values)
        torch.testing.assert_close(want.gather(1, got.promoted), got.promoted_by)
        torch.testing.assert_close(want.gather(1, got.suppressed), got.suppressed_by)


def test_a_processor_adds_effects_to_whole_batches(model: Any, sae: TopKSAE) -> None:
    dense, ids = dense_effects(sae, model), torch.tensor([[3, 4], [5, 6]])
    strengths = torch.tensor([[400.0, 0.0], [0.0, -400.0]], dtype=torch.float64)
    processor = DirectEffects(sae, model, [5, 9], strengths)
    scores = torch.randn(2, VOCABULARY, dtype=torch.float64)
    want = scores + torch.stack([400 * dense[5], -400 * dense[9]])
    torch.testing.assert_close(processor(ids, scores), want)
    out = model.generate(ids, max_new_tokens=3, do_sample=False, logits_processor=[processor])
    said = torch.stack([dense[5].argmax(), (-dense[9]).argmax()])
    assert torch.equal(out[:, 2:], said[:, None].expand(2, 3)), "so strong that nothing else counts"
    beams = processor(ids, scores.repeat_interleave(3, 0))
    torch.testing.assert_close(beams, want.repeat_interleave(3, 0))


def test_effects_that_cannot_be(model: Any, sae: TopKSAE) -> None:
    with pytest.raises(ModelError, match="GPT2Model has none; load it with load_causal_model"):
        latent_effects(sae, model.transformer)
    with pytest.raises(ModelError, match="Linear has none"):
        latent_effects(sae, nn.Linear(2, 2))
    with pytest.raises(ValueError, match="as wide as what the head reads, 16, got 8"):
        latent_effects(TopKSAE(8, F, k=2), model)
    with pytest.raises(ValueError, match=r"latents: expected numbers from 0 to 47 .* got 48"):
        latent_effects(sae, model, [F])
    with pytest.raises(ValueError, match=r"strengths: expected \[2\]"):
        DirectEffects(sae, model, [1, 2], torch.ones(3))
    processor = DirectEffects(sae, model, [1], torch.ones(2, 1))
    with pytest.raises(ValueError, match="of the 3 rows of the batch, got 2"):
        processor(torch.zeros(3, 1), torch.zeros(3, VOCABULARY))
