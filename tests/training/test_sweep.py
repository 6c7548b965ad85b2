"""The runs of a sweep's file."""

from __future__ import annotations

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

import pytest

from sae_kernels.config.toml import read_tables
from sae_kernels.io.files import is_plain_name
from sae_kernels.training import RunConfig
from sae_kernels.training.sweep import expand

if TYPE_CHECKING:
    from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BASE = '[data]\nfolders = ["acts"]\n[sae]\nd_in = 8\nn_latents = 32\nk = 4\n'


def expanded(text: str, base: str = BASE) -> dict[str, Any]:
    return expand(tomllib.loads(base + text))


def test_every_combination_is_a_run() -> None:
    runs = expanded('[sweep]\n"sae.k" = [2, 4]\n"train.lr" = [1e-3, 0.5]\n')
    assert list(runs) == ["k2-lr0.001", "k2-lr0.5", "k4-lr0.001", "k4-lr0.5"]
    got = [(run["sae"]["k"], run["train"]["lr"]) for run in runs.values()]
    assert got == [(2, 1e-3), (2, 0.5), (4, 1e-3), (4, 0.5)]
    for run in runs.values():
        assert run["data"] == {"folders": ["acts"]}
        assert run["sae"]["n_latents"] == 32
        assert RunConfig.from_tables(run).sae.d_in == 8


def test_dotted_keys_and_tables_are_the_same() -> None:
    dotted = expanded('[sweep]\n"sae.k" = [2, 4]\n"train.seed" = [0, 1]\n')
    assert expanded("[sweep]\nsae.k = [2, 4]\ntrain.seed = [0, 1]\n") == dotted
    assert expanded("[sweep.sae]\nk = [2, 4]\n[sweep.train]\nseed = [0, 1]\n") == dotted


def test_named_runs_come_after_the_grid() -> None:
    runs = expanded(
        '[sweep]\n"sae.k" = [2]\n[[run]]\nname = "wide"\nsae.n_latents = 64\n'
        '[[run]]\nname = "plain"\n'
    )
    assert list(runs) == ["k2", "wide", "plain"]
    assert runs["wide"]["sae"] == {"d_in": 8, "n_latents": 64, "k": 4}
    assert runs["plain"]["sae"]["n_latents"] == 32
    assert "name" not in runs["wide"]


def test_architectures() -> None:
    runs = expanded(
        '[sweep]\narch = ["abstopk", "relu"]\n"train.steps" = [3]\n'
        '[[run]]\nname = "bare"\narchitecture = "relu"\n',
        'arch = "topk"\n[sae]\nd_in = 8\nn_latents = 32\n',
    )
    assert list(runs) == ["abstopk-steps3", "relu-steps3", "bare"]
    configs = {name: RunConfig.from_tables(run) for name, run in runs.items()}
    assert [c.sae.architecture for c in configs.values()] == ["topk", "relu", "relu"]
    assert configs["abstopk-steps3"].sae.by_magnitude  # the preset's
    assert configs["bare"].train == dataclasses.replace(configs["relu-steps3"].train, steps=1000)
    kinds = expanded('[sweep]\narchitecture = ["topk", "batchtopk"]\n', 'arch = "relu"\n')
    assert list(kinds) == ["topk", "batchtopk"]
    assert all("arch" not in run for run in kinds.values())


def test_all_runs_share_the_order_of_the_data() -> None:
    runs = expanded('[train]\nseed = 3\n[sweep]\n"train.seed" = [0, 1]\n')
    orders = {RunConfig.from_tables(run).train.order_seed for run in runs.values()}
    assert orders == {3}
    assert {run["train"]["seed"] for run in runs.values()} == {0, 1}
    runs = expanded('[train]\ndata_seed = 9\n[[run]]\nname = "a"\ntrain.seed = 5\n')
    assert runs["a"]["train"] == {"data_seed": 9, "seed": 5}


def test_runs_may_read_layers_of_their_own() -> None:
    live = '[data]\nmodel = "m"\ntext = ["t"]\n[sae]\nd_in = 8\nn_latents = 32\n'
    runs = expanded(
        '[sweep]\n"data.layer" = ["h.3", "h.6"]\n[[run]]\nname = "map"\narch = "transcoder"\n'
        'data.layer = "h.3"\ndata.target_layer = "h.6"\n',
        live,
    )
    assert list(runs) == ["layer_h.3", "layer_h.6", "map"]
    data = {name: RunConfig.from_tables(run).data for name, run in runs.items()}
    assert [each.layer for each in data.values()] == [("h.3",), ("h.6",), ("h.3",)]
    assert data["map"].target_layer == ("h.6",)
    assert {each.model for each in data.values()} == {"m"}
    runs = expanded('[sweep]\n"data.folders" = [["a/h.3"], ["a/h.6"]]\n')
    assert list(runs) == ["folders_a_h.3", "folders_a_h.6"]


