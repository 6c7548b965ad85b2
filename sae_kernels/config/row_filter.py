"""Settings of the activations that are left out: special tokens, sinks, rows of enormous norm."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from sae_kernels.config.base import NATURAL, POSITIVE, Settings, setting

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class RowFilter(Settings):
    """Filter of a model's activations, for storing, streaming and splicing them.

    Attention sinks, BOS and the first token of a sequence often have a norm a hundred times that
    of other rows: in a sum of squared errors a thousandth of such rows outweighs all others.

    By default special tokens are left out, and rows whose norm is more than 10 times the median.
    Others keep all unless told: dictionary_learning (whose own example sets 10, and drops BOS) and
    SAELens (exclude_special_tokens).
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

    @classmethod
    def recorded(cls, facts: Mapping[str, Any]) -> RowFilter | None:
        """The filter among recorded facts of activations; None if they do not tell.

        Facts are the metadata of stored activations, or ``metadata["activations"]`` of an SAE. A
        filter that they leave out part of is completed by what was not left out.

        Raises:
            ValueError: a value out of range.

        Example:
            >>> RowFilter.recorded({"drop_first": 1, "layer": "h.6"}).describe()
            'the first token of each sequence'
        """
        names = [field.name for field in dataclasses.fields(RowFilter)]
        known = {name: facts[name] for name in names if name in facts}
        return RowFilter(**{**KEEP_ALL.to_dict(), **known}) if known else None

    def to_json(self) -> dict[str, Any]:
        """The values by name as JSON gives them back: with lists for tuples."""
        names = [field.name for field in dataclasses.fields(RowFilter)]
        values = {name: getattr(self, name) for name in names}
        return {**values, "drop_tokens": list(self.drop_tokens)}

    def describe(self, max_norm: float | None = None) -> str:
        """The filter in words, for people; ``max_norm`` is the bound that the multiple came to.

        Example:
            >>> RowFilter(drop_first=1).describe(max_norm=86.5)
            'special tokens, the first token of each sequence, norms above 86.5'
        """
        first = "token" if self.drop_first == 1 else f"{self.drop_first} tokens"
        norms = f"norms above {self.max_norm_multiple} times the median"
        parts = (
            (self.drop_special_tokens, "special tokens"),
            (self.drop_first, f"the first {first} of each sequence"),
            (self.drop_tokens, f"tokens {', '.join(map(str, self.drop_tokens))}"),
            (self.max_norm_multiple and max_norm is None, norms),
            (max_norm is not None, f"norms above {max_norm or 0:.4g}"),
        )
        return ", ".join(words for holds, words in parts if holds) or "nothing"


DEFAULT_FILTER = RowFilter()
KEEP_ALL = RowFilter(drop_special_tokens=False, max_norm_multiple=None)
