"""Settings of the activations that are left out: special tokens, sinks, rows of enormous norm."""

from __future__ import annotations

import dataclasses

from sae_kernels.config.base import NATURAL, POSITIVE, Settings, setting


@dataclasses.dataclass(frozen=True)
class RowFilter(Settings):
    """Which of a model's activations are left out when they are stored, streamed or spliced.

    Attention sinks, BOS and the first token of a sequence often have a norm a hundred times that
    of other rows: in a sum of squared errors a thousandth of such rows outweighs all others.
    """

    table = "data"

    drop_special_tokens: bool = setting(
        True,
        "leave out special tokens, such as [CLS] and BOS, that the tokenizer adds or the text has",
    )
    drop_first: int = setting(
        0, "leave out the first n tokens of each sequence that the model sees", NATURAL
    )
    drop_tokens: tuple[int, ...] = setting((), "leave out the tokens with these ids")
    max_norm_multiple: float | None = setting(
        10.0,
        "leave out rows whose norm is more than this many times the median (dictionary_learning: "
        "10); None keeps them",
        POSITIVE,
    )


DEFAULT_FILTER = RowFilter()
KEEP_ALL = RowFilter(drop_special_tokens=False, max_norm_multiple=None)
