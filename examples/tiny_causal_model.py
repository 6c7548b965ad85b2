"""A causal model to try things on: 0.85 million parameters, over bytes, of Python's own text.

It was trained on what every Python ships, the language reference of ``pydoc`` and the modules of
the standard library; transformers' Llama class reads it, and other examples import it. Run it to
see how well it predicts; with ``--train 2000`` it is trained anew, some minutes on two cores. The
picture is ``examples-out/tiny_causal_model.png``.
"""

from __future__ import annotations

import math
import sys
import sysconfig
from pathlib import Path
from pydoc_data import topics
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import sae_kernels as sk
from sae_kernels.harvest.model import layer_outputs, resolve_layer
from sae_kernels.plotting.figure import Drawing, render

FOLDER = Path(__file__).parent / "data" / "tiny_causal_model"
CONTEXT, HELD_OUT = 128, 10  # bytes in a window; every tenth document is not trained on


def load() -> LlamaForCausalLM:
    """The trained model, in fp32."""
    logging.disable_progress_bar()
    return LlamaForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def out(name: str) -> Path:
    """The path of an output file of the examples; its folder is made."""
    (folder := Path("examples-out")).mkdir(exist_ok=True)
    return folder / name


def documents() -> list[bytes]:
    """The topics of the language reference, then the top-level modules of the standard library."""
    library = Path(sysconfig.get_paths()["stdlib"])
    modules = [path.read_bytes() for path in sorted(library.glob("*.py"))]
    return [topics.topics[name].encode() for name in sorted(topics.topics)] + modules


def windows(texts: list[bytes], count: int, seed: int = 0) -> Tensor:
    """Token ids [count, CONTEXT] of windows cut at random places."""
    joined = torch.frombuffer(bytearray(b"".join(texts)), dtype=torch.uint8)
    drawn = torch.Generator().manual_seed(seed)
    starts = torch.randint(len(joined) - CONTEXT, (count,), generator=drawn)
    return joined[starts[:, None] + torch.arange(CONTEXT)].long()


def outputs(model: LlamaForCausalLM, layers: list[str], batch: Tensor) -> dict[str, Tensor]:
    """The layers' outputs [tokens, D], without each row's first token, which is unlike others."""
    with torch.no_grad():
        found = layer_outputs(
            model, [resolve_layer(model, name) for name in layers], input_ids=batch
        )
    return {layer: x[:, 1:].flatten(0, 1) for layer, x in zip(layers, found, strict=True)}


def train_sae(x: Tensor, n_latents: int = 1024, lr: Any = None, **settings: Any) -> sk.TopKSAE:
    """A TopK SAE of activations, trained for some seconds."""
    d_in = x.shape[1] // settings.get("n_layers", 1)
    sae = sk.TopKSAE(d_in, n_latents, k=16, **settings)
    sk.train(sae, x, steps=400, batch_size=1024, **({} if lr is None else {"lr": lr}))
    return sae


def train(steps: int, texts: list[bytes]) -> LlamaForCausalLM:
    """A model trained by AdamW with a warm-up and a cosine, 4096 bytes a step."""
    torch.manual_seed(0)
    shape = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 384}
    depth = {"num_hidden_layers": 4, "num_attention_heads": 4, "tie_word_embeddings": True}
    none = {"bos_token_id": None, "eos_token_id": None, "max_position_embeddings": CONTEXT}
    model = LlamaForCausalLM(LlamaConfig(**shape, **depth, **none)).train()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.05)
    for step in range(steps):
        lr = 2e-3 * min(1, (step + 1) / 100) * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = lr
        batch = windows(texts, 4096 // CONTEXT, seed=step)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: {float(loss.detach()):.3f} nats a byte", flush=True)
    return model.eval()


def main() -> None:
    texts = documents()
    held_out, seen = texts[::HELD_OUT], [t for i, t in enumerate(texts) if i % HELD_OUT]
    if sys.argv[1:2] == ["--train"]:
        train(int(sys.argv[2]), seen).to(torch.bfloat16).save_pretrained(FOLDER)
    model, batch = load().requires_grad_(False), windows(held_out, 64)
    log_p = model(input_ids=batch).logits[:, :-1].log_softmax(-1)
    losses = -log_p.gather(-1, batch[:, 1:, None])[..., 0].mean(0)

    def draw(figure) -> None:
        axes = figure.subplots()
        axes.plot(range(1, CONTEXT), losses.tolist())
        axes.set_xlabel("bytes read before the one that is predicted")
        axes.set_ylabel("nats a byte, text not trained on")

    (picture,) = render([Drawing("losses", draw)], "the picture")
    out("tiny_causal_model.png").write_bytes(picture.png)
    said = model.generate(torch.tensor([list(b"class ")]), max_new_tokens=60, do_sample=False)
    print(f"{model.num_parameters():,} parameters, {losses.mean():.3f} nats a byte")
    print(bytes(said[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
