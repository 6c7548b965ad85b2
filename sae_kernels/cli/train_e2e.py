"""Command ``sae-kernels train-e2e``: trains an SAE through a language model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_kernels.cli.data import absolute, loading
from sae_kernels.cli.files import check_free
from sae_kernels.cli.options import Debug, DeviceMap, Json, ModelDtype, Overwrite, Resume
from sae_kernels.cli.output import Output
from sae_kernels.cli.progress import follow, summarise
from sae_kernels.cli.settings import arch_help, given, with_flags, with_given
from sae_kernels.cli.start import interruptible
from sae_kernels.config.row_filter import DEFAULT_FILTER, RowFilter
from sae_kernels.training import run_config
from sae_kernels.training.end_to_end import EndToEnd
from sae_kernels.training.run_config import RunConfig, Widths, kind_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sae_kernels.config.toml import Tables
    from sae_kernels.harvest import TokenBatch
    from sae_kernels.nn import SAEConfig


_TABLES = ("sae", "objective", "optimizer", "train", "output")


@with_flags(RowFilter, *_TABLES)
def train_e2e(
    model: Annotated[
        str, typer.Argument(help="Language model: a folder, or a name on the Hugging Face hub.")
    ],
    text: Annotated[
        list[Path],
        typer.Argument(help="Text files, .jsonl files with the key text, or folders of them."),
    ],
    layer: Annotated[str, typer.Option(help="Dotted path of the module to reconstruct, as h.6.")],
    out: Annotated[Path, typer.Option(help="Folder for the run.")],
    arch: Annotated[str | None, typer.Option(help=arch_help("layer"))] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="TOML: arch, and the tables "
            + ", ".join(f"[{name}]" for name in _TABLES)
            + "; flags take precedence."
        ),
    ] = None,
    kl_coefficient: Annotated[
        float, typer.Option(help="Weight of KL(clean || spliced) of the next-token predictions.")
    ] = EndToEnd.kl_coefficient,
    downstream_layer: Annotated[
        list[str] | None,
        typer.Option(help="Later layer whose output the SAE should preserve; may be repeated."),
    ] = None,
    downstream_coefficient: Annotated[
        float, typer.Option(help="Weight of the mean FVU of the downstream layers.")
    ] = EndToEnd.downstream_coefficient,
    reconstruction_coefficient: Annotated[
        float, typer.Option(help="Weight of the FVU at the layer itself, the reconstruction loss.")
    ] = EndToEnd.reconstruction_coefficient,
    context_length: Annotated[
        int, typer.Option(min=1, help="Tokens per sequence of the model.")
    ] = 128,
    sequences_per_batch: Annotated[
        int | None, typer.Option(min=1, help="Sequences per step. [default: batch_size tokens]")
    ] = None,
    model_dtype: ModelDtype = None,
    device_map: DeviceMap = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Train an SAE end to end, on a language model's predictions."""
    from sae_kernels import harvest as harvesting
    from sae_kernels.training import end_to_end
    from sae_kernels.training.end_to_end.layer import layer_width

    weights = EndToEnd(
        kl_coefficient,
        downstream_coefficient,
        reconstruction_coefficient,
        tuple(downstream_layer or ()),
    )
    row_filter = with_given(DEFAULT_FILTER, flags)
    flags["batch_size"] = _tokens(flags["batch_size"], sequences_per_batch, context_length)
    tables = given(config, flags, arch, _TABLES)
    _check_data(tables)
    if not resume:
        check_free(out, overwrite)
    harvesting.read_documents(text)  # missing files are noticed before the model loads
    output = Output(as_json)
    again = "the same command with --resume"
    with interruptible(again, out), output.progress() as show:
        device = None if device_map else run_config.train_config(tables).device
        with loading(show):
            loaded, tokenizer = harvesting.load_causal_model(
                model, device=device, dtype=model_dtype, device_map=device_map
            )
        widths = Widths([layer_width(loaded, layer, weights)])
        settings = RunConfig.from_tables(tables, widths)
        settings.expect_one_process()
        sae_config, train_config = settings.sae, settings.train
        _check_layers(sae_config)
        options = {
            "batch_size": max(1, train_config.batch_size // context_length),
            "context_length": context_length,
            "row_filter": row_filter,
        }
        batches = _Text(loaded, tokenizer, text, options)
        sae = end_to_end.prepare_end_to_end(
            loaded, batches, layer, sae_config, train_config, row_filter=row_filter
        )
        result = end_to_end.train_end_to_end(
            loaded,
            batches,
            layer,
            sae,
            train_config,
            weights,
            folder=out,
            output=settings.output,
            metadata=absolute({"model": model, "text": list(map(str, text))})
            | {
                "model_dtype": model_dtype,
                "context_length": context_length,
                **row_filter.to_table(),
            },
            resume=resume,
            overwrite=overwrite,
            on_step=follow(output, show, train_config.steps),
        )
    summarise(output, result, out, ("loss", "kl", "downstream", "fvu", "l0", "sparsity"))


class _Text:
    """Batches of tokens from text files, read anew in each iteration.

    A last batch of less than half the size is left out: its few tokens would count as much as a
    whole batch, and might all be the same one, without variance.
    """

    def __init__(
        self, model: Any, tokenizer: Any, paths: list[Path], options: dict[str, Any]
    ) -> None:
        self.model, self.tokenizer, self.paths, self.options = model, tokenizer, paths, options

    def __iter__(self) -> "Iterator[TokenBatch]":
        from sae_kernels.harvest import read_documents, token_batches

        documents, most = read_documents(self.paths), 0
        for batch in token_batches(self.model, self.tokenizer, documents, **self.options):
            n_tokens = int(batch.attention_mask.sum())
            most = max(most, n_tokens)
            if 2 * n_tokens >= most:
                yield batch


def _tokens(batch_size: int | None, sequences: int | None, context_length: int) -> int | None:
    """The batch size in tokens, given in tokens or in sequences."""
    if sequences is None:
        return batch_size
    if batch_size is not None:
        raise ValueError("--sequences-per-batch: expected it or --batch-size, got both")
    return sequences * context_length


def _check_data(tables: "Tables") -> None:
    if kind_of(tables).preset.data != "layer":
        raise ValueError(
            "--arch: expected one that reconstructs a single layer, got "
            f"{tables['arch']!r}; train it on "
            "stored activations, see sae-kernels train --help"
        )


def _check_layers(sae_config: "SAEConfig") -> None:
    if sae_config.transcodes or sae_config.n_layers > 1:
        kind = "a transcoder" if sae_config.transcodes else "a crosscoder"
        raise ValueError(
            f"d_out, skip, n_layers: expected an SAE that reconstructs a single layer, got {kind}; "
            "train it on stored activations, see sae-kernels train --help"
        )
