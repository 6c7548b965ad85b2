"""Command ``sae-kernels eval``: measures a saved SAE."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sae_kernels.cli.data import loading
from sae_kernels.cli.files import Data
from sae_kernels.cli.options import Debug, Device, DeviceMap, Json, ModelDtype, Verify, placed
from sae_kernels.cli.output import Output
from sae_kernels.cli.settings import with_flags, with_given
from sae_kernels.config.places import activation_facts
from sae_kernels.config.row_filter import KEEP_ALL, RowFilter

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from sae_kernels.cli.output import Progress
    from sae_kernels.harvest.language_model import LanguageModelLoss
    from sae_kernels.nn import SparseAutoencoder
    from sae_kernels.training import Evaluation


@with_flags(RowFilter)
def evaluate(
    sae: Annotated[
        str, typer.Argument(help="A folder of a saved SAE of any format, or a hub name.")
    ],
    data: Annotated[
        list[Path] | None,
        typer.Argument(help="Folder of activations; several for a crosscoder, in order."),
    ] = None,
    target: Annotated[
        list[Path] | None,
        typer.Option(help="Folder of a transcoder's target activations; may be repeated."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Tokens per batch.")] = 4096,
    verify: Verify = False,
    model: Annotated[
        str | None,
        typer.Option(help="Language model to splice the SAE into: a folder or a name on the hub."),
    ] = None,
    layer: Annotated[
        str | None, typer.Option(help="Dotted path of the module that the SAE was trained on.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="Text file, .jsonl file (key text) or folder; may be repeated."),
    ] = None,
    device: Device = None,
    model_dtype: ModelDtype = None,
    device_map: DeviceMap = None,
    model_batch_size: Annotated[int, typer.Option(help="Sequences per batch of the model.")] = 8,
    context_length: Annotated[int, typer.Option(help="Tokens per sequence of the model.")] = 128,
    max_tokens: Annotated[
        int | None, typer.Option(help="Stop after this many tokens of text.")
    ] = None,
    as_json: Json = False,
    debug: Debug = False,
    **flags: Any,
) -> None:
    """Measure an SAE on activations, in its language model, or both.

    In the model, activations that the SAE was not trained on are not replaced: --drop-first,
    --drop-tokens, --drop-special-tokens and --max-norm-multiple are the SAE's own, if it has them
    recorded, else all are replaced.
    """
    _check(data, verify, {"--model": model, "--layer": layer, "--text": text})
    from sae_kernels import formats, training

    output = Output(as_json)
    opened = Data.open(data, target or ()) if data else None
    if opened is not None and verify:
        opened.verify()
    loaded = formats.load(sae)
    values: dict[str, Any] = {}
    rows: list[tuple[str, str]] = []
    if opened is not None:
        measured = training.evaluate(
            loaded, opened.source, target=opened.target, batch_size=batch_size
        )
        values |= _values(measured)
        rows += _rows(measured)
    if model and layer and text:
        options = {
            "batch_size": model_batch_size,
            "context_length": context_length,
            "max_tokens": max_tokens,
        }
        with output.progress() as show:
            place = {"device": device, "dtype": model_dtype, "device_map": device_map}
            loss, facts = _in_model(loaded, model, layer, text, flags, place, options, show)
        values |= {**loss.scalars(), "model": model, "layer": layer, **facts}
        kept = facts["not_replaced"]
        not_replaced = RowFilter.recorded(kept) or KEEP_ALL
        rows += [*_loss_rows(loss), ("not replaced", not_replaced.describe(kept["max_norm"]))]
    output.record(values)
    output.table(rows)


def _check(data: list[Path] | None, verify: bool, of_model: dict[str, object]) -> None:
    """Raises ValueError for options that do not go together."""
    given = [name for name, value in of_model.items() if value]
    missing = [name for name in of_model if name not in given]
    if given and missing:
        raise ValueError(
            f"{' and '.join(given)}: expected {' and '.join(missing)} too, as a language model is "
            "measured on a text at a layer; see sae-kernels eval --help"
        )
    if not data and not given:
        raise ValueError(
            "expected DATA, or --model with --layer and --text, got neither; see sae-kernels eval "
            "--help"
        )
    if not data and verify:
        raise ValueError("--verify: expected DATA, whose checksums it compares, got none")


def _in_model(
    sae: "SparseAutoencoder",
    name: str,
    layer: str,
    text: "Sequence[Path]",
    flags: "Mapping[str, Any]",
    place: dict[str, Any],
    options: dict[str, Any],
    show: "Progress",
) -> "tuple[LanguageModelLoss, dict[str, Any]]":
    """The losses; the model's dtype and device, and which activations kept the model's own."""
    from sae_kernels import harvest as harvesting
    from sae_kernels.harvest.language_model import norm_bound
    from sae_kernels.harvest.norms import recorded_max_norm

    recorded = RowFilter.recorded(activation_facts(sae.metadata)) or KEEP_ALL
    row_filter = with_given(recorded, flags)
    documents = harvesting.read_documents(text)
    with loading(show):
        model, tokenizer = harvesting.load_causal_model(name, **placed(**place))
    sae.to(harvesting.layer_device(model, layer))
    options = {**options, "row_filter": row_filter}
    batches = list(harvesting.token_batches(model, tokenizer, documents, **options))
    max_norm = recorded_max_norm(sae.metadata)
    if flags["max_norm_multiple"] is not None:
        max_norm = norm_bound(model, batches, layer, row_filter.max_norm_multiple)
    done = 0

    def progress(more: int) -> None:
        nonlocal done
        done += more
        show("language model", done, 2 * len(batches))

    loss = harvesting.language_model_loss(
        model, batches, layer, sae, max_norm=max_norm, progress=progress
    )
    not_replaced = {**row_filter.to_dict(), "max_norm": max_norm}
    dtype = str(model.dtype).removeprefix("torch.")
    return loss, {
        "model_dtype": dtype,
        "device": model.device.type,
        "not_replaced": not_replaced,
    }


def _values(measured: "Evaluation") -> dict[str, Any]:
    density = measured.latent_density
    return {
        **measured.scalars(),
        "n_latents": len(density),
        "n_dead": int((density == 0).sum()),
        "n_dense": round(measured.dense_fraction * len(density)),
    }


def _rows(measured: "Evaluation") -> list[tuple[str, str]]:
    values = _values(measured)
    n = values["n_latents"]
    codes, residual = measured.bits_codes, measured.bits_residual
    by_layer = ", ".join(f"{fvu:.5f}" for fvu in measured.layer_fvu)
    return [
        ("tokens", f"{measured.n_tokens:,}"),
        ("FVU", f"{measured.fvu:.5f}"),
        ("FVU, mean over rows", f"{measured.row_fvu:.5f}"),
        *([("FVU by layer", by_layer)] if by_layer else []),
        ("explained variance", f"{measured.explained_variance:.5f}"),
        ("L0", f"{measured.l0:.2f}"),
        ("cosine", f"{measured.cosine:.5f}"),
        ("dead latents", f"{values['n_dead']:,} of {n:,} fired on none of these tokens"),
        ("dense latents", f"{values['n_dense']:,} of {n:,} fired on more than a tenth"),
        (
            "bits per token",
            f"{measured.bits_per_token:,.0f} ({codes:,.0f} codes + {residual:,.0f} residual), "
            f"{measured.bits_without_sae:,.0f} without the SAE",
        ),
    ]


def _loss_rows(loss: "LanguageModelLoss") -> list[tuple[str, str]]:
    return [
        ("predicted tokens", f"{loss.n_predictions:,}"),
        ("loss, clean", f"{loss.clean_loss:.5f} nats per token"),
        ("loss, SAE spliced in", f"{loss.spliced_loss:.5f}"),
        ("loss, layer at zero", f"{loss.zero_loss:.5f}"),
        ("loss, layer at its mean", f"{loss.mean_loss:.5f}"),
        ("loss recovered (zero)", _recovered(loss.loss_recovered)),
        ("loss recovered (mean)", _recovered(loss.loss_recovered_from_mean)),
        ("KL(clean || spliced)", f"{loss.kl:.5f} nats per token"),
    ]


def _recovered(part: float) -> str:
    if math.isnan(part):
        return "undefined: without the layer's output the loss is the clean one"
    return f"{part:.5f}"
