"""Find a latent that means something, and make a model say it.

A small language model learns sentences about animals and about tools, here in seconds; an SAE on
one of its layers finds which is which. Its latents' direct effects name the one to use
(``latent_effects``), and ``sk.intervene`` sets it while the model runs. The picture is
``examples-out/steer.png``.
"""

from __future__ import annotations

import random
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import sae_kernels as sk
from sae_kernels.interventions import latent_effects, set_to

OUT = Path("examples-out")
ANIMALS = ["cat", "dog", "horse", "bird", "fish", "mouse"]
TOOLS = ["hammer", "saw", "drill", "wrench", "pliers", "file"]
VERBS = ["and", "meets", "near", "likes"]
WORDS = ["the", *VERBS, *ANIMALS, *TOOLS]
ID = {word: i for i, word in enumerate(WORDS)}
LAYER = "transformer.h.1"


def sentences(n: int) -> torch.Tensor:
    """Sentences that stay with their kind: [n, 12] ids."""
    pick = random.Random(0)
    rows = []
    for _ in range(n):
        kind = pick.choice([ANIMALS, TOOLS])
        words = []
        for _ in range(4):
            words += ["the", pick.choice(kind), pick.choice(VERBS)]
        rows.append([ID[word] for word in words])
    return torch.tensor(rows)


def language_model(ids: torch.Tensor) -> GPT2LMHeadModel:
    """A transformer of two layers that has learnt these sentences."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(WORDS),
            n_positions=32,
            n_embd=64,
            n_layer=2,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for batch in ids.split(32):
        loss = model(batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"language model: loss {loss.item():.3f}")
    return model.eval()


def outputs_of(model: GPT2LMHeadModel, ids: torch.Tensor) -> torch.Tensor:
    """The layer's output at every token, [n, 64]."""
    found: list[torch.Tensor] = []
    hook = model.get_submodule(LAYER).register_forward_hook(
        lambda module, inputs, out: found.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(ids)
    hook.remove()
    return found[0].flatten(0, 1)


def main() -> None:
    """Trains both, finds the latent, steers."""
    ids = sentences(12_000)
    model = language_model(ids)
    acts = outputs_of(model, ids[:2000])
    sae = sk.TopKSAE(64, 128, k=8)
    sk.train(sae, acts, steps=300, batch_size=1024, lr=3e-3)
    print(f"SAE: FVU {sk.evaluate(sae, acts).fvu:.3f}")

    # The latent whose five most promoted words hold the most tools.
    effects = latent_effects(sae, model, k=5)
    tools = torch.tensor([ID[word] for word in TOOLS])
    score = (torch.isin(effects.promoted, tools) * effects.promoted_by).sum(1)
    latent = int(score.argmax())
    print(f"latent {latent} promotes", [WORDS[i] for i in effects.promoted[latent]])

    words = ["the", "cat", "and", "the", "dog", "near", "the"]
    prompt = torch.tensor([[ID[word] for word in words]])
    strengths = [0.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    shares = []
    for strength in strengths:
        with torch.no_grad(), sk.intervene(model, {LAYER: sae}, [set_to(latent, strength, at=-1)]):
            shares.append(float(model(prompt).logits[0, -1].softmax(-1)[tools].sum()))
        print(f"set to {strength:g}: the next word is a tool with probability {shares[-1]:.3f}")
    assert shares[-1] > shares[0] + 0.3

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    axes.plot(strengths, shares, marker="o")
    axes.set(xlabel=f"value of latent {latent}", ylabel="P(next word is a tool)", ylim=(0, 1))
    axes.set_title(" ".join([*words, "..."]))
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "steer.png", dpi=150)


if __name__ == "__main__":
    main()
