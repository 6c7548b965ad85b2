"""Top activating tokens as HTML: one line per context, lined up on its strongest token."""

from __future__ import annotations

import math
from collections import Counter
from html import escape
from typing import TYPE_CHECKING

from .units import number, percent

if TYPE_CHECKING:
    from .data import Context, LatentExamples

_VISIBLE = str.maketrans({"\n": "↵", "\r": "↵", "\t": "⇥"})


def latents_section(examples: list[LatentExamples]) -> str:
    """Return the index and one card per latent; a plain sentence if there are none."""
    if not examples:
        return '<p class="muted">No example latents were recorded for this run.</p>'
    chips = "".join(
        f'<li><a href="#latent-{e.latent}">{e.latent}{_hint(e)}</a></li>' for e in examples
    )
    cards = "\n".join(_card(e) for e in examples)
    return f'<nav aria-label="Latents shown"><ul class="chips">{chips}</ul></nav>\n{cards}'


def peak_word(context: Context) -> str:
    """Return the whole word around the peak, joining '##' continuation pieces."""
    first, last = context.peak, context.peak + 1
    while first > 0 and _continues(context.tokens[first]):
        first -= 1
    while last < len(context.tokens) and _continues(context.tokens[last]):
        last += 1
    return "".join(text for _, text in _pieces(context.tokens[first:last])).strip()


def _hint(example: LatentExamples) -> str:
    words = Counter(peak_word(c) for c in example.contexts).most_common(1)
    return f" <span>{escape(words[0][0])}</span>" if words else ""


def _card(example: LatentExamples) -> str:
    words = Counter(peak_word(c) for c in example.contexts).most_common(4)
    peaks = ", ".join(
        f"<b>{escape(word)}</b>" + (f"\u202f\u00d7\u202f{times}" if times > 1 else "")
        for word, times in words
    )
    # The scale ends at what is shown if the recorded maximum is missing or too small for it.
    shown = [a for c in example.contexts for a in c.activations]
    scale = max((a for a in [*shown, example.max_activation] if math.isfinite(a)), default=0.0)
    rows = "\n".join(_row(c, scale) for c in example.contexts)
    body = f'<ol class="contexts">\n{rows}\n</ol>' if rows else (
        '<p class="muted">It fired on no token of the sample.</p>'
    )  # fmt: skip
    return f"""<article class="latent" id="latent-{example.latent}">
<header><h3>Latent {example.latent}</h3><p>{f"peaks on {peaks}" if peaks else ""}</p>
<p class="muted">fires on {percent(example.density)} of tokens,
max activation {number(example.max_activation)}</p></header>
{body}
</article>"""


def _row(context: Context, scale: float) -> str:
    pieces = _pieces(context.tokens)
    html = [
        gap + _token(text, activation, scale, index == context.peak)
        for index, ((gap, text), activation) in enumerate(
            zip(pieces, context.activations, strict=True)
        )
    ]
    # The gap before the peak belongs to its left neighbour, that after it to its right one.
    gap, peak = pieces[context.peak][0], html[context.peak]
    left = "".join(html[: context.peak]) + gap
    right = "".join(html[context.peak + 1 :])
    value = number(context.activations[context.peak])
    # Focus unfolds a row that is cut off at a narrow window's edges; see the style sheet.
    return (
        f'<li tabindex="0"><span class="value">{value}</span>'
        f'<span class="line"><span class="left"><span>{left}</span></span>'
        f'{peak[len(gap) :]}<span class="right">{right}</span></span></li>'
    )


def _token(text: str, activation: float, scale: float, is_peak: bool) -> str:
    strength = min(max(activation / scale, 0.0), 1.0) if scale > 0 else 0.0
    if not math.isfinite(strength):
        strength = 0.0
    if activation == 0 and not is_peak:
        return escape(text)
    tag = "mark" if is_peak else "span"
    title = f"activation {number(activation)}"
    return f'<{tag} style="--a:{strength:.2f}" title="{title}">{escape(text)}</{tag}>'


def _continues(token: str) -> bool:
    return token.startswith("##") and len(token) > 2


def _pieces(tokens: list[str]) -> list[tuple[str, str]]:
    """Split each token into the space before it and its visible text."""
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
