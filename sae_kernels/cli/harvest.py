"""``sae-kernels harvest``."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_kernels.cli.files import check_free
from sae_kernels.cli.options import Debug, Json, Overwrite
from sae_kernels.cli.output import Output


def harvest(
    model: Annotated[str, typer.Argument(help="A folder, or a name on the Hugging Face hub.")],
    layer: Annotated[str, typer.Option(help="Dotted path of a module, as encoder.layer.4.")],
    out: Annotated[Path, typer.Option(help="Folder of the shards.")],
    text: Annotated[
        list[Path] | None,
        typer.Argument(help="Text files, .jsonl files (key text), folders of them."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(help="In place of TEXT: a Hugging Face dataset, by folder or hub name."),
    ] = None,
    subset: Annotated[str | None, typer.Option(help="Configuration of the dataset.")] = None,
    split: Annotated[str | None, typer.Option(help="Its split, else train.")] = None,
    column: Annotated[str | None, typer.Option(help="Its column of text, else text.")] = None,
    revision: Annotated[str | None, typer.Option(help="Its commit, tag or branch.")] = None,
    batch_size: Annotated[int, typer.Option(help="Chunks of full length at once.")] = 16,
    context_length: Annotated[int, typer.Option(help="Tokens the model sees at once.")] = 128,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens.")] = None,
    dtype: Annotated[
        str, typer.Option(metavar="float32|bfloat16|float16", help="Stored dtype.")
    ] = "float32",
    keep_special_tokens: Annotated[
        bool, typer.Option("--keep-special-tokens", help="Keep [CLS] and the like.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Store the output of a model's layer for every token of some text."""
    from sae_kernels import harvest as harvesting
    from sae_kernels.data.shard_index import DTYPES

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
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
            drop_special_tokens=not keep_special_tokens,
            metadata={"dataset": {"name": dataset, **chosen}} if dataset else None,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    made = {"folder": out, "n_tokens": n_tokens, "model": model, "layer": layer, "dtype": dtype}
    output.record({**made, "seconds": seconds})
    output.text(f"{n_tokens:,} tokens of {layer} in {out}, {seconds:.1f} seconds")


def _documents(
    text: list[Path] | None, dataset: str | None, chosen: dict[str, Any]
) -> Iterable[str]:
    """The texts of files, or of a dataset, of which ``chosen`` says the part."""
    from sae_kernels import harvest as harvesting

    if bool(text) == bool(dataset):
        raise ValueError(f"expected either TEXT or --dataset, got {'both' if text else 'neither'}")
    if dataset:
        return harvesting.dataset_documents(dataset, **chosen)
    if chosen:
        raise ValueError(f"--{next(iter(chosen))} goes with --dataset, which is not given")
    return harvesting.read_documents(text or [])
