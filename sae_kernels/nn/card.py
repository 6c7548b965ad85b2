"""The model card: what a saved SAE is, where it comes from and how to load it, in Markdown."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from sae_kernels._version import __version__
from sae_kernels.config.places import ACTIVATIONS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sae_kernels.nn.base import SparseAutoencoder

CARD_FILE = "README.md"
# A card with this line is written anew whenever the SAE is saved; any other README.md stays.
MARK = "<!-- Made by sae_kernels. Delete this line to keep what you write here. -->"
_ROWS, _LONGEST = 40, 200  # of a table; characters of a value that a stranger's file holds
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,63}")
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")
_PLACE = {
    "target_layer": "layer that is reconstructed",
    "hook_name": "layer in TransformerLens",
    "hook_name_out": "reconstructed layer in TransformerLens",
    "context_length": "tokens of a sequence",
}
_FIGURES = {
    "tokens": "tokens of training",
    "steps": "steps",
    "fvu": "fraction of variance unexplained, last batch",
    "l0": "latents per token (L0), last batch",
    "dead_fraction": "dead latents",
}


def card(sae: SparseAutoencoder, name: str = "path/to/this/folder") -> str:
    """The text of a card.

    Figures are ``metadata["trained"]`` and the model and layer ``metadata["activations"]``, as a
    training run leaves them; everything else in the metadata is provenance. All may come from
    strangers' files: values are shown as plain text, and long ones are cut.

    Args:
        sae: of any architecture.
        name: what the card says to load.

    Returns:
        Markdown with the front matter that the Hugging Face hub reads; a license stands there only
        if the metadata name one.

    Example:
        >>> from sae_kernels.nn import TopKSAE
        >>> print(card(TopKSAE(8, 32, k=4)).split("# ")[1].splitlines()[0])
        topk sparse autoencoder, 8 to 32 latents
    """
    metadata = dict(sae.metadata)
    trained = metadata.pop("trained", {})
    place: Any = metadata.pop(ACTIVATIONS, {})
    metadata.pop("sae_kernels_version", None)  # the card says whose it is
    figures = trained if isinstance(trained, dict) else {"trained": trained}
    place = place if isinstance(place, dict) else {ACTIVATIONS: place}
    config, defaults = sae.config, _defaults(sae)
    kind = "transcoder" if config.transcodes else "sparse autoencoder"
    kind = "crosscoder" if config.n_layers > 1 else kind
    settings = {k: v for k, v in config.to_dict().items() if k not in defaults or v != defaults[k]}
    parts = [
        _front_matter(config.architecture, metadata.get("license")),
        f"{MARK}\n",
        f"# {config.architecture} {kind}, {config.d_in:,} to {config.n_latents:,} latents\n",
        *_table("Settings", {"architecture": config.architecture, **settings}),
        *_table("Activations", {_PLACE.get(key, key): value for key, value in place.items()}),
        *_table("Figures", {_FIGURES.get(key, key): value for key, value in figures.items()}),
        *_table("Where it comes from", {"written by": f"sae_kernels {__version__}", **metadata}),
        "## Use it\n",
        f"```python\nimport sae_kernels as sk\n\nsae = sk.load({name!r})\n"
        f"codes = sae.encode(x)  # x: [tokens, {config.input_width}], raw activations\n"
        f"x_hat = sae.decode(codes{', x' if config.skip else ''})\n```\n",
    ]
    return "\n".join(parts)


def _defaults(sae: SparseAutoencoder) -> dict[str, Any]:
    """The settings' defaults: a card shows the others."""
    fields = type(sae.config).__dataclass_fields__.values()
    return {field.name: field.default for field in fields}


def _front_matter(architecture: str, license: object) -> str:
    lines = ["library_name: sae_kernels", "tags:", "- sparse-autoencoder"]
    lines += [f"- {architecture}"] if _LICENSE.fullmatch(architecture.replace("_", "-")) else []
    if isinstance(license, str) and _LICENSE.fullmatch(license):
        lines += [f"license: '{license}'"]
    return "\n".join(["---", *lines, "---"])


def _table(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    """A section with a row a value; none where there are no values."""
    rows = [f"| {_plain(key)} | {_plain(value)} |" for key, value in _flat(values)]
    if not rows:
        return
    left_out = [f"| and {len(rows) - _ROWS} more | in config.json |"] if len(rows) > _ROWS else []
    yield "\n".join([f"## {title}\n", "| | |", "|---|---|", *rows[:_ROWS], *left_out, ""])


def _flat(values: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested objects by their dotted names."""
    for key, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{key!s:.{_LONGEST}}.")
        elif value is not None:
            yield f"{above}{key}", value


def _plain(value: object) -> str:
    """A value as text that neither Markdown, HTML nor a terminal acts on."""
    if isinstance(value, float):
        text = f"{value:.4g}"
    elif isinstance(value, int) and not isinstance(value, bool) and value.bit_length() < 64:
        text = f"{value:,}"
    else:
        text = f"{value}" if isinstance(value, str) else f"{value!r:.{_LONGEST + 1}}"
    text = " ".join(text[: _LONGEST + 1].split())
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
    text = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\g<0>", text).replace("://", ":&#47;&#47;")
