"""Whose activations an SAE is trained on, for its metadata: the model and the place in it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sae_kernels.config.places import ACTIVATIONS, activation_facts, hook_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from sae_kernels.config.output import OutputConfig

# Of the metadata of stored activations and streams, besides the layer.
_KEPT = ("model", "revision", "context_length", "dataset")


def origin(
    source: object, target: object, transcodes: bool, output: OutputConfig
) -> dict[str, Any]:
    """The model and the place that activations come from, as far as they say.

    Args:
        source: rows or a stream; those with ``metadata`` (a harvested folder, a live stream) know.
        target: a transcoder's target, if it is stored apart.
        transcodes: whether a stream's last layer is the target.
        output: model_name, hook_name and hook_name_out replace what the activations say.

    Returns:
        What is known of model, layer (a list for a crosscoder), target_layer, hook_name,
        hook_name_out, context_length and the rest of `_KEPT`.

    Example:
        >>> from types import SimpleNamespace
        >>> from sae_kernels.config.output import OutputConfig
        >>> stored = SimpleNamespace(metadata={"model": "gpt2", "layer": "h.6", "tokens": 5})
        >>> origin(stored, None, False, OutputConfig())
        {'model': 'gpt2', 'layer': 'h.6', 'hook_name': 'blocks.6.hook_resid_post'}
    """
    said = [_metadata(part) for part in getattr(source, "sources", [source])]
    layers: list[Any] = []
    for one in said:
        layer = one.get("layer")
        layers += layer if isinstance(layer, list) else [layer]
    end = _metadata(target).get("layer") if target is not None else None
    if target is None and transcodes and len(layers) > 1:
        end = layers.pop()
    found = {name: said[0].get(name) for name in _KEPT}
    if isinstance(found["dataset"], dict):
        found["dataset"] = found["dataset"].get("name")
    return placed(found, layers, end, output)


def placed(
    found: Mapping[str, Any], layers: list[Any], target_layer: Any, output: OutputConfig
) -> dict[str, Any]:
    """What is known, with the hooks of layers that are a block's output, and the user's names."""
    known = all(layers)
    layer = (layers[0] if len(layers) == 1 else layers) if known else None
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


def _metadata(source: object) -> Mapping[str, Any]:
    found = getattr(source, "metadata", None)
    return found if isinstance(found, dict) else {}
