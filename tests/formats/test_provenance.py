"""Whose activations an SAE reads, and every field of a tool's settings, through all conversions."""

from __future__ import annotations

import itertools
import json
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
import yaml
from foreign import D, F, K, exact_tensors

import sae_kernels as sk
from sae_kernels import formats, nn
from sae_kernels.formats import Weights, named, read, write
from sae_kernels.formats.origin import own_fields, place_of
from sae_kernels.nn import ReLUConfig, SAEConfig, TopKConfig

if TYPE_CHECKING:
    from pathlib import Path

# What SAELens 6.54.12 puts into a configuration: its runner's metadata, and what its loaders add.
SAELENS: dict[str, Any] = {
    "d_in": D,
    "d_sae": F,
    "dtype": "float32",
    "device": "cuda",
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "reshape_activations": "none",
    "architecture": "topk",
    "k": K,
    "rescale_acts_by_decoder_norm": False,
    "decoder_init_norm": 0.1,
    "metadata": {
        "sae_lens_version": "6.54.12",
        "sae_lens_training_version": "6.54.12",
        "model_name": "gpt2-small",
        "model_class_name": "HookedTransformer",
        "hook_name": "blocks.6.hook_resid_post",
        "hook_layer": 6,
        "hook_head_index": None,
        "context_size": 1024,
        "prepend_bos": True,
        "seqpos_slice": [None],
        "dataset_path": "apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
        "exclude_special_tokens": [50256],
        "model_from_pretrained_kwargs": {"center_writing_weights": True},
        "neuronpedia_id": "gpt2-small/6-res-jb",
        "hf_hook_name": "transformer.h.6.output",
    },
}
SPARSIFY: dict[str, Any] = {
    "activation": "topk",
    "expansion_factor": 64,
    "normalize_decoder": True,
    "num_latents": F,
    "k": K,
    "multi_topk": True,
    "skip_connection": False,
    "transcode": False,
    "d_in": D,
}
TRAINER: dict[str, Any] = {
    "trainer_class": "TopKTrainer",
    "dict_class": "AutoEncoderTopK",
    "lr": 2e-4,
    "steps": 244140,
    "auxk_alpha": 0.03125,
    "warmup_steps": 1000,
    "decay_start": 195312,
    "threshold_beta": 0.999,
    "threshold_start_step": 1000,
    "seed": 0,
    "activation_dim": D,
    "dict_size": F,
    "k": K,
    "device": "cuda:0",
    "layer": 8,
    "lm_name": "EleutherAI/pythia-160m-deduped",
    "wandb_name": "TopKTrainer-pythia",
    "submodule_name": "resid_post_layer_8",
}
DICTIONARY_LEARNING: dict[str, Any] = {
    "trainer": TRAINER,
    "buffer": {"d_submodule": 768, "io": "out", "n_ctxs": 244, "ctx_len": 1024, "device": "cuda:0"},
}
CIRCUIT_TRACER: dict[str, Any] = {
    "model_kind": "transcoder_set",
    "model_name": "meta-llama/Llama-3.2-1B",
    "feature_input_hook": "mlp.hook_in",
    "feature_output_hook": "hook_mlp_out",
    "scan": "mntss/transcoder-Llama-3.2-1B",
    "repo_id": "mntss/transcoder-Llama-3.2-1B",
}
TOPK = TopKConfig(D, F, k=K, relu="before")
TRANSCODER = ReLUConfig(D, F, d_out=D, subtract_b_dec=False)
# A tool's settings: what writes the folder, the SAE, its settings' file and text.
TOOLS: dict[str, tuple[SAEConfig, str, Any]] = {
    "saelens": (TOPK, "cfg.json", SAELENS),
    "sparsify": (TOPK, "cfg.json", SPARSIFY),
    "dictionary_learning": (TOPK, "config.json", DICTIONARY_LEARNING),
    "circuit_tracer": (TRANSCODER, "config.yaml", CIRCUIT_TRACER),
}
PLACE = {"hook_name": "blocks.0.mlp.hook_in", "hook_name_out": "blocks.0.hook_mlp_out"}


def settings_of(folder: Path, file: str) -> Any:
    text = (folder / file).read_text()
    return yaml.safe_load(text) if file.endswith(".yaml") else json.loads(text)


def make(tool: str, folder: Path) -> Weights:
    """The folder that the tool would write, with its own settings."""
    config, file, settings = TOOLS[tool]
    weights = Weights(config, exact_tensors(config), {"activations": PLACE})
    write(folder, weights, tool)
    (folder / file).write_text(json.dumps(settings))  # which is YAML too
    return read(folder, tool)


