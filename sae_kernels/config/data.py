"""Where the activations of a run come from."""

from __future__ import annotations

import dataclasses
from typing import Any

from sae_kernels.config.base import Limit, Settings, setting

_ONE = Limit("an integer of at least 1", least=1)
_STORED = ("folders", "target", "check_on_read")  # what a run on stored activations goes by


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Activations on disk, or straight from a language model."""

    table = "data"

    folders: tuple[str, ...] = setting(
        (),
        "folders of stored activations; a crosscoder's layers in order",
    )
    target: str | None = setting(None, "folder of what a transcoder is to reconstruct")
    check_on_read: bool = setting(False, "compare each shard's SHA-256 when it is first read")
    model: str | None = setting(
        None,
        "in the place of folders, a language model: a folder or a name on the hub. Its "
        "activations are made while training, and not stored",
    )
    layer: tuple[str, ...] = setting(
        (),
        "dotted path of the model's module whose output is learnt, as h.6; a crosscoder's several",
    )
    target_layer: str | None = setting(
        None,
        "the module whose output a transcoder is to reconstruct",
    )
    text: tuple[str, ...] = setting(
        (),
        "files or folders of text for the model: .txt, .jsonl (key text)",
    )
    dataset: str | None = setting(
        None,
        "in the place of text, a dataset: a folder or a name on the hub",
    )
    dataset_subset: str | None = setting(None, "the configuration, where a dataset has several")
    dataset_revision: str | None = setting(
        None,
        "the commit, tag or branch on the hub; to resume exactly, name a commit",
    )
    dataset_split: str = setting("train", "the part of the dataset")
    dataset_column: str = setting("text", "the column of the dataset that holds the text")
    context_length: int = setting(128, "tokens that the model sees at once", _ONE)
    model_batch_size: int = setting(
        16,
        "chunks of full length that go through the model at once",
        _ONE,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.model is None:
            self._expect_no_model()
        else:
            self._expect_text_for_the_model()

    def _expect_no_model(self) -> None:
        for name in ("layer", "target_layer", "text", "dataset"):
            if getattr(self, name):
                raise ValueError(f"{name}: expected a model with it, got none; give model too")

    def _expect_text_for_the_model(self) -> None:
        if self.folders:
            raise ValueError(
                f"model: expected stored activations or a model, got {', '.join(self.folders)} "
                f"and {self.model}; leave out one of them"
            )
        if self.target is not None:
            raise ValueError("target: expected target_layer with a model, got a folder")
        if not self.layer:
            raise ValueError("layer: expected the dotted path of the model's layer, got none")
        if bool(self.text) == bool(self.dataset):
            got = "both" if self.text else "neither"
            raise ValueError(f"text: expected text or a dataset for the model, got {got}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of a run on stored activations only what counts there, and so with a model.

        Example:
            >>> DataConfig(folders=("acts",)).to_dict()
            {'folders': ('acts',), 'check_on_read': False}
        """
        if not self.model and not self.folders:
            return {}
        values = super().to_dict()
        kept = [name for name in values if (name in _STORED) != bool(self.model)]
        return {name: values[name] for name in kept if values[name] is not None}
