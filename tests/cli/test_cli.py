"""What all commands have in common, and the two that only look: env and explain."""

from __future__ import annotations

import pytest
import torch

import sae_kernels
from sae_kernels import backends
from sae_kernels.backends.cpu import Screening
from sae_kernels.cli import main, output

COMMANDS = ["demo", "harvest", "train", "train-e2e", "eval", "convert"]
COMMANDS += ["bench", "plan", "env", "explain"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_says_how_to_get_json_and_a_traceback(run, command):
    ran = run(command, "--help")
    assert ran.code == 0
    assert "--json" in ran.out
    assert "--debug" in ran.out


def test_without_a_command_the_help_names_them_all(run):
    ran = run()
    assert ran.code == 0
    assert all(f"\n  {command} " in ran.out for command in COMMANDS)


def test_version(run):
    assert run("--version").out == f"sae-kernels {sae_kernels.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tran"], "tran"),
        (["train", "data", "--out", "o", "--stepz", "3"], "--steps"),
        (["train", "data"], "--out"),
        (["train", "data", "--out", "o", "--steps", "many"], "'--steps'"),
        (["eval", "sae"], "sae-kernels eval --help"),
        (["demo", "--steps", "0"], "--steps"),
    ],
)
def test_a_command_line_that_cannot_be_read_is_refused_in_one_line(run, arguments, expected):
    assert expected in run(*arguments).refusal()


@pytest.mark.parametrize("place", [0, 1, 3])
def test_debug_shows_the_traceback_wherever_it_stands(run, place):
    arguments = ["eval", "nowhere", "nothing"]
    assert "Traceback" not in run(*arguments).err
    arguments.insert(place, "--debug")
    ran = run(*arguments)
    assert ran.code == 2
    assert "Traceback" in ran.err
    assert ran.err.splitlines()[-1].startswith("sae-kernels: nothing is not a data set")


def test_a_failure_of_ours_exits_1_and_says_so(run, data, saved, monkeypatch):
    def fail(*_args, **_options):
        raise RuntimeError("a kernel\nwent wrong")

    monkeypatch.setattr("sae_kernels.training.evaluate", fail)
    ran = run("eval", saved, data)
    assert ran.code == 1
    assert ran.err.startswith("sae-kernels: internal failure, RuntimeError: a kernel went wrong;")
    assert ran.err.count("\n") == 1


