"""Switch SAEs from the command line: their settings, every command on them, and wrong input."""

from __future__ import annotations

import json

import pytest
import torch

from sae_kernels import formats
from sae_kernels.config.toml import read_tables
from sae_kernels.nn import SparseAutoencoder, SwitchConfig, SwitchSAE

D_IN = 8  # of the data fixture
QUICK = ["--steps", 4, "--batch-size", 64, "--n-latents", 32, "--log-every", 2, "--k", 4]
SWITCH = ["--arch", "switch", *QUICK]


@pytest.fixture
def trained(run, data, tmp_path):
    """The folder of a run."""
    ran = run("train", data, "--out", tmp_path / "run", *SWITCH, "--n-experts", 4)
    assert ran.code == 0, ran.err
    return tmp_path / "run"


def test_its_settings_are_flags(run, data, tmp_path):
    flags = ["--n-experts", 4, "--gate", "heaviside", "--shared-expert"]
    out = tmp_path / "run"
    ran = run("train", data, "--out", out, *SWITCH, *flags, "--balance-coefficient", 0.25)
    assert ran.code == 0, ran.err
    settings = read_tables(out / "run.toml")
    assert settings["architecture"] == "switch"
    asked = {"n_experts": 4, "gate": "heaviside", "shared_expert": True}
    assert {name: settings["sae"][name] for name in asked} == asked
    assert settings["objective"]["balance_coefficient"] == 0.25
    sae = SparseAutoencoder.from_pretrained(out / "sae")
    assert isinstance(sae, SwitchSAE)
    assert sae.W_router.shape == (3, D_IN)
    assert "gate=heaviside, shared_expert=True" in repr(sae)


def test_its_settings_are_keys_of_a_file(run, data, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        'arch = "switch"\n[sae]\nn_latents = 32\nk = 2\nn_experts = 16\ngate = "heaviside"\n'
        "[objective]\nbalance_coefficient = 0.5\n[train]\nsteps = 2\nbatch_size = 32\n"
    )
    out = tmp_path / "run"
    assert run("train", data, "--out", out, "--config", config, "--no-shared-expert").code == 0
    settings = read_tables(out / "run.toml")
    assert settings["sae"]["n_experts"] == 16
    assert settings["sae"]["shared_expert"] is False
    assert settings["objective"]["balance_coefficient"] == 0.5


@pytest.mark.parametrize("route", ["fused", "autograd"])
def test_the_router_learns_on_either_route(run, data, tmp_path, route):
    start = SwitchSAE(SwitchConfig(D_IN, 32, k=4, n_experts=4))
    out = tmp_path / "run"
    flags = ["--n-experts", 4, "--route", route, "--normalize-activations", "none", "--lr", 0.01]
    assert run("train", data, "--out", out, *SWITCH, *flags).code == 0
    sae = SparseAutoencoder.from_pretrained(out / "sae")
    assert (sae.W_router != start.W_router).any(1).all()


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--n-experts", 5], "n_experts: expected a divisor of n_latents = 32, got 5"),
        (["--n-experts", 0], "n_experts: expected a positive integer, got 0"),
        (["--n-experts", -4], "n_experts: expected a positive integer, got -4"),
        (["--n-experts", 64], "n_experts: expected a divisor of n_latents = 32, got 64"),
        (["--n-experts", 10**30], "n_experts: expected a divisor of n_latents = 32"),
        (["--n-experts", 2.5], "'--n-experts': Input should be a valid integer"),
        (["--n-experts", "four"], "'--n-experts': Input should be a valid integer"),
        (
            ["--n-experts", 16],
            "k: expected at most 2, the latents of one of 16 experts, got 4",
        ),
        (["--gate", "relu"], "gate: expected one of softmax, heaviside, got 'relu'"),
        (
            ["--n-experts", 1, "--shared-expert"],
            "shared_expert: expected false with n_experts = 1",
        ),
        (["--balance-coefficient", -1], "balance_coefficient: expected a number of at least 0"),
        (["--balance-coefficient", "nan"], "balance_coefficient: expected a number of at least 0"),
        (["--experts", 4], "No such option: --experts"),
        (["--multi-topk"], "multi_topk: no setting of the objective of 'switch'"),
        (["--groups", "16,16"], "groups: no setting of architecture 'switch'"),
        (["--relu", "none"], "relu: no setting of architecture 'switch'"),
        (["--arch", "swich"], "got 'swich'; did you mean 'switch'?"),
        (["--arch", "topk", "--gate", "softmax"], "gate: no setting of architecture 'topk'"),
        (["--arch", "topk", "--n-experts", 4], "n_experts: no setting of architecture 'topk'"),
        (
            ["--arch", "topk", "--balance-coefficient", 0.1],
            "balance_coefficient: no setting of the objective of 'topk', which has loss, ",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(run, data, tmp_path, flags, expected):
    ran = run("train", data, "--out", tmp_path / "run", *SWITCH, *flags)
    assert expected in ran.refusal()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('n_experts = "4"', "n_experts: expected a positive integer, got '4'"),
        ("n_experts = true", "n_experts: expected a positive integer, got True"),
        ("n_experts = [4]", "n_experts: expected a positive integer, got [4]"),
        ("gate = 1", "gate: expected one of softmax, heaviside, got 1"),
        ("shared_expert = 1", "shared_expert: expected true or false, got 1"),
        ("experts = 4", "[sae]: unknown key 'experts'; did you mean 'n_experts'?"),
    ],
)
def test_a_file_that_does_not_fit(run, data, tmp_path, text, expected):
    config = tmp_path / "config.toml"
    config.write_text(f"[sae]\n{text}\n")
    ran = run("train", data, "--out", tmp_path / "run", "--config", config, *SWITCH)
    assert expected in ran.refusal()
    assert not (tmp_path / "run").exists()


