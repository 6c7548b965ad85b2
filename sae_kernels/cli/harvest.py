"""Command ``sae-kernels harvest``: stores a model's activations on text."""

import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from sae_kernels.cli.data import loading
from sae_kernels.cli.files import check_free
from sae_kernels.cli.options import Debug, Device, DeviceMap, Json, ModelDtype, Overwrite, placed
from sae_kernels.cli.output import Output
from sae_kernels.cli.settings import with_flags, with_given
from sae_kernels.cli.start import stopped
from sae_kernels.config.row_filter import DEFAULT_FILTER, RowFilter
from sae_kernels.runs.interrupts import terminable


@with_flags(RowFilter)
def harvest(
    model: Annotated[
        str, typer.Argument(help="Model: a folder, or a name on the Hugging Face hub.")
    ],
    layer: Annotated[
        list[str],
        typer.Option(
            help="Dotted path of a module, as encoder.layer.4; may be repeated, for a folder of "
            "each layer in OUT."
        ),
    ],
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
    on_nonfinite: Annotated[
        str,
        typer.Option(metavar="stop|skip", help="At a row that is NaN or infinite: stop, or skip."),
    ] = "stop",
    rows_per_shard: Annotated[int, typer.Option(help="Rows of a file.")] = 65536,
    device: Device = None,
    model_dtype: ModelDtype = None,
    device_map: DeviceMap = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an unfinished harvest in the folder.")
    ] = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Store the output of one or several layers for every token of some text."""
    from sae_kernels import harvest as harvesting
    from sae_kernels.data.shard_index import DTYPES, Index
    from sae_kernels.harvest.progress import HarvestProgress, refuse_unfinished

    if dtype not in DTYPES:
        raise ValueError(f"--dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    row_filter = with_given(DEFAULT_FILTER, flags)
    if not resume:
        if not overwrite:
            refuse_unfinished(out)
        check_free(out, overwrite)
    chosen = {"subset": subset, "split": split, "column": column, "revision": revision}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    documents = _documents(text, dataset, chosen)
    output = Output(as_json)
    start, done = time.perf_counter(), 0

    def saved() -> str:
        record = HarvestProgress.read(out)
        return f"{record.stored:,} tokens stored" if record else "no file finished yet"

    again = "the same command with --resume"
    with stopped(again, saved), terminable(), output.progress() as show:
        with loading(show):
            place = placed(device, model_dtype, device_map)
            loaded, tokenizer = harvesting.load_model(model, **place)

        def progress(rows: int) -> None:
            nonlocal done
            done += rows
            show("harvest", done, max_tokens)

        n_tokens = harvesting.harvest(
            loaded,
            tokenizer,
            documents,
            layer if len(layer) > 1 else layer[0],
            out,
            batch_size=batch_size,
            context_length=context_length,
            max_tokens=max_tokens,
            dtype=DTYPES[dtype],
            row_filter=row_filter,
            on_nonfinite=on_nonfinite,  # type: ignore[arg-type]
            rows_per_shard=rows_per_shard,
            metadata={"dataset": {"name": dataset, **chosen}} if dataset else None,
            resume=resume,
            overwrite=overwrite,
            progress=progress,
        )
    seconds = time.perf_counter() - start
    folders = [out / name for name in layer] if len(layer) > 1 else [out]
    facts = [Index.read(folder).metadata for folder in folders]
    left_out, above = facts[0]["nonfinite_rows"], facts[0]["rows_above_max_norm"]
    made = {"folder": out, "n_tokens": n_tokens, "nonfinite_rows": left_out, "model": model}
    several, bounds = len(layer) > 1, [each["max_norm"] for each in facts]
    made |= {"layer": layer if several else layer[0], "rows_above_max_norm": above}
    made["max_norm"] = bounds if several else bounds[0]
    output.record({**made, "dtype": dtype, "seconds": seconds})
    what = f"{n_tokens:,} tokens of {', '.join(layer)} in {out}"
    if left_out:
        what += f", {left_out:,} left out that are not finite"
    output.text(f"{what}, {seconds:.1f} seconds" if done else f"{what}, finished before")
    if above:
        output.text(
            f"{above:,} more ({100 * above / (n_tokens + above):.2f} %) left out, as their norm is "
            f"above {', '.join(f'{bound:.4g}' for bound in bounds)}, "
            f"{row_filter.max_norm_multiple} times the median; --max-norm-multiple none keeps them"
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
