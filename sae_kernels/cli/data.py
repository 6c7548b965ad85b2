"""Opens the activations that a run trains on, from disk or from a language model."""

from __future__ import annotations

import functools
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_kernels.cli.files import Data
from sae_kernels.training.run_config import Widths, train_config

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from sae_kernels.cli.output import Progress
    from sae_kernels.config.data import DataConfig
    from sae_kernels.config.toml import Tables
    from sae_kernels.data.rows import RowSource
    from sae_kernels.data.sources import Stream


class RunData(NamedTuple):
    """Opened activations.

    Attributes:
        source: what the trainer reads; a transcoder's inputs and targets side by side.
        widths: widths of the layers and the target.
    """

    source: RowSource | Stream
    widths: Widths


def absolute(data: dict[str, Any]) -> dict[str, Any]:
    """The table [data] with absolute paths."""

    def path(name: Any) -> Any:
        there = isinstance(name, str) and Path(name).exists()
        return str(Path(name).absolute()) if there else name

    def paths(value: Any) -> Any:
        return [path(each) for each in value] if isinstance(value, list | tuple) else path(value)

    names = ("folders", "target", "model", "text", "dataset")
    return {name: paths(value) if name in names else value for name, value in data.items()}


def check_data(config: DataConfig, kind: str) -> None:
    """Raises ValueError for data that do not fit the preset's kind, ``Preset.data``."""
    n_layers = len(config.layer) if config.model else len(config.folders)
    n_targets = len(config.target_layer if config.model else config.target)
    if not n_layers:
        raise ValueError(
            "DATA: expected a folder of activations, or --model with its text, got none"
        )
    if n_targets and kind not in ("target", "targets"):
        raise ValueError(
            "--target: expected none, this architecture reconstructs its input; with --arch "
            "transcoder or skip_transcoder it has another target"
        )
    if kind in ("layers", "targets") and n_layers == 1:
        raise ValueError(
            "DATA: expected a folder for each layer of the crosscoder or cross-layer transcoder, "
            "got one folder"
        )
    if kind in ("target", "targets") and not n_targets:
        raise ValueError("--target: expected the activations that the transcoder reconstructs")
    if kind == "targets" and n_targets != n_layers:
        raise ValueError(
            f"--target: expected one for each of the {n_layers} layers, got {n_targets}"
        )


def opener(
    config: DataConfig, tables: Tables, show: Progress, *, verify: bool = False
) -> Callable[[DataConfig], RunData]:
    """A function that opens a run's data; it loads the model of ``config`` once for all runs.

    Args:
        config: the settings that all runs share; those of the layers or folders may differ.
        tables: all settings of a run, for those of training.
        show: shows that the model is being loaded.
        verify: compare the checksums of folders.
    """
    if not config.model:
        return functools.cache(functools.partial(open_stored, verify=verify))
    from sae_kernels import harvest

    train, documents = train_config(tables), _documents(config)
    device = None if config.device_map else train.device
    with loading(show):
        model, tokenizer = harvest.load_model(
            config.model, device=device, dtype=config.model_dtype, device_map=config.device_map
        )

    def open_live(own: DataConfig) -> RunData:
        layers = (*own.layer, *own.target_layer)
        source = harvest.LiveBatches(
            model,
            tokenizer,
            documents,
            layers,
            train.batch_size,
            seed=train.order_seed,
            model_batch_size=config.model_batch_size,
            context_length=config.context_length,
            row_filter=config.row_filter,
        )
        widths = list(source.widths)
        n_layers = len(own.layer)
        return RunData(source, Widths(widths[:n_layers], widths[n_layers:]))

    return functools.cache(open_live)


def open_stored(config: DataConfig, verify: bool = False) -> RunData:
    """Opens folders of activations without reading them, unless to ``verify`` their checksums."""
    from sae_kernels.data import JointRows

    folders, targets = ([Path(f) for f in each] for each in (config.folders, config.target))
    data = Data.open(folders, targets, config.check_on_read)
    if verify:
        data.verify()
    widths = Widths([s.d_in for s in data.layers], [s.d_in for s in data.targets])
    whole = data.source if data.target is None else JointRows([data.source, data.target])
    return RunData(whole, widths)


@contextmanager
def loading(show: Progress) -> Iterator[None]:
    """Shows that a model is being loaded in the block."""
    show("load model", 0, 1)
    yield
    show("load model", 1, 1)


def _documents(config: DataConfig) -> Iterable[str] | Callable[[], Iterable[str]]:
    """The text for the model, as something that can be iterated over repeatedly."""
    from sae_kernels import harvest

    if config.dataset is None:
        harvest.read_documents(config.text)  # missing files are noticed before the model loads
        return functools.partial(harvest.read_documents, config.text)
    return harvest.dataset_documents(
        config.dataset,
        subset=config.dataset_subset,
        split=config.dataset_split,
        column=config.dataset_column,
        revision=config.dataset_revision,
    )
