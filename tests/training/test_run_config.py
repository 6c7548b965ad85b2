"""The settings of a run: every one is documented, survives its file, and is checked."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest

from sae_kernels.cli import main
from sae_kernels.config import DataConfig, OptimizerConfig, OutputConfig, TrainConfig
from sae_kernels.config.base import declared
from sae_kernels.config.toml import read_tables
from sae_kernels.data import ShardWriter
from sae_kernels.errors import DataError
from sae_kernels.nn import (
    BatchTopKConfig,
    BatchTopKSAE,
    JumpReLUConfig,
    JumpReLUObjective,
    ReLUConfig,
    ReLUObjective,
    TopKConfig,
    TopKObjective,
    nested_groups,
    presets,
)
from sae_kernels.training import RunConfig
from sae_kernels.training.run_config import NESTED_TABLES, Widths, merged, setting_classes
from tests.step.harness import D, tokens

if TYPE_CHECKING:
    from pathlib import Path

    from sae_kernels.config import ObjectiveConfig, Settings
    from sae_kernels.nn.registry import Kind

F = 64
SMALL = {"d_in": D, "n_latents": F}
PRESETS = presets()
CLASSES = list(dict.fromkeys(cls for classes in setting_classes().values() for cls in classes))


def tables_of(name: str) -> dict[str, Any]:
    """A preset in a file that says no more than it must."""
    sae: dict[str, Any] = dict(SMALL)
    if PRESETS[name].preset.data in ("target", "targets"):
        sae["d_out"] = 7
    if PRESETS[name].preset.data in ("layers", "targets"):
        sae["n_layers"] = 2
    if name == "switch":
        sae["n_experts"] = 2  # the default k of 32 needs experts of as many latents
    return {"arch": name, "sae": sae}


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_every_setting_is_documented(cls: type[Settings]) -> None:
    # What a class declares anew for another default alone is documented by its base.
    own = {f.name for f in dataclasses.fields(cls) if f.metadata} & vars(cls)[
        "__annotations__"
    ].keys()
    for name, declaration in declared(cls).items():
        if cls is not TrainConfig or name not in NESTED_TABLES:
            assert len(declaration.words.split()) >= 2, name
            assert declaration.words in (cls.__doc__ or "") or name not in own


def test_a_run_has_a_word_for_each_table() -> None:
    tables = {*(field.name for field in dataclasses.fields(RunConfig)), *NESTED_TABLES}
    assert setting_classes().keys() == tables
    tables |= {"architecture"}
    assert RunConfig.from_tables({"sae": SMALL}).to_tables().keys() == tables
    for classes in setting_classes().values():
        assert all(cls.__doc__ for cls in classes)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_its_file(name: str, tmp_path: Path) -> None:
    config = RunConfig.from_tables(tables_of(name))
    preset = PRESETS[name].preset
    sae = preset.sae | ({"groups": nested_groups(F)} if "groups" in preset.sae else {})
    parts = (
        (config.sae, sae),
        (config.train.objective, preset.objective),
        (config.train.optimizer, preset.optimizer),
    )
    for part, given in parts:
        for key, value in given.items():
            assert getattr(part, key) == value
    assert type(config.train.objective) is PRESETS[name].sae.objective_class
    config.write(tmp_path / "run.toml")
    assert RunConfig.read(tmp_path / "run.toml") == config
    assert RunConfig.from_tables(config.to_tables()) == config
    # Nor do the data change what the file says.
    n_layers, d_out = config.sae.n_layers, config.sae.d_out
    widths = Widths([D] * n_layers, [d_out] * n_layers if d_out else [])
    assert RunConfig.read(tmp_path / "run.toml", widths) == config


@pytest.mark.parametrize("name", PRESETS)
def test_none_in_the_place_of_what_a_preset_sets_survives_too(name: str, tmp_path: Path) -> None:
    """TOML has no None: read back under the preset, its own value would return."""
    (kind, preset), tables = PRESETS[name], tables_of(name)
    tables |= {"objective": {"target_l0": None}, "optimizer": {"clip_norm": None}}
    if preset.objective.get("sparsity", kind.objective_class.sparsity) == "target_l0":
        tables["objective"] |= {"sparsity": "l0"}
    if "groups" in preset.sae:
        tables["sae"]["groups"] = None
    config = RunConfig.from_tables(tables)
    assert config.train.objective is not None
    assert config.train.objective.target_l0 is None
    assert config.train.optimizer.clip_norm is None
    config.write(tmp_path / "run.toml")
    assert "arch" not in read_tables(tmp_path / "run.toml")
    assert RunConfig.read(tmp_path / "run.toml") == config


def test_every_setting_survives_its_file(tmp_path: Path) -> None:
    config = RunConfig(
        BatchTopKConfig(D, F, k=2.5, groups=(16, 48), activation_scale=0.1 + 0.2, d_out=None),
        TrainConfig(
            lr=1e-3,
            data_seed=7,
            normalize_activations="none",
            objective=BatchTopKSAE.objective_class(k_aux=3, target_l0=2.0),
            optimizer=OptimizerConfig(clip_norm=0.5, adam="lazy"),
        ),
        DataConfig(folders=("a", "größe ' \" \\"), check_on_read=True),
        OutputConfig(checkpoint_every=7, keep_checkpoints=0, loggers=("tensorboard",)),
    )
    config.write(tmp_path / "run.toml")
    assert RunConfig.read(tmp_path / "run.toml") == config
    live = dataclasses.replace(
        config,
        data=DataConfig(
            model="m",
            layer=("h.1", "h.2"),
            target_layer="h.3",
            dataset="d",
            dataset_subset="en",
            dataset_revision="0123abc",
            dataset_split="test",
            dataset_column="body",
            context_length=9,
            model_batch_size=3,
        ),
    )
    live.write(tmp_path / "run.toml")
    assert RunConfig.read(tmp_path / "run.toml") == live


def test_what_is_left_out_is_the_presets_or_the_default() -> None:
    config = RunConfig.from_tables({"arch": "abstopk", "sae": SMALL, "train": {"lr": 1.0}})
    assert config.sae == TopKConfig(D, F, relu="none", by_magnitude=True)
    own = PRESETS["abstopk"].preset
    objective, optimizer = TopKObjective(**own.objective), OptimizerConfig(**own.optimizer)
    assert config.train == TrainConfig(lr=1.0, objective=objective, optimizer=optimizer)
    assert (config.data, config.output) == (DataConfig(), OutputConfig())
    bare = RunConfig.from_tables({"architecture": "jumprelu", "sae": SMALL})
    assert bare.sae == JumpReLUConfig(D, F)
    assert bare.train == TrainConfig(objective=JumpReLUObjective())
    assert RunConfig.from_tables({"sae": SMALL | {"k": 3}}).sae == TopKConfig(D, F, 3)


def test_widths_come_from_the_data_where_the_sae_has_none() -> None:
    def sae(arch: str, widths: Widths, **given: Any) -> Any:
        return RunConfig.from_tables({"arch": arch, "sae": given}, widths).sae

    assert sae("relu", Widths([D])) == ReLUConfig(D, 8 * D)
    assert sae("relu", Widths([D]), n_latents=5).n_latents == 5
    assert sae("transcoder", Widths([D], [7])).d_out == 7
    assert sae("crosscoder", Widths([D, D, D])).n_layers == 3
    with pytest.raises(ValueError, match=r"expected layers of one width, got \[32, 31\]"):
        sae("crosscoder", Widths([D, D - 1]))


def test_groups() -> None:
    def groups(**sae: Any) -> Any:
        return RunConfig.from_tables({"arch": "matryoshka", "sae": {"d_in": D, **sae}}).sae.groups

    assert groups(n_latents=F) == nested_groups(F)
    assert groups(n_latents=F, groups=[16, 48]) == (16, 48)
    assert groups(n_latents=F, groups="16,48") == (16, 48)
    with pytest.raises(
        ValueError, match="groups: expected a list of integers such as 512,512,1024, got '1;2'"
    ):
        groups(n_latents=F, groups="1;2")
    with pytest.raises(ValueError, match="groups: expected positive integers that add up to"):
        groups(n_latents=F, groups=[16, 16])


def test_a_scale_of_the_sae_rules_its_estimate_out() -> None:
    def scales(sae: dict[str, Any], train: dict[str, Any]) -> tuple[float, str]:
        config = RunConfig.from_tables({"sae": SMALL | {"k": 2} | sae, "train": train})
        return config.sae.activation_scale, config.train.normalize_activations

    assert scales({}, {}) == (1, "sqrt_d")
    assert scales({}, {"normalize_activations": "none"}) == (1, "none")
    assert scales({"activation_scale": 0.5}, {}) == (0.5, "none")
    assert scales({"activation_scale": 1}, {}) == (1, "none")
    assert scales({"activation_scale": 0.5}, {"normalize_activations": "none"}) == (0.5, "none")
    # As run.toml has it: the scale that the estimate will replace.
    assert scales({"activation_scale": 1}, {"normalize_activations": "sqrt_d"}) == (1, "sqrt_d")
    with pytest.raises(ValueError, match=r"own 0\.5 or an estimate, got both; leave it out"):
        scales({"activation_scale": 0.5}, {"normalize_activations": "sqrt_d"})


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"trian": {}}, "unknown table 'trian'; did you mean 'train'"),
        ({"zzz": {}}, "unknown table 'zzz'; known are arch, architecture, data, sae"),
        ({"train": {"stpes": 3}}, r"\[train\]: unknown key 'stpes'; did you mean 'steps'"),
        ({"data": {"folder": "a"}}, r"\[data\]: unknown key 'folder'; did you mean 'folders'"),
        ({"output": {"logger": []}}, "did you mean 'loggers'"),
        ({"sae": {"n_latent": 3}}, "did you mean 'n_latents'"),
        ({"train": 3}, r"expected a table \[train\], got 3"),
        ({"sae": [SMALL]}, r"expected a table \[sae\], got \[\{"),
        ({"arch": "topkk"}, "did you mean 'topk'"),
        ({"arch": 3}, "arch: expected one of topk, .*got 3"),
        (
            {"architecture": "topkk"},
            "architecture: expected one of topk, .*got 'topkk'; a class",
        ),
        ({"architecture": ["topk"]}, r"architecture: expected one of .*got \['topk'\]"),
        ({"architecture": "matryoshka"}, "architecture: expected one of topk, .*got 'matryoshka'"),
        ({"arch": "topk", "architecture": "topk"}, "a kind.*, got both"),
        ({"arch": "relu", "sae": {"k": 3}}, "k: no setting of architecture 'relu', which has d_in"),
        ({"sae": {"threshold_init": 3}}, "threshold_init: no setting of architecture 'topk'"),
        (
            {"objective": {"balance_coefficient": 1.0}},
            "balance_coefficient: no setting of the objective of 'topk', which has loss, ",
        ),
        (
            {"arch": "gated", "objective": {"multi_topk": True}},
            "multi_topk: no setting of the objective of 'gated'",
        ),
        ({"objective": {"sparsty": "l1"}}, r"\[objective\]: unknown key 'sparsty'; did you mean"),
        ({"optimizer": {"beta3": 0.9}}, r"\[optimizer\]: unknown key 'beta3'; did you mean 'beta"),
        (
            {"train": {"target_l0": 3.0}},
            r"\[train\]: unknown key 'target_l0'; it belongs in \[objective\]",
        ),
        ({"objective": {"clip_norm": 1.0}}, r"'clip_norm'; it belongs in \[optimizer\]"),
        ({"train": {"objective": {}}}, r"\[train\]: unknown key 'objective'"),
        ({"sae": {"d_in": None}}, "d_in: expected a positive integer, got None"),
    ],
)
def test_what_is_unknown_is_refused_with_the_nearest_name(
    tables: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RunConfig.from_tables(merged({"sae": SMALL}, tables))


def test_an_sae_without_data_says_its_own_width() -> None:
    with pytest.raises(ValueError, match="d_in: expected a number, as no data say it; set it"):
        RunConfig.from_tables({"sae": {"k": 3, "n_latents": F}})


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("sae", "k", "3"),
        ("sae", "k", 3.5),
        ("sae", "k", True),
        ("sae", "n_latents", 64.5),
        ("sae", "d_in", [32]),
        ("sae", "unit_norm_decoder", "yes"),
        ("sae", "activation_scale", "sqrt_d"),
        ("sae", "groups", 16),
        ("train", "steps", "3"),
        ("train", "steps", 3.0),
        ("train", "lr", "1e-3"),
        ("train", "data_seed", -1),
        ("train", "normalize_activations", 2.0),
        ("train", "route", "fast"),
        ("data", "folders", 3),
        ("data", "folders", [3]),
        ("data", "check_on_read", "yes"),
        ("data", "model", 3),
        ("data", "model", ""),
        ("data", "layer", {"a": 1}),
        ("data", "dataset_split", None),
        ("data", "context_length", 0),
        ("data", "model_batch_size", 1.0),
        ("output", "checkpoint_every", -1),
        ("output", "keep_checkpoints", True),
        ("output", "loggers", 3),
        ("output", "loggers", [3]),
    ],
)
def test_a_value_of_another_type_is_refused_by_its_name(table: str, key: str, value: Any) -> None:
    tables = merged({"sae": SMALL | {"k": 3}}, {table: {key: value}})
    with pytest.raises(ValueError, match=rf"{key}: expected .*got"):
        RunConfig.from_tables(tables)


@pytest.mark.parametrize(
    ("objective", "flat", "message"),
    [
        (TopKObjective, {"stpes": 3}, "unknown setting 'stpes'; did you mean 'steps'"),
        (TopKObjective, {"balance_coefficient": 1.0}, "unknown setting 'balance_coefficient'"),
        (ReLUObjective, {"multi_topk": True}, "unknown setting 'multi_topk'"),
        (ReLUObjective, {"k": 3}, "unknown setting 'k'"),
        (ReLUObjective, {"sparsity": "l0"}, "sparsity: expected one of none, l1, lp, tanh, got 'l"),
        (TopKObjective, {"route": "autograd", "adam": "lazy"}, "adam: expected 'dense' with route"),
    ],
)
def test_flat_settings_that_nothing_has_are_refused(
    objective: type[ObjectiveConfig], flat: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig.of(objective, **flat)


@pytest.mark.parametrize("kind", presets().values(), ids=presets())
def test_flat_settings_reach_the_part_that_has_them(kind: Kind) -> None:
    """No name stands in two parts, and every name of every part can be given flat."""
    whole = TrainConfig(objective=kind.sae.objective_class(), optimizer=OptimizerConfig())
    assert whole.objective is not None
    parts = (whole.objective, whole.optimizer, whole)
    flat = [name for part in parts for name in part.to_dict()]
    assert len(flat) == len(set(flat))
    given = {name: value for part in parts for name, value in part.to_dict().items()}
    assert TrainConfig.of(kind.sae.objective_class, **given) == whole
    other = TrainConfig.of(kind.sae.objective_class, steps=7, beta2=0.5, k_aux=3)
    assert other == dataclasses.replace(
        whole,
        steps=7,
        objective=dataclasses.replace(whole.objective, k_aux=3),
        optimizer=OptimizerConfig(beta2=0.5),
    )


LIVE = {"model": "m", "layer": ["h.1"], "text": ["a.txt"]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (LIVE | {"folders": ["a"]}, "model: expected stored activations or a model, got a and m"),
        (LIVE | {"layer": []}, "layer: expected the dotted path"),
        (LIVE | {"text": []}, "text: expected text or a dataset for the model, got neither"),
        (LIVE | {"dataset": "d"}, "text: expected text or a dataset for the model, got both"),
        (LIVE | {"target": "a"}, "target: expected target_layer with a model"),
        ({"layer": "h.1"}, "layer: expected a model with it"),
        ({"folders": ["a"], "text": ["a"]}, "text: expected a model with it"),
        ({"folders": ["a"], "dataset": "a"}, "dataset: expected a model with it"),
        ({"folders": ["a"], "target_layer": "a"}, "target_layer: expected a model with it"),
    ],
)
def test_data_that_say_two_things_are_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**data)


def test_a_single_name_is_a_list_of_one() -> None:
    assert DataConfig(folders="a") == DataConfig(folders=("a",))  # type: ignore[arg-type]
    assert OutputConfig(loggers="wandb").loggers == ("wandb",)  # type: ignore[arg-type]


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a TOML file, it is not there"):
        RunConfig.read(tmp_path / "nowhere.toml")
    (tmp_path / "bad.toml").write_bytes(b"\xff\x00")
    with pytest.raises(DataError, match=r"bad.toml: expected TOML"):
        RunConfig.read(tmp_path / "bad.toml")


def test_the_later_of_a_preset_and_a_bare_kind_counts() -> None:
    assert merged({"arch": "topk"}, {"architecture": "relu"}) == {"architecture": "relu"}
    assert merged({"architecture": "relu"}, {"arch": "topk"}) == {"arch": "topk"}
    below = {"sae": {"k": 1}, "data": {"folders": ["a"]}}
    above = merged(below, {"sae": {"k": 2}, "data": {"folders": ["b"]}})
    assert above == {"sae": {"k": 2}, "data": {"folders": ["b"]}}
    assert below == {"sae": {"k": 1}, "data": {"folders": ["a"]}}


@pytest.mark.parametrize("name", PRESETS)
def test_the_file_of_a_run_repeats_it(name: str, tmp_path: Path) -> None:
    """train --config run/run.toml gives the same bytes, with what it was told besides."""
    for part, seed in (("x", 0), ("y", 3)):
        with ShardWriter(tmp_path / part, D) as writer:
            writer.write(tokens(200, seed=seed))
    data = PRESETS[name].preset.data
    several = data in ("layers", "targets")
    command = ["train", tmp_path / "x", *([tmp_path / "y"] if several else [])]
    command += ["--target", tmp_path / "y"] if data in ("target", "targets") else []
    command += ["--target", tmp_path / "x"] if data == "targets" else []
    flags = ["--arch", name, "--n-latents", F, "--steps", 3, "--batch-size", 32, "--seed", 2]
    kind, preset = PRESETS[name]
    if preset.objective.get("target_l0", kind.objective_class.target_l0) is not None:
        flags += ["--target-l0", 5]
    if "k" in {field.name for field in dataclasses.fields(kind.config_class)}:
        flags += ["--k", 4]
    again = ["train", "--config", tmp_path / "first" / "run.toml", "--out", tmp_path / "again"]
    for line in ([*command, "--out", tmp_path / "first", *flags], again):
        assert main([str(word) for word in line]) == 0
    for file in ("run.toml", "sae/config.json", "sae/sae.safetensors"):
        first, second = (tmp_path / folder / file for folder in ("first", "again"))
        assert first.read_bytes() == second.read_bytes(), file
    assert json.loads((tmp_path / "again" / "result.json").read_text())["steps"] == 3
