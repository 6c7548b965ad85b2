"""Which module paths have a name in TransformerLens, and which are left without one."""

from __future__ import annotations

import pytest

from sae_kernels.config.places import block_number, hook_name, parts

BLOCKS = {
    "gpt2": ["transformer.h.6", "h.6"],
    "llama, gemma, qwen, mistral": ["model.layers.6", "layers.6", "model.layers.6.output"],
    "pythia": ["gpt_neox.layers.6", "layers.6"],
    "gemma 3 with images": ["model.language_model.layers.6", "language_model.layers.6"],
    "mpt": ["transformer.blocks.6", "blocks.6"],
}
# Their output is another hook, or it depends on the model which.
OTHERS = [
    *(
        "h.6.mlp",
        "model.layers.6.mlp",
        "model.layers.6.input_layernorm",
        "gpt_neox.layers.6.attention",
    ),
    *("encoder.layer.6", "bert.encoder.layer.6", "decoder.layers.6", "model.decoder.layers.6"),
    *("model.norm", "h", "h.", "h.six", "h.12345", "h.6.", ".h.6", "blocks.6.hook_resid_post", ""),
    *(None, 6, ["h.6"], "h.6\n", "h.\u0666"),
]


@pytest.mark.parametrize("path", [path for paths in BLOCKS.values() for path in paths])
def test_a_block_of_a_decoder(path: str) -> None:
    assert hook_name(path) == "blocks.6.hook_resid_post"
    assert block_number(path) == 6


@pytest.mark.parametrize("path", OTHERS, ids=repr)
def test_no_name_is_invented(path: object) -> None:
    assert hook_name(path) is None


def test_a_hook_s_parts() -> None:
    assert parts("blocks.11.attn.hook_z") == (11, "attn.hook_z")
    assert parts("blocks.0.hook_resid_pre") == (0, "hook_resid_pre")
    for name in ("hook_embed", "blocks.x.hook_z", "model.layers.3", "", None, 3):
        assert parts(name) is None


def test_the_number_of_a_block() -> None:
    assert block_number("model.layers.3.mlp.experts.7") == 3
    assert block_number(None, "nothing", "blocks.9.hook_z") == 9
    assert block_number(None, "nothing", 4) is None
