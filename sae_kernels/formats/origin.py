"""What a file says beside the function: whose activations an SAE reads, and a tool's own fields.

An SAE's metadata hold both. ``metadata["activations"]`` has the model and the place in it, in the
same words whichever tool wrote the file (`PLACE`). ``metadata[format]`` has what a tool's settings
hold and we do not interpret, as it is: the writer of that format writes it back. In another tool's
file all the rest lies under `OURS`, so that nothing is lost on the way through several tools.
"""

from __future__ import annotations

import json
import logging
from typing import TYPE_CHECKING, Any

from sae_kernels.config.places import ACTIVATIONS, hook_name
from sae_kernels.io.tensor_files import deeper

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

OURS = "sae_kernels"
_log = logging.getLogger(__name__)
# model: its name or folder. layer, target_layer: transformers' module paths, of a transcoder's
# target too. hook_name, hook_name_out: TransformerLens' names. context_length: tokens of a
# sequence. dataset: name of the text.
PLACE = (
    "model",
    "layer",
    "target_layer",
    "hook_name",
    "hook_name_out",
    "context_length",
    "dataset",
)
_LIMIT, _DEPTH = 256 << 10, 24  # characters and levels of a tool's own fields; real ones: thousands
_LONGEST = 1000  # characters of a name


def described(format: str, own: dict[str, Any], **place: Any) -> dict[str, Any]:
    """Metadata of a file that was read.

    Args:
        format: as "saelens".
        own: the fields that are kept, from `own_fields`; what lies under `OURS` becomes ours again.
        place: values of `PLACE`; those that are no names, numbers or flags are left out.
    """
    before = own.pop(OURS, {})
    before = before if isinstance(before, dict) else {}
    known = {name: value for name, value in place.items() if _is_plain(value)}
    known = {**own_of(before, ACTIVATIONS), **known}
    return {
        **before,
        **({ACTIVATIONS: known} if known else {}),
        **({format: own} if own else {}),
    }


def own_fields(path: Path, values: Mapping[str, Any], read: Collection[str]) -> dict[str, Any]:
    """The fields of a tool's settings that are not interpreted: all but those in ``read``.

    JSON values alone, of 256 KiB and 24 levels together; what is left out is a warning in the log.
    """
    kept: dict[str, Any] = {}
    room = _LIMIT
    for name, value in values.items():
        if name in read:
            continue
        size = _size(name, value)
        if size is None or size > room:
            _log.warning("%s: %.80r is not kept, it is no JSON or too long", path, name)
            continue
        kept[name], room = value, room - size
    return kept


def _size(name: str, value: object) -> int | None:
    """Characters of a field as JSON; None if it is none, or too deep to be read back."""
    if deeper(value, _DEPTH):
        return None
    try:
        return len(json.dumps({name: value}, allow_nan=False))
    except (TypeError, ValueError):  # NaN, or a number too long to be written
        return None


def own_of(
    metadata: Mapping[str, Any] | None, format: str, read: Collection[str] = ()
) -> dict[str, Any]:
    """A tool's own fields, to be written back; empty where there are none.

    Args:
        metadata: an SAE's, which may come from a stranger's file.
        format: the fields' key.
        read: fields that are left out, as they say what the SAE computes.
    """
    found = (metadata or {}).get(format)
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if name not in read}


def rest(metadata: Mapping[str, Any] | None, format: str) -> dict[str, Any]:
    """What a file of a format holds for us alone: all metadata but the tool's own, under `OURS`.

    Example:
        >>> rest({"license": "mit", "saelens": {"k": 3}}, "saelens")
        {'sae_kernels': {'license': 'mit'}}
    """
    kept = {name: value for name, value in (metadata or {}).items() if name != format}
    return {OURS: kept} if kept else {}


def place_of(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Whose activations: the known ones of `PLACE`, with the hooks that the layers' paths give.

    Example:
        >>> place_of({"activations": {"model": "gpt2", "layer": "transformer.h.6"}})["hook_name"]
        'blocks.6.hook_resid_post'
    """
    found = own_of(metadata, ACTIVATIONS)
    place = {name: found[name] for name in PLACE if _is_plain(found.get(name))}
    for hook, layer in (("hook_name", "layer"), ("hook_name_out", "target_layer")):
        if hook not in place and (given := hook_name(place.get(layer))) is not None:
            place[hook] = given
    return place


def named(metadata: Mapping[str, Any], **given: Any) -> dict[str, Any]:
    """Metadata with the model, layer and other values of `PLACE` replaced; None keeps a value.

    Example:
        >>> named({"activations": {"layer": "h.6"}}, model="gpt2", hook_name=None)
        {'activations': {'layer': 'h.6', 'model': 'gpt2'}}
    """
    given = {name: value for name, value in given.items() if value is not None}
    if not given:
        return dict(metadata)
    return {**metadata, ACTIVATIONS: {**own_of(metadata, ACTIVATIONS), **given}}


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return 0 < len(value) <= _LONGEST
    return isinstance(value, int) and value.bit_length() < 64