def test_interruption_exits_130_without_a_word(run, data, saved, monkeypatch):
    def interrupt(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sae_kernels.training.evaluate", interrupt)
    assert run("eval", saved, data) == (130, "", "")


def test_env_as_json(run, monkeypatch):
    monkeypatch.setenv("SAE_KERNELS_BACKEND", "reference")
    monkeypatch.setenv("HF_TOKEN", "a secret")
    ran = run("env", "--json")
    (record,) = ran.records()
    assert record["versions"]["torch"] == torch.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["kernels"]["isa_in_use"] in record["kernels"]["isas_supported"]
    assert record["kernels"]["compiler"]
    ahead = f"ahead of time ({record['kernels']['cuda_archs']})"
    assert ahead in record["cuda_kernels"] or "build it again with nvcc" in record["cuda_kernels"]
    reasons = record["primitives"]["decode"]
    assert (reasons["cpu"], reasons["reference"]) == (None, None)
    assert "cuda" in reasons
    assert record["environment"]["SAE_KERNELS_BACKEND"] == "reference"
    assert "secret" not in ran.out


@pytest.mark.full
def test_env_without_the_compiled_module_says_how_to_get_it(run, monkeypatch):
    def missing():
        raise RuntimeError("_C cannot be loaded; build it")

    monkeypatch.setattr("sae_kernels.backends.cpu.module", missing)
    ran = run("env")
    assert ran.code == 0
    assert "missing _C cannot be loaded; build it" in ran.out
    assert "does not run here: _C cannot be loaded; build it" in ran.out


def test_explain_names_the_backend_and_each_reason(run, monkeypatch):
    (record,) = run("explain", "select_topk", "--dtype", "bfloat16", "--json").records()
    assert record["backend"] == "cpu"
    assert record["origin"] == "automatic choice"
    (record,) = run("explain", "select_topk", "--device", "cuda:1", "--json").records()
    assert record["backend"] == "reference"
    assert "cuda:1" in record["candidates"][0]["reason"]
    monkeypatch.setenv("SAE_KERNELS_BACKEND", "reference")
    text = run("explain", "select_topk").out
    assert "runs on reference (the environment variable SAE_KERNELS_BACKEND)" in text
    assert "could, but is not chosen" in text
    monkeypatch.setenv("SAE_KERNELS_BACKEND", "cpu")
    (record,) = run("explain", "select_topk", "--device", "cuda:1", "--json").records()
    assert record["backend"] is None


SCREENED = ("select_topk", "select_topk_routed", "select_threshold", "select_batch_topk")


@pytest.mark.parametrize(
    ("screening", "by"),
    [
        (Screening.PAIRS, "vpmaddubsw"),
        (Screening.FOURS, "vpdpbusd (VNNI)"),
        (Screening.TILES, "tdpbusd (AMX)"),
    ],
)
def test_explain_says_how_scores_are_screened(run, monkeypatch, screening, by):
    monkeypatch.setattr("sae_kernels.backends.cpu.fastest_screening", lambda _: screening)
    for primitive in SCREENED:
        (record,) = run("explain", primitive, "--json").records()
        assert f"in 8 bits by {by}" in record["note"]
        assert f"in 8 bits by {by}" in run("explain", primitive).out
        (record,) = run("explain", primitive, "--dtype", "float64", "--json").records()
        assert record["note"] is None


def test_explain_names_no_screen_where_no_score_is_screened(run, monkeypatch):
    monkeypatch.setattr("sae_kernels.backends.cpu.fastest_screening", lambda _: Screening.NONE)
    (record,) = run("explain", "select_threshold", "--json").records()
    assert "screens" not in record["note"]


@pytest.mark.parametrize("primitive", SCREENED)
@pytest.mark.parametrize(
    ("isa", "by_blocks"), [("avx2", {torch.float64}), ("amx", {torch.float64, torch.bfloat16})]
)
def test_explain_says_for_how_many_tokens_threads_share_the_latents(
    monkeypatch, primitive, isa, by_blocks
):
    monkeypatch.setattr("sae_kernels.backends.cpu.isa", lambda: isa)
    monkeypatch.setattr("sae_kernels.backends.cpu.fastest_screening", lambda _: Screening.NONE)
    few = "up to 16 tokens: threads share the latents and read W once"
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        assert backends.note(primitive, "cpu", dtype) == (None if dtype in by_blocks else few)


RUN = """
[sae]
d_in = 768
n_latents = 6144
[train]
batch_size = 8192
device = "cpu"
[optimizer]
compute = "float32"
"""


def test_explain_says_which_layout_a_run_has(run, tmp_path):
    """With the bytes of the formula: 4 D / G (B (S - 1) + F (R - 1)), of sums and of rows."""
    config = tmp_path / "run.toml"
    config.write_text(RUN)
    of = ["explain", "layout", "--processes", "4", "--config", str(config)]
    (record,) = run(*of, "--json").records()
    assert (record["latents_over"], record["tokens_over"]) == (2, 2)
    sums, rows = 4 * 8192 * 768 / 4e6, 4 * 6144 * 768 / 4e6
    each = (f"{sums + rows:.3g}", f"{3 * sums:.3g}", f"{3 * rows:.3g}")
    assert record["reason"] == (
        "latents over 2, tokens over 2: of reconstructions a process sends {} MB a step; latents "
        "over 4: {} MB; tokens over 4: {} MB".format(*each)
    )
    said = run(*of, "--latents-over", "2", "--harvest-ranks", "2").out
    assert said.startswith("latents over 2: of reconstructions")
    assert "the last 2 of 4 processes run the model" in said
    refused = run(*of, "--latents-over", "3").refusal()
    assert "expected numbers whose product is that of the processes, 4, got 3" in refused


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["decod"], "did you mean 'decode'?"),
        (["layout", "--processes", "2"], "layout: expected --processes and --config"),
        (["decode", "--tokens-over", "2"], "--tokens-over: expected it with layout alone"),
        (["decode", "--dtype", "int8"], "expected one of float32"),
        (["decode", "--device", "toaster"], "'toaster'"),
    ],
)
def test_explain_refuses_what_does_not_exist(run, arguments, expected):
    assert expected in run("explain", *arguments).refusal()


def test_a_backend_that_does_not_exist_is_refused(run, monkeypatch):
    monkeypatch.setenv("SAE_KERNELS_BACKEND", "gpu")
    assert "expected a backend among" in run("explain", "decode").refusal()


def test_numbers_that_are_not_finite_become_null(capsys):
    output.Output(as_json=True).record({"a": float("nan"), "b": [float("inf"), 1.5]})
    assert capsys.readouterr().out == '{"a": null, "b": [null, 1.5]}\n'


def test_progress_without_a_terminal_is_an_occasional_line(capsys, monkeypatch):
    monkeypatch.setattr(output, "_QUIET_SECONDS", 0.0)
    with output.Output(as_json=False).progress() as show:
        for done in range(4):
            show("train", done, 3)
    assert capsys.readouterr().err == "train\ntrain: 1 of 3, 0:00 left\ntrain: 2 of 3, 0:00 left\n"


def test_progress_without_a_count_says_what_it_is_at(capsys):
    with output.Output(as_json=False).progress() as show:
        for note in ("dense", "dense", "ours"):
            show("warm up", 0, None, note)
    assert capsys.readouterr().err == "warm up: dense\nwarm up: ours\n"


def test_main_reads_the_arguments_of_the_process(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sae-kernels", "--version"])
    assert main() == 0
    assert capsys.readouterr().out.startswith("sae-kernels ")
