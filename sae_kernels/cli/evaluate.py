"""``sae-kernels eval``."""

from pathlib import Path
from typing import Annotated

import typer

from sae_kernels.cli.options import Debug, Json, Verify
from sae_kernels.cli.output import Output


def evaluate(
    sae: Annotated[str, typer.Argument(help="A folder of a saved SAE, or a hub name.")],
    data: Annotated[Path, typer.Argument(help="A folder of activations.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Tokens at a time.")] = 4096,
    verify: Verify = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure an SAE: FVU, explained variance, L0, cosine, dead and dense latents."""
    from sae_kernels import train as training
    from sae_kernels.nn import TopKSAE

    source = training.ShardDataset(data)
    if verify:
        source.verify()
    measured = training.evaluate(TopKSAE.from_pretrained(sae), source, batch_size=batch_size)
    density = measured.latent_density
    n_dead = int((density == 0).sum())
    n_dense = round(measured.dense_fraction * len(density))
    values = {
        **measured.scalars(),
        "n_latents": len(density),
        "n_dead": n_dead,
        "n_dense": n_dense,
    }
    output = Output(as_json)
    output.record(values)
    output.table(
        [
            ("tokens", f"{measured.n_tokens:,}"),
            ("FVU", f"{measured.fvu:.5f}"),
            ("explained variance", f"{measured.explained_variance:.5f}"),
            ("L0", f"{measured.l0:.2f}"),
            ("cosine", f"{measured.cosine:.5f}"),
            ("dead latents", f"{n_dead:,} of {len(density):,} fired on none of these tokens"),
            ("dense latents", f"{n_dense:,} of {len(density):,} fired on more than a tenth"),
        ]
    )
