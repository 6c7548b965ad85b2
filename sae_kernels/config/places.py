"""Names of places in a language model: transformers' module path and TransformerLens' hook.

TransformerLens calls the output of block N of a decoder ``blocks.N.hook_resid_post``, and SAELens
and circuit-tracer use its names. No other module is mapped: what an attention, MLP or norm module
puts out is another hook in one model than in the next (Gemma 2 adds its MLP after one more norm;
``hook_normalized`` is a norm's output before its weights).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

# Module paths of the list of blocks, with and without the head: AutoModel has no prefix. From
# TransformerLens at 4cd36aa, model_bridge/supported_architectures/*.py (BlockBridge(name=...)), and
# generalized_components/block.py, where hook_resid_post is the block's output.
_BLOCKS = {
    "transformer.h": "GPT-2, GPT-J, GPT-Neo, BLOOM, CodeGen, GPTBigCode, Falcon",
    "h": "the same without a head",
    "model.layers": "Llama, Mistral, Mixtral, Gemma 1 to 3, Qwen 2 and 3, OLMo, Phi, Cohere, ...",
    "layers": "the same, and GPT-NeoX, without a head",
    "gpt_neox.layers": "GPT-NeoX, Pythia",
    "model.language_model.layers": "Gemma 3, Llava and other models of images and text",
    "language_model.layers": "the same without a head",
    "transformer.blocks": "MPT",
    "blocks": "the same without a head",
}
# Not among them, as their path does not say what the block's output is. encoder.layer: BERT's
# blocks end in a norm (TransformerLens: hook_normalized_resid_post), those of ESM and ViT don't.
# decoder.layers: OPT's blocks do not end in a norm, BART's do.
_PLACE = re.compile(
    r"(?P<blocks>[a-z_.]+)\.(?P<number>[0-9]{1,4})(\.output)?"
)  # Gemma Scope 2's end
_HOOK = re.compile(r"blocks\.(?P<number>[0-9]{1,4})\.(?P<name>[A-Za-z0-9_.]+)")
RESID_POST = "hook_resid_post"
ACTIVATIONS = "activations"  # key of an SAE's metadata: the model and the place it reads


def hook_name(layer: object) -> str | None:
    """TransformerLens' name of a module's output; None where the path is not a known block's.

    Example:
        >>> hook_name("model.layers.6"), hook_name("gpt_neox.layers.3"), hook_name("h.6.mlp")
        ('blocks.6.hook_resid_post', 'blocks.3.hook_resid_post', None)
    """
    found = _PLACE.fullmatch(layer) if isinstance(layer, str) else None
    if found is None or found["blocks"] not in _BLOCKS:
        return None
    return f"blocks.{int(found['number'])}.{RESID_POST}"


def parts(hook: object) -> tuple[int, str] | None:
    """The block's number and the hook in it, of a name such as ``blocks.6.hook_mlp_out``.

    Example:
        >>> parts("blocks.6.ln2.hook_normalized"), parts("h.6")
        ((6, 'ln2.hook_normalized'), None)
    """
    found = _HOOK.fullmatch(hook) if isinstance(hook, str) else None
    return None if found is None else (int(found["number"]), found["name"])


def block_number(*names: object) -> int | None:
    """The number of the block that the first of these names lies in; None where none has one.

    Args:
        names: hooks or module paths, as ``blocks.6.hook_mlp_out`` and ``model.layers.6.mlp``.

    Example:
        >>> block_number(None, "model.layers.6.mlp")
        6
    """
    for name in names:
        numbers = [part for part in str(name).split(".") if re.fullmatch(r"[0-9]{1,4}", part)]
        if isinstance(name, str) and numbers:
            return int(numbers[0])
    return None


def activation_facts(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The record, in an SAE's metadata, of the activations that it was trained on.

    Example:
        >>> activation_facts({"activations": {"layer": "h.6"}}), activation_facts({})
        ({'layer': 'h.6'}, {})
    """
    facts = metadata.get(ACTIVATIONS)
    return facts if isinstance(facts, dict) else {}
