"""Whose activations an SAE is trained on, for its metadata: the model and the place in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.config.places import ACTIVATIONS, activation_facts, hook_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_kernels.config.output import OutputConfig

# Of the metadata of stored activations and streams, besides the layer.
_KEPT = ("model", "revision", "context_length", "dataset")


def origin(source: object, target: object, n_targets: int, output: OutputConfig) -> dict[str, Any]:
    """The model and the place that activations come from, as far as they say.

    Args:
        source: rows or a stream; those with ``metadata`` (a harvested folder, a live stream) know.
        target: a transcoder's target, if it is stored apart.
        n_targets: how many of a stream's last layers are targets.
        output: model_name, hook_name and hook_name_out replace what the activations say.

    Returns:
        What is known of model, layer and target_layer (lists where there are several), hook_name,
        hook_name_out, context_length and the rest of `_KEPT`.

    Example:
        >>> from types import SimpleNamespace
        >>> from sae_kernels.config.output import OutputConfig
        >>> stored = SimpleNamespace(metadata={"model": "gpt2", "layer": "h.6", "tokens": 5})
        >>> origin(stored, None, 0, OutputConfig())
        {'model': 'gpt2', 'layer': 'h.6', 'hook_name': 'blocks.6.hook_resid_post'}
    """
    first, layers = _metadata(source), _layers(source)
    ends = [] if target is None else _layers(target)
    if target is None and n_targets and len(layers) > n_targets:
        layers, ends = layers[:-n_targets], layers[-n_targets:]
    found = {name: first.get(name) for name in _KEPT}
    if isinstance(found["dataset"], dict):
        found["dataset"] = found["dataset"].get("name")
    return placed(found, layers, ends, output)


def placed(
    found: Mapping[str, Any], layers: list[Any], targets: list[Any], output: OutputConfig
) -> dict[str, Any]:
    """What is known, with the hooks of layers that are a block's output, and the user's names."""
    layer, target_layer = _joined(layers), _joined(targets)
    values = {
        **found,
        "layer": layer,
        "target_layer": target_layer,
        "hook_name": output.hook_name or hook_name(layer),
        "hook_name_out": output.hook_name_out or hook_name(target_layer),
    }
    values["model"] = output.model_name or values.get("model")
    return {name: value for name, value in values.items() if value}


def record(metadata: dict[str, Any], place: Mapping[str, Any]) -> None:
    """Adds facts of the activations, as a place, to the record in an SAE's metadata."""
    if place:
        metadata[ACTIVATIONS] = {**activation_facts(metadata), **place}


def _joined(layers: list[Any]) -> Any:
    """One layer, or the list of several; None where one is unknown."""
    if not layers or not all(layers):
        return None
    return layers[0] if len(layers) == 1 else layers


def _layers(source: object) -> list[Any]:
    """The layers of a source and of those that it joins, None for unknown ones."""
    joined = getattr(source, "sources", None)
    if joined is not None:
        return [layer for part in joined for layer in _layers(part)]
    layer = _metadata(source).get("layer")
    return layer if isinstance(layer, list) else [layer]


def _metadata(source: object) -> Mapping[str, Any]:
    while hasattr(source, "sources"):  # joined: the first one's
        source = source.sources[0]
    found = getattr(source, "metadata", None)
    return found if isinstance(found, dict) else {}