def test_a_sweep_over_the_number_of_experts(run, data, tmp_path):
    file = tmp_path / "sweep.toml"
    text = (
        f'arch = "switch"\n[data]\nfolders = ["{data}"]\n[sae]\nn_latents = 32\nk = 2\n[train]\n'
        'steps = 2\nbatch_size = 64\n[sweep]\n"sae.n_experts" = [1, 4, EXPERTS]\n'
    )
    file.write_text(text.replace("EXPERTS", "16"))
    ran = run("sweep", file, "--out", tmp_path / "runs", "--json")
    assert ran.code == 0, ran.err
    names = {record["run"] for record in ran.records()}
    assert names == {"n_experts1", "n_experts4", "n_experts16"}
    for n in (1, 4, 16):
        sae = SparseAutoencoder.from_pretrained(tmp_path / "runs" / f"n_experts{n}" / "sae")
        assert sae.W_router.shape == (n, D_IN)
    file.write_text(text.replace("EXPERTS", "5"))
    refused = run("sweep", file, "--out", tmp_path / "others").refusal()
    assert "n_experts: expected a divisor of n_latents = 32, got 5" in refused
    assert not (tmp_path / "others").exists()


def test_every_command_reads_the_run(run, data, trained):
    (seen,) = run("inspect", trained / "sae", "--json").records()
    assert seen["config"]["architecture"] == "switch"
    assert seen["config"]["n_experts"] == 4
    assert seen["tensors"]["W_router"] == {"shape": [4, D_IN], "dtype": "float32"}
    assert "settings.sae.n_experts" in run("inspect", trained, "--verify").out
    (measured,) = run("eval", trained / "sae", data, "--json").records()
    assert 0 < measured["l0"] <= 4
    assert 0 < measured["fvu"] < 1.5
    assert run("report", trained).code == 0
    assert "switch" in (trained / "report.html").read_text()
    assert "it has made all its steps" in run("resume", trained).refusal()
    for primitive in ("route_top1", "select_topk_routed"):
        (said,) = run("explain", primitive, "--json").records()
        assert said["backend"] in ("cpu", "reference")


# -- convert ---------------------------------------------------------------------------------------


@pytest.fixture
def theirs(tmp_path):
    """A folder of amudide/switch_sae."""
    g = torch.Generator().manual_seed(0)
    state = {
        "encoder.weight": torch.randn(32, D_IN, generator=g),
        "router.weight": torch.randn(4, D_IN, generator=g),
        "decoder": torch.nn.functional.normalize(torch.randn(32, D_IN, generator=g)),
        "b_dec": torch.randn(D_IN, generator=g),
    }
    state["b_router"] = state["b_dec"]
    trainer = {"trainer_class": "SwitchTrainer", "dict_class": "SwitchAutoEncoder"}
    trainer |= {"activation_dim": D_IN, "dict_size": 32, "k": 4, "experts": 4, "heaviside": False}
    trainer |= {"layer": 8, "lm_name": "gpt2"}
    (tmp_path / "theirs").mkdir()
    torch.save(state, tmp_path / "theirs" / "ae.pt")
    (tmp_path / "theirs" / "config.json").write_text(json.dumps({"trainer": trainer}))
    return tmp_path / "theirs"


def test_there_and_back_bit_by_bit(run, theirs, tmp_path):
    ours, back = tmp_path / "ours", tmp_path / "back"
    ran = run("convert", theirs, ours, "--to", "native")
    assert ran.out == (
        f"switch, 8 to 32 latents in float32: {ours} (native, from dictionary_learning)\n"
    )
    assert run("convert", ours, back, "--to", "dictionary_learning").code == 0
    state = torch.load(back / "ae.pt", weights_only=True)
    for name, tensor in torch.load(theirs / "ae.pt", weights_only=True).items():
        assert torch.equal(state[name], tensor), name
    assert formats.read(back).config == formats.read(theirs).config
    again = ["convert", theirs, back, "--to", "dictionary_learning"]
    assert "expected a new or an empty folder" in run(*again).refusal()
    assert run(*again, "--overwrite").code == 0
    metadata = formats.read(back).metadata
    assert metadata["activations"] == {"model": "gpt2"}
    assert metadata["dictionary_learning"]["trainer"]["layer"] == 8
    (seen,) = run("inspect", back, "--json").records()
    assert (seen["format"], seen["config"]["gate"]) == ("dictionary_learning", "softmax")
    (measured,) = run("inspect", ours, "--json").records()
    assert measured["tensors"]["b_router"] == {"shape": [D_IN], "dtype": "float32"}


@pytest.mark.parametrize(
    ("to", "expected"),
    [
        ("sparsify", "sparsify: expected a TopK SAE, got SwitchConfig"),
        ("saelens", "SAELens: it has no class for SwitchConfig"),
        ("dictionary_learning", "dictionary_learning: expected b_enc of zeros, got numbers up to"),
    ],
)
def test_what_a_format_lacks(run, trained, tmp_path, to, expected):
    ran = run("convert", trained / "sae", tmp_path / "out", "--to", to)
    assert expected in ran.refusal()
    assert not (tmp_path / "out").exists()


def test_other_saes_go_to_dictionary_learning_too(run, saved, tmp_path):
    ran = run("convert", saved, tmp_path / "out", "--to", "dictionary_learning")
    assert ran.code == 0, ran.err
    trainer = json.loads((tmp_path / "out" / "config.json").read_text())["trainer"]
    assert trainer["dict_class"] == "AutoEncoderTopK"
