"""Settings of a run's activations: folders on disk, or a language model and its text."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from sae_kernels.config.base import Limit, setting
from sae_kernels.config.row_filter import RowFilter

_ONE = Limit("an integer of at least 1", least=1)
_STORED = ("folders", "target", "check_on_read")  # the settings of stored activations


@dataclasses.dataclass(frozen=True)
class DataConfig(RowFilter):
    """Settings of the activations: folders on disk, or a language model and its text.

    The filter of :class:`~sae_kernels.config.row_filter.RowFilter` is for a model's activations:
    those in folders were filtered when they were stored.
    """

    table = "data"

    folders: tuple[str, ...] = setting(
        (), "folders of stored activations; a crosscoder's layers in order"
    )
    target: tuple[str, ...] = setting(
        (),
        "folder of the activations that a transcoder reconstructs; several for a cross-layer "
        "transcoder, in order",
    )
    check_on_read: bool = setting(False, "compare each shard's SHA-256 when it is first read")
    model: str | None = setting(
        None,
        "language model (a folder or a name on the hub) that computes the activations during "
        "training, instead of stored folders",
    )
    model_dtype: Literal["float32", "bfloat16", "float16"] | None = setting(
        None, "dtype of the model's weights and of what it computes; None is the checkpoint's"
    )
    device_map: str | None = setting(
        None,
        "spreads the model over several devices, as transformers and accelerate do: auto, ...; "
        "None puts it on train.device",
    )
    layer: tuple[str, ...] = setting(
        (),
        "dotted path of the model's module whose output the SAE reads, as h.6; several for a "
        "crosscoder",
    )
    target_layer: tuple[str, ...] = setting(
        (),
        "dotted path of the module whose output a transcoder reconstructs; several for a "
        "cross-layer transcoder",
    )
    text: tuple[str, ...] = setting(
        (), "files or folders of text for the model: .txt, or .jsonl with the key text"
    )
    dataset: str | None = setting(
        None, "dataset with the text, instead of text files: a folder or a name on the hub"
    )
    dataset_subset: str | None = setting(None, "configuration of a dataset that has several")
    dataset_revision: str | None = setting(
        None, "commit, tag or branch of the dataset on the hub; only a commit resumes exactly"
    )
    dataset_split: str = setting("train", "split of the dataset")
    dataset_column: str = setting("text", "column of the dataset that holds the text")
    context_length: int = setting(128, "tokens per sequence of the model", _ONE)
    model_batch_size: int = setting(16, "sequences that go through the model at once", _ONE)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            self._expect_no_model()
        else:
            self._expect_text_for_the_model()

    def _expect_no_model(self) -> None:
        for name in ("model_dtype", "device_map", "layer", "target_layer", "text", "dataset"):
            if getattr(self, name):
                raise ValueError(f"{name}: expected a model with it, got none; give model too")
        for field in dataclasses.fields(RowFilter):
            if getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name}: expected a model with it, got none: stored activations were "
                    "filtered when they were harvested; harvest them with it"
                )

    def _expect_text_for_the_model(self) -> None:
        if self.folders:
            raise ValueError(
                f"model: expected stored activations or a model, got {', '.join(self.folders)} "
                f"and {self.model}; leave out one of them"
            )
        if self.target:
            raise ValueError("target: expected target_layer with a model, got a folder")
        if not self.layer:
            raise ValueError("layer: expected the dotted path of the model's layer, got none")
        if bool(self.text) == bool(self.dataset):
            got = "both" if self.text else "neither"
            raise ValueError(f"text: expected text or a dataset for the model, got {got}")

    @property
    def row_filter(self) -> RowFilter:
        """The filter of a model's activations alone."""
        names = (field.name for field in dataclasses.fields(RowFilter))
        return RowFilter(**{name: getattr(self, name) for name in names})

    def to_dict(self) -> dict[str, Any]:
        """The values by name: only those of stored activations, or only those of a model.

        Example:
            >>> DataConfig(folders=("acts",)).to_dict()
            {'folders': ('acts',), 'check_on_read': False}
        """
        if not self.model and not self.folders:
            return {}
        values = super().to_dict()
        kept = [name for name in values if (name in _STORED) != bool(self.model)]
        unset = [
            name for name in kept if values[name] in (None, ()) and not getattr(type(self), name)
        ]
        return {name: values[name] for name in kept if name not in unset}