def lost(before: Any, after: Any, at: str = "") -> list[str]:
    """The fields that are gone or changed."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [
            gone
            for key, value in before.items()
            for gone in (
                lost(value, after[key], f"{at}.{key}") if key in after else [f"{at}.{key}"]
            )
        ]
    return [] if before == after else [at]


@pytest.mark.parametrize("tool", TOOLS)
def test_every_field_of_a_tool_comes_back(tmp_path: Path, tool: str) -> None:
    _, file, settings = TOOLS[tool]
    weights = make(tool, tmp_path / "theirs")
    write(tmp_path / "ours", weights, "native")
    write(tmp_path / "again", read(tmp_path / "ours"), tool)
    # SAELens puts an SAE where its caller says; a file that says cuda would only fail without it.
    expected = [".device"] if tool == "saelens" else []
    assert lost(settings, settings_of(tmp_path / "again", file)) == expected


@pytest.mark.parametrize(
    ("tool", "through"),
    [pair for pair in itertools.permutations(TOOLS, 2) if "circuit_tracer" not in pair],
)
def test_every_field_comes_back_through_another_tool(
    tmp_path: Path, tool: str, through: str
) -> None:
    _, file, settings = TOOLS[tool]
    weights = make(tool, tmp_path / "theirs")
    write(tmp_path / "other", weights, through)
    write(tmp_path / "again", read(tmp_path / "other"), tool)
    # SAELens has no word for a decoder of unit norms, a setting of training.
    gone = {("sparsify", "saelens"): [".normalize_decoder"]}
    expected = [".device"] if tool == "saelens" else gone.get((tool, through), [])
    assert lost(settings, settings_of(tmp_path / "again", file)) == expected


def test_names_go_from_tool_to_tool(tmp_path: Path) -> None:
    """Each in its own words, where it has any."""
    weights = make("saelens", tmp_path / "saelens")
    assert place_of(weights.metadata) == {
        "model": "gpt2-small",
        "layer": "transformer.h.6.output",
        "hook_name": "blocks.6.hook_resid_post",
        "context_length": 1024,
        "dataset": "apollo-research/Skylion007-openwebtext-tokenizer-gpt2",
    }
    write(tmp_path / "dl", weights, "dictionary_learning")
    trainer = settings_of(tmp_path / "dl", "config.json")["trainer"]
    names = ("lm_name", "layer", "submodule_name")
    assert [trainer[name] for name in names] == ["gpt2-small", 6, "resid_post_layer_6"]
    weights = make("dictionary_learning", tmp_path / "theirs")
    write(tmp_path / "back", weights, "saelens")
    metadata = settings_of(tmp_path / "back", "cfg.json")["metadata"]
    assert metadata["model_name"] == "EleutherAI/pythia-160m-deduped"
    assert metadata["hook_name"] == "blocks.8.hook_resid_post"
    assert "hook_layer" not in metadata
    weights = make("circuit_tracer", tmp_path / "set")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # both hooks are known
        write(tmp_path / "transcoder", weights, "saelens")
    metadata = settings_of(tmp_path / "transcoder", "cfg.json")["metadata"]
    assert metadata["model_name"] == "meta-llama/Llama-3.2-1B"
    assert metadata["hook_name"] == "blocks.0.mlp.hook_in"
    assert metadata["hook_name_out"] == "blocks.0.hook_mlp_out"


def test_the_folder_of_sparsify_is_the_layer(tmp_path: Path) -> None:
    weights = make("sparsify", tmp_path / "run" / "layers.6")
    assert weights.metadata["activations"]["layer"] == "layers.6"
    write(tmp_path / "saelens", weights, "saelens")
    metadata = settings_of(tmp_path / "saelens", "cfg.json")["metadata"]
    assert metadata["hook_name"] == "blocks.6.hook_resid_post"
    assert "activations" not in make("sparsify", tmp_path / "my run").metadata


def test_what_we_know_of_the_training_comes_back_too(tmp_path: Path) -> None:
    facts = {"trained": {"tokens": 5}, "license": "mit", "activations": {"model": "gpt2"}}
    for to in ("native", "saelens", "sparsify", "dictionary_learning"):
        with_hook = named(facts, hook_name="blocks.1.hook_resid_post")
        write(tmp_path / to, Weights(TOPK, exact_tensors(TOPK), with_hook), to)
        came = read(tmp_path / to).metadata
        assert {name: came[name] for name in facts} == with_hook
        assert sk.load(tmp_path / to).metadata["trained"] == {"tokens": 5}


@pytest.mark.parametrize(
    ("config", "place", "flags"),
    [
        (TOPK, {}, ["--hook-name"]),
        (TOPK, {"model": "gpt2", "layer": "h.3.mlp"}, ["--hook-name"]),
        (TRANSCODER, {"hook_name": "blocks.0.x"}, ["--hook-name-out"]),
        (TRANSCODER, {}, ["--hook-name", "--hook-name-out"]),
    ],
)
def test_saelens_is_told_the_hook_or_the_user_is_warned(
    tmp_path: Path, config: SAEConfig, place: Any, flags: list[str]
) -> None:
    with pytest.warns(UserWarning, match="run the model without this SAE") as said:
        formats.write_saelens(tmp_path, config, exact_tensors(config), {"activations": place})
    assert f"name it with {' and '.join(flags)}, as blocks." in str(said[0].message)


def test_a_version_before_6_does_not_make_the_file_an_old_one(tmp_path: Path) -> None:
    make("saelens", tmp_path)
    old = {
        "hook_point": "blocks.2.hook_resid_pre",
        "sae_lens_version": "5.11.0",
        "hook_point_layer": 2,
    }
    cfg = {k: v for k, v in SAELENS.items() if k != "metadata"} | old
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    write(tmp_path / "new", read(tmp_path), "saelens")
    metadata = settings_of(tmp_path / "new", "cfg.json")["metadata"]
    assert (metadata["sae_lens_version"], metadata["hook_layer"]) == ("6.0.0", 2)
    assert metadata["hook_name"] == "blocks.2.hook_resid_pre"


def test_own_fields_are_json_within_bounds(tmp_path: Path, caplog: Any) -> None:
    deep: Any = 0
    for _ in range(40):
        deep = [deep]
    values = {"a": 1, "b": float("nan"), "c": "x" * 300_000, "d": deep, "e": [10**5000], "f": "y"}
    assert own_fields(tmp_path, values, ("f",)) == {"a": 1}
    assert [record.args[1] for record in caplog.records] == ["b", "c", "d", "e"]
    many = {str(i): "x" * 10_000 for i in range(40)}
    assert len(json.dumps(own_fields(tmp_path, many, ()))) < 300_000


FALSE: dict[str, dict[str, Any]] = {
    "saelens": {
        "architecture": "topk",
        "activation_fn_str": "tanh",
        "activation_fn_kwargs": {"k": 1},
        "normalize_activations": "layer_norm",
        "finetuning_scaling_factor": True,
        "d_in": 3,
        "d_out": 3,
        "k": 1,
        "rescale_acts_by_decoder_norm": True,
        "reshape_activations": "hook_z",
        "dtype": "float16",
    },
    "sparsify": {"signed": True, "activation": "groupmax", "num_latents": 3, "transcode": True},
    "dictionary_learning": {
        "trainer": {"dict_class": "AutoEncoderTopK", "k": 1, "experts": 3, "dict_size": 5},
    },
    "circuit_tracer": {"model_kind": "cross_layer_transcoder", "transcoders": ["hf://a/b/c.npz"]},
}


@pytest.mark.parametrize("tool", TOOLS)
def test_a_stranger_s_fields_do_not_change_what_is_written(tmp_path: Path, tool: str) -> None:
    """A native file may claim to be from a tool and to have held anything."""
    config, file, _ = TOOLS[tool]
    tensors = exact_tensors(config)
    for i, own in enumerate((FALSE[tool], {})):
        metadata = {"activations": PLACE, tool: own}
        write(tmp_path / str(i), Weights(config, tensors, metadata), tool)
    first, second = (settings_of(tmp_path / str(i), file) for i in range(2))
    assert first == second
    came = read(tmp_path / "0").config
    assert (came.architecture, came.n_latents) == (config.architecture, F)


@pytest.mark.parametrize("value", [["gpt2"], {}, "", "x" * 2000, 2**70, None, 1.5])
def test_a_stranger_s_name_is_plain_and_short(tmp_path: Path, value: Any) -> None:
    make("saelens", tmp_path)
    cfg = SAELENS | {"metadata": {"model_name": value}}
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    came = read(tmp_path)
    assert "model" not in came.metadata.get("activations", {})
    assert came.metadata["saelens"]["metadata"]["model_name"] == value
    nn.from_weights(*came[:2])


def test_what_was_read_is_what_the_card_shows(tmp_path: Path) -> None:
    make("saelens", tmp_path / "theirs")
    sae = sk.load(tmp_path / "theirs")
    sae.save_pretrained(tmp_path / "ours")
    card = (tmp_path / "ours" / "README.md").read_text()
    section = card.split("## Activations")[1].split("##")[0]
    for line in (
        "| model | gpt2-small |",
        "| layer | transformer.h.6.output |",
        "| layer in TransformerLens | blocks.6.hook_resid_post |",
    ):
        assert line in section
    assert torch.equal(sk.load(tmp_path / "ours").W_enc, sae.W_enc)
