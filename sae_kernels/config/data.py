"""Where the activations of a run come from."""

from __future__ import annotations

import dataclasses
from typing import Any

_LISTS = ("folders", "layer", "text")
_OPTIONAL = ("target", "model", "target_layer", "dataset", "dataset_subset", "dataset_revision")
_NAMES = (*_OPTIONAL, "dataset_split", "dataset_column")
_STORED = ("folders", "target", "check_on_read")  # what a run on stored activations goes by


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Activations on disk, or straight from a language model.

    Attributes:
        folders: of stored activations; a crosscoder's layers in order.
        target: folder of what a transcoder is to reconstruct.
        check_on_read: compare each shard's SHA-256 when it is first read.
        model: in the place of folders, a language model: a folder or a name on the hub. Its
            activations are made while training, and not stored.
        layer: dotted path of the model's module whose output is learnt, as h.6; a crosscoder's
            several.
        target_layer: the module whose output a transcoder is to reconstruct.
        text: files or folders of text for the model: .txt, .jsonl (key text).
        dataset: in the place of text, a dataset: a folder or a name on the hub.
        dataset_subset: the configuration, where a dataset has several.
        dataset_revision: the commit, tag or branch on the hub; to resume exactly, name a commit.
        dataset_split: the part of the dataset.
        dataset_column: the column of the dataset that holds the text.
        context_length: tokens that the model sees at once.
        model_batch_size: chunks of full length that go through the model at once.
    """

    folders: tuple[str, ...] = ()
    target: str | None = None
    check_on_read: bool = False
    model: str | None = None
    layer: tuple[str, ...] = ()
    target_layer: str | None = None
    text: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_subset: str | None = None
    dataset_revision: str | None = None
    dataset_split: str = "train"
    dataset_column: str = "text"
    context_length: int = 128
    model_batch_size: int = 16

    def __post_init__(self) -> None:
        for name in _LISTS:
            value = getattr(self, name)
            value = (value,) if isinstance(value, str) else value
            names = isinstance(value, (list, tuple)) and all(isinstance(v, str) for v in value)
            self._expect(name, names, "a list of names")
            object.__setattr__(self, name, tuple(value))
        for name in _NAMES:
            value = getattr(self, name)
            missing = value is None and name in _OPTIONAL
            self._expect(name, missing or (isinstance(value, str) and value != ""), "a name")
        for name in ("context_length", "model_batch_size"):
            value = getattr(self, name)
            self._expect(name, type(value) is int and value >= 1, "an integer of at least 1")
        self._expect("check_on_read", isinstance(self.check_on_read, bool), "true or false")
        self._check_model()

    def _check_model(self) -> None:
        """Stored activations or a model, and nothing given that would say nothing."""
        if self.model is None:
            for name in ("layer", "target_layer", "text", "dataset"):
                if getattr(self, name):
                    raise ValueError(f"{name}: expected a model with it, got none; give model too")
            return
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

    def _expect(self, name: str, fits: bool, expected: str) -> None:
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {getattr(self, name)!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of a run on stored activations only what counts there, and so with a model.

        Example:
            >>> DataConfig(folders=("acts",)).to_dict()
            {'folders': ('acts',), 'check_on_read': False}
        """
        if not self.model and not self.folders:
            return {}
        values = dataclasses.asdict(self)
        kept = [name for name in values if (name in _STORED) != bool(self.model)]
        return {name: values[name] for name in kept if values[name] is not None}
