"""Top activating tokens as lines of text, each lined up on its strongest token."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from .data import LatentExamples, TokenContext

_VISIBLE = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥"})
# How tokenizers write the space before a word and the end of a line.
_SPACES = str.maketrans({"Ġ": " ", "▁": " ", "Ċ": "\n"})


class Token(NamedTuple):
    """A token of a context with its activation and background colour.

    Attributes:
        gap: the space before it.
        text: its visible text.
        activation: of the latent, at this token.
        strength: of the colour behind it, 0 to 1; None for a token without one.
    """

    gap: str
    text: str
    activation: float
    strength: float | None


class ContextLine(NamedTuple):
    """A context of a latent: the tokens before its peak, the peak, and those after it."""

    left: list[Token]
    peak: Token
    right: list[Token]


class Card(NamedTuple):
    """A latent on the page: the words it peaks on with their counts, and its contexts."""

    example: LatentExamples
    words: list[tuple[str, int]]
    lines: list[ContextLine]


def card(example: LatentExamples) -> Card:
    """Lays out the contexts of a latent for the page."""
    words = Counter(peak_word(c) for c in example.contexts).most_common(4)
    # The scale ends at what is shown if the recorded maximum is missing or too small for it.
    shown = [a for c in example.contexts for a in c.activations]
    scale = max((a for a in [*shown, example.max_activation] if math.isfinite(a)), default=0.0)
    return Card(example, words, [_line(c, scale) for c in example.contexts])


def peak_word(context: TokenContext) -> str:
    """The whole word around the peak, '##' continuation pieces joined."""
    first, last = context.peak, context.peak + 1
    while first > 0 and _continues(context.tokens[first]):
        first -= 1
    while last < len(context.tokens) and _continues(context.tokens[last]):
        last += 1
    return "".join(text for _, text in text_pieces(context.tokens[first:last])).strip()


def _line(context: TokenContext, scale: float) -> ContextLine:
    tokens = [
        Token(gap, text, a, None if a == 0 and i != context.peak else _strength(a, scale))
        for i, ((gap, text), a) in enumerate(
            zip(text_pieces(context.tokens), context.activations, strict=True)
        )
    ]
    return ContextLine(tokens[: context.peak], tokens[context.peak], tokens[context.peak + 1 :])


def _strength(activation: float, scale: float) -> float:
    strength = min(max(activation / scale, 0.0), 1.0) if scale > 0 else 0.0
    return strength if math.isfinite(strength) else 0.0


def _continues(token: str) -> bool:
    return token.startswith("##") and len(token) > 2


def text_pieces(tokens: list[str]) -> list[tuple[str, str]]:
    """Splits each token into the space before it and its visible text."""
    tokens = [token.translate(_SPACES) for token in tokens]
    # Tokenisers that keep the space inside the token need none added between tokens.
    spaced = not any(token.startswith(" ") for token in tokens)
    pieces = []
    for index, token in enumerate(tokens):
        text = token[2:] if _continues(token) else token
        bare = text.lstrip(" ")
        own = text[: len(text) - len(bare)] if bare else ""
        added = " " if spaced and index and not _continues(token) else ""
        pieces.append((added + own, (bare or text).translate(_VISIBLE)))
    return pieces