def test_without_either_there_is_one_run() -> None:
    (name, run), *more = expanded("").items()
    assert (name, more) == ("run", [])
    assert RunConfig.from_tables(run) == RunConfig.from_tables(
        tomllib.loads(BASE + "[train]\ndata_seed = 0\n")
    )


def test_runs_do_not_share_their_tables() -> None:
    runs = expanded('[sweep]\n"sae.k" = [2, 4]\n')
    runs["k2"]["data"]["folders"].append("more")
    runs["k2"]["sae"]["d_in"] = 9
    assert runs["k4"]["data"] == {"folders": ["acts"]}
    assert runs["k4"]["sae"]["d_in"] == 8


@pytest.mark.parametrize(
    ("grid", "name"),
    [
        ('"sae.groups" = [[8, 24]]', "groups8x24"),
        ('"optimizer.adam" = ["lazy"]', "adam_lazy"),
        ('"objective.multi_topk" = [true]', "multi_topk_true"),
        ('"objective.sparsity_coefficient" = [1e-7]', "sparsity_coefficient1e-07"),
        ('"train.device" = ["../a b:0"]', "device_.._a_b_0"),
    ],
)
def test_names_say_what_differs_and_stay_in_their_folder(grid: str, name: str) -> None:
    (got,) = expanded(f"[sweep]\n{grid}\n")
    assert got == name
    assert is_plain_name(got)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[sweep]\nsae.k = []\n", r"\[sweep\]: sae.k: expected a list of values, got \[\]"),
        ("[sweep]\nsae.k = 3\n", r"\[sweep\]: sae.k: expected a list of values, got 3"),
        ("[sweep]\nsae = 3\n", r"\[sweep\]: sae: expected a list"),
        ("[sweep]\nsae = [3]\n", r"\[sweep\]: expected a table \[sae\], got 3"),
        ("[sweep.sae]\nkk = [3]\n", r"\[sweep\]: \[sae\]: unknown key 'kk'"),
        ("[sweep]\nk = [3]\n", r"\[sweep\]: unknown table 'k'"),
        ('[sweep]\n"sea.k" = [3]\n', r"\[sweep\]: unknown table 'sea'; did you mean 'sae'"),
        ('[sweep]\n"sae.k.x" = [3]\n', r"\[sweep\]: unknown table 'sae\.k'"),
        ('[sweep]\n"data.model" = ["a"]\n', r"\[sweep\]: data.model: expected in the file's own"),
        ('[sweep]\n"output.checkpoint_every" = [3]\n', r"\[sweep\]: output: expected in the"),
        ('[sweep]\narch = ["topkk"]\n', None),
        ("[sweep]\narch = [3]\n", r"\[sweep\]: arch: expected one of topk"),
        ("[sweep]\nsae.k = [2, 2]\n", "expected names that differ, got 'k2' twice"),
        ('[sweep]\nsae.k = [2]\n[[run]]\nname = "k2"\n', "got 'k2' twice"),
        ("[[run]]\nsae.k = 3\n", r"\[\[run\]\]: name: expected a name, got None"),
        ("[[run]]\nname = 3\n", r"\[\[run\]\]: name: expected a name, got 3"),
        ('[run]\nname = "a"\n', r"\[\[run\]\]: expected tables, each with a name"),
        ('[[run]]\nname = "a"\ndata.text = ["b"]\n', r"\[\[run\]\]: data.text: expected in the"),
        ('[[run]]\nname = "a"\noutput.loggers = []\n', r"\[\[run\]\]: output: expected in the"),
        ('[[run]]\nname = "a"\nsae.kk = 3\n', r"\[\[run\]\]: \[sae\]: unknown key 'kk'"),
        ("[train]\nstpes = 3\n", r"\[train\]: unknown key 'stpes'; did you mean 'steps'"),
        ("[swep]\nsae.k = [2]\n", "unknown table 'swep'; did you mean 'sweep'"),
    ],
)
def test_files_that_do_not_fit(text: str, message: str | None) -> None:
    if message is None:  # seen when the settings are made
        (run,) = expanded(text).values()
        with pytest.raises(ValueError, match="did you mean 'topk'"):
            RunConfig.from_tables(run)
        return
    with pytest.raises(ValueError, match=message):
        expanded(text)


def test_lists_that_are_no_tables_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[sweep\]: expected a table of lists, got 3"):
        expand({"sweep": 3})
    with pytest.raises(ValueError, match=r"\[\[run\]\]: expected tables"):
        expand({"run": [3]})


def test_the_file_of_one_run_is_a_sweep_of_one(tmp_path: Path) -> None:
    config = RunConfig.from_tables({"arch": "relu", "sae": {"d_in": 8, "n_latents": 32}})
    config.write(tmp_path / "run.toml")
    (run,) = expand(read_tables(tmp_path / "run.toml")).values()
    again = RunConfig.from_tables(run)
    assert again.sae == config.sae
    assert again.train.order_seed == config.train.order_seed
