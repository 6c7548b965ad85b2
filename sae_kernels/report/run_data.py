"""The activations on which a report measures an SAE, and their tokens."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sae_kernels.data.joint import side_by_side
from sae_kernels.data.shard_index import INDEX
from sae_kernels.data.shards import ShardDataset
from sae_kernels.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from sae_kernels.data.rows import Rows, RowSource

    ToTokens = Callable[[list[int]], list[str]]


class FirstRows:
    """A row source of the first ``n`` rows of another."""

    def __init__(self, source: RowSource, n_tokens: int) -> None:
        self._source = source
        self.n_tokens = min(n_tokens, source.n_tokens)
        self.d_in, self.dtype = source.d_in, source.dtype

    def rows(self, start: int, stop: int) -> Rows:
        """Rows `start` to `stop`."""
        return self._source.rows(start, stop)


class RunActivations(NamedTuple):
    """The folders of activations that a report measures on.

    Attributes:
        layers: what the SAE reads.
        targets: what a transcoder is to reconstruct.
        training: whether the SAE was trained on them.
    """

    layers: list[ShardDataset]
    targets: list[ShardDataset]
    training: bool

    @property
    def name(self) -> str:
        """The name of these tokens on the page, "training" or "evaluation"."""
        return "training" if self.training else "evaluation"

    def source(self) -> RowSource:
        """The layers' rows, concatenated."""
        return side_by_side(self.layers)

    def target(self) -> RowSource | None:
        """The targets' rows, concatenated; None if there are none."""
        return side_by_side(self.targets) if self.targets else None


def opened(
    data: Sequence[str | Path], targets: Sequence[str | Path], tables: Mapping[str, Any]
) -> RunActivations | None:
    """Opens the given folders, or the run's own.

    None if none are given and the run's own lie in memory, in a stream, or not there any more.

    Raises:
        DataError: a folder that is no data set, or a damaged one.
        ValueError: a target alone.
    """
    own = tables.get("data", {})
    folders, goals = own.get("folders", []), own.get("target", [])
    if data:
        seen = {Path(folder).resolve() for folder in folders}
        return _open(data, targets, training=any(Path(each).resolve() in seen for each in data))
    if targets:
        raise ValueError("target: expected the data that the transcoder reads too, got none")
    if not folders or not all((Path(each) / INDEX).is_file() for each in (*folders, *goals)):
        return None
    return _open(folders, goals, training=True)


def _open(
    data: Sequence[str | Path], targets: Sequence[str | Path], training: bool
) -> RunActivations:
    layers, goals = ([ShardDataset(folder) for folder in each] for each in (data, targets))
    return RunActivations(layers, goals, training)


def tokens_of(
    name: str | Path | None, activations: RunActivations, tables: Mapping[str, Any]
) -> ToTokens | None:
    """The id-to-token function of a named tokenizer, or of the activations' local model.

    None if the activations have no tokens beside them, or no such model is there.
    """
    if not {"tokens", "documents"} <= set(activations.layers[0].columns):
        return None
    if name is not None:
        return to_tokens(name)
    for record in (activations.layers[0].metadata, tables.get("data", {})):
        model = record.get("model")
        if isinstance(model, str) and Path(model).is_dir():
            try:
                return to_tokens(model)
            except (ModelError, ImportError):
                return None
    return None


def to_tokens(name: str | Path) -> ToTokens:
    """Loads a tokenizer as a function from ids to tokens; no code of its folder runs.

    Raises:
        ModelError: nothing there, or nothing that loads under this rule.
        ImportError: transformers is not installed.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ImportError(
            'a tokenizer needs transformers: pip install "sae-kernels[harvest]"'
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(name), trust_remote_code=False, local_files_only=Path(name).exists()
        )
    except Exception as error:  # each kind of tokenizer fails in its own way
        raise ModelError(
            f"tokenizer: expected a folder or a hub name, got {str(name)!r}: "
            f"{' '.join(str(error).split()):.300}"
        ) from error
    return to_text(tokenizer)


def to_text(tokenizer: PreTrainedTokenizerBase) -> ToTokens:
    """A tokenizer as a function from ids to tokens."""
    return lambda ids: [str(token) for token in tokenizer.convert_ids_to_tokens(ids)]
