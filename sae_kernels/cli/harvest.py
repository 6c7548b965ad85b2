"""Command ``sae-kernels harvest``: stores a model's activations on text."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_kernels.cli.files import check_free
from sae_kernels.cli.options import Debug, Json, Overwrite
from sae_kernels.cli.output import Output
from sae_kernels.cli.settings import with_flags, with_given
from sae_kernels.config.row_filter import DEFAULT_FILTER, RowFilter


@with_flags(RowFilter)
def harvest(
    model: Annotated[
        str, typer.Argument(help="Model: a folder, or a name on the Hugging Face hub.")
    ],
    layer: Annotated[str, typer.Option(help="Dotted path of a module, as encoder.layer.4.")],
    out: Annotated[Path, typer.Option(help="Folder for the activations.")],
    text: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files, .jsonl files with the key text, or folders of them."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="Hugging Face dataset instead of TEXT: a folder or a hub name."),
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of the dataset.")] = None,
    split: Annotated[
        str | None, typer.Option(help="Split of the dataset. [default: train]")
    ] = None,
    column: Annotated[str | None, typer.Option(help="Column of the text. [default: text]")] = None,
    revision: Annotated[
        str | None, typer.Option(help="Commit, tag or branch of the dataset.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences per batch of the model.")] = 16,
    context_length: Annotated[int, typer.Option(help="Tokens per sequence of the model.")] = 128,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after this many tokens.")] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="float32|bfloat16|float16", help="Dtype of the stored activations."),
    ] = "float32",
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Store a layer's output for every token of some text."""
    from sae_kernels import harvest as harvesting
    from sae_kernels.data import ShardDataset
    from sae_kernels.data.shard_index import DTYPES

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    row_filter = with_given(DEFAULT_FILTER, flags)
    check_free(out, overwrite)
    chosen = {"subset": subset, "split": split, "column": column, "revision": revision}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    documents = _documents(text, dataset, chosen)
    output = Output(as_json)
    start, done = time.perf_counter(), 0
    with output.progress() as show:
        show("load model", 0, 1)
        loaded, tokenizer = harvesting.load_model(model)
        show("load model", 1, 1)

        def progress(rows: int) -> None:
            nonlocal done
            done += rows
            show("harvest", done, max_tokens)

        n_tokens = harvesting.harvest(
            loaded,
            tokenizer,
            documents,
            layer,
            out,
            batch_size=batch_size,
            context_length=context_length,
            max_tokens=max_tokens,
            dtype=DTYPES[dtype],
            row_filter=row_filter,
            metadata={"dataset": {"name": dataset, **chosen}} if dataset else None,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    made = {"folder": out, "n_tokens": n_tokens, "model": model, "layer": layer, "dtype": dtype}
    index = ShardDataset(out).metadata
    norms = {name: index[name] for name in ("max_norm", "rows_above_max_norm")}
    output.record({**made, **norms, "seconds": seconds})
    output.text(f"{n_tokens:,} tokens of {layer} in {out}, {seconds:.1f} seconds")
    if above := norms["rows_above_max_norm"]:
        output.text(
            f"{above:,} more ({100 * above / (n_tokens + above):.2f} %) left out, as their norm is "
            f"above {norms['max_norm']:.4g}, {row_filter.max_norm_multiple} times the median; "
            "--max-norm-multiple none keeps them"
        )


def _documents(
    text: list[Path] | None, dataset: str | None, chosen: dict[str, Any]
) -> Iterable[str]:
    """Documents from files, or from a dataset with the options ``chosen``."""
    from sae_kernels import harvest as harvesting

    if bool(text) == bool(dataset):
        raise ValueError(f"expected either TEXT or --dataset, got {'both' if text else 'neither'}")
    if dataset:
        return harvesting.dataset_documents(dataset, **chosen)
    if chosen:
        raise ValueError(f"--{next(iter(chosen))} goes with --dataset, which is not given")
    return harvesting.read_documents(text or [])
