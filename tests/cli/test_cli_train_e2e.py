"""``train-e2e``, with a tiny random GPT-2 made here."""

from __future__ import annotations

import itertools
import json

import pytest

from sae_kernels.config.toml import read_tables
from sae_kernels.harvest import token_batches
from sae_kernels.nn import JumpReLUSAE, SparseAutoencoder
from sae_kernels.training.end_to_end import EndToEnd
from tests.harvest.causal import D, documents, gpt2, tokenizer

transformers = pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

LAYER, F = "h.1", 32
QUICK = ["--n-latents", F, "--context-length", 10, "--sequences-per-batch", 8, "--log-every", 5]
QUICK += ["--lr", 1e-2, "--compute", "float32"]
TOPK = [*QUICK, "--k", 3, "--steps", 10]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny steps are quickest on one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    gpt2().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _spliced(run, sae, model, text):
    where = ["--model", model, "--layer", LAYER, "--text", text, "--context-length", 10]
    (record,) = run("eval", sae, *where, "--json").records()
    return record


def test_train_then_eval(run, model, text, tmp_path):
    out = tmp_path / "run"
    flags = [*TOPK, "--downstream-layer", "h.2", "--reconstruction-coefficient", 0.5, "--json"]
    ran = run("train-e2e", model, text, "--layer", LAYER, "--out", out, *flags)
    assert (ran.code, ran.err) == (0, "")
    *lines, result = ran.records()
    assert [line["step"] for line in lines] == [5, 10]
    assert {line["event"] for line in lines} == {"metrics"}
    assert result.keys() >= {"loss", "kl", "downstream", "fvu", "l0", "sparsity", "dead_fraction"}
    assert result["steps"] == 10
    assert result["l0"] <= 3
    weighed = result["kl"] + result["downstream"] + 0.5 * result["fvu"]
    assert result["loss"] == pytest.approx(weighed, rel=1e-5)
    # The text has fewer batches than there are steps: it was gone through again.
    batches = token_batches(gpt2(), tokenizer(), documents(40), batch_size=8, context_length=10)
    counts = [int(batch.attention_mask.sum()) for batch in batches]
    assert counts[-1] < max(counts) / 2  # what is left over, which is passed over
    whole = [count for count in counts if count >= max(counts) / 2]
    assert 2 < len(whole) < 10
    assert result["tokens"] == sum((whole * 10)[:10])
    written = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert written == [{k: v for k, v in line.items() if k != "event"} for line in lines]
    used = read_tables(out / "run.toml")
    assert used["sae"]["d_in"] == D
    assert used["train"]["batch_size"] == 80
    about = used["end_to_end"]
    assert (about["model"], about["layer"], about["text"]) == (str(model), LAYER, [str(text)])
    assert (about["downstream_layers"], about["reconstruction_coefficient"]) == (["h.2"], 0.5)
    assert _spliced(run, result["sae"], model, text)["kl"] > 0


@pytest.mark.full
def test_what_is_learnt_is_what_eval_measures(run, model, text, tmp_path):
    def kl(steps):
        out = tmp_path / str(steps)
        flags = [*QUICK, "--k", 3, "--steps", steps]
        ran = run("train-e2e", model, text, "--layer", LAYER, "--out", out, *flags)
        assert ran.code == 0
        return _spliced(run, out / "sae", model, text)["kl"]

    assert kl(60) < 0.5 * kl(1)


@pytest.mark.full
def test_jumprelu_from_a_file_of_settings(run, model, text, tmp_path):
    config = tmp_path / "config.toml"
    config.write_text(
        f'arch = "jumprelu"\n[sae]\nn_latents = {F}\nthreshold_init = 0.6\nbandwidth = 0.5\n'
        "log_threshold = false\n[objective]\ntarget_l0 = 4.0\nsparsity_warmup_steps = 0\n"
        '[optimizer]\ncompute = "float32"\n'
        "[train]\nsteps = 60\nlr = 2e-2\nlog_every = 1\nbatch_size = 85\n"
    )
    out = tmp_path / "run"
    flags = ["--config", config, "--context-length", 10, "--drop-first", 1, "--json"]
    ran = run("train-e2e", model, text, "--layer", LAYER, "--out", out, *flags)
    *lines, result = ran.records()
    assert lines[0]["sparsity"] > result["sparsity"] > 0
    assert abs(result["l0"] - 4) < 0.5 * abs(lines[0]["l0"] - 4)
    # 85 tokens are eight chunks of ten.
    assert max(b["tokens"] - a["tokens"] for a, b in itertools.pairwise(lines)) == 80
    assert isinstance(SparseAutoencoder.from_pretrained(out / "sae"), JumpReLUSAE)
    assert _spliced(run, out / "sae", model, text)["kl"] > 0


def test_the_dtype_of_the_model_is_one_of_the_run(run, model, text, tmp_path):
    command = ["train-e2e", model, text, "--layer", LAYER, *TOPK, "--json", "--device", "cpu"]
    plain = run(*command, "--out", tmp_path / "plain").records()[-1]
    ran = run(*command, "--out", tmp_path / "run", "--model-dtype", "bfloat16")
    assert read_tables(tmp_path / "run" / "run.toml")["end_to_end"]["model_dtype"] == "bfloat16"
    assert ran.records()[-1]["kl"] != plain["kl"]
    assert ran.records()[-1]["kl"] == pytest.approx(plain["kl"], rel=0.2)


def test_in_words(run, model, text, tmp_path):
    ran = run("train-e2e", model, text, "--layer", LAYER, "--out", tmp_path / "run", *TOPK)
    assert ran.code == 0
    lines = dict(line.split(None, 1) for line in ran.out.splitlines())
    assert lines["steps"] == "10"
    assert lines["sae"] == str(tmp_path / "run" / "sae")
    assert float(lines["kl"]) > 0
    assert ran.err.startswith("load model\n")


def test_every_setting_of_training_has_its_flag_here_too(run):
    def flags(command):
        return {word for word in run(command, "--help").out.split() if word.startswith("--")}

    of_data = {"--model", "--text", "--target-layer", "--model-batch-size", "--check-on-read"}
    of_data |= {"--dataset", "--dataset-split", "--dataset-column", "--no-check-on-read"}
    of_data |= {"--dataset-subset", "--dataset-revision"}
    of_processes = {"--latents-over", "--tokens-over", "--blocks", "--partial-sums", "--timeout"}
    of_processes |= {"--harvest-ranks"}
    assert flags("train-e2e") >= flags("train") - of_data - of_processes - {"--target", "--verify"}
    assert f"[default: {EndToEnd.kl_coefficient}]" in run("train-e2e", "--help").out


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["--arch", "transcoder"], "expected one that reconstructs a single layer"),
        (["--arch", "crosscoder_relu"], "got 'crosscoder_relu'; train it on stored activations"),
        (["--d-out", D, "--no-subtract-b-dec"], "a single layer, got a transcoder"),
        (["--n-layers", 2], "a single layer, got a crosscoder"),
        (["--arch", "topkk"], "did you mean 'topk'?"),
        (["--arch", "matryoshka"], "reconstruction_coefficient: expected a number above 0"),
        (["--layer", "h.9"], "nearest: h."),
        (["--downstream-layer", "h.0"], "expected layers that run after h.1, got h.0"),
        (["--downstream-layer", "h.7"], "nearest: h."),
        (["--kl-coefficient", 0], "expected a coefficient above 0"),
        (["--kl-coefficient", -1], "kl_coefficient: expected a number >= 0"),
        (["--context-length", 99], "expected context_length from 1 to 20"),
        (["--context-length", 0], "--context-length"),
        (["--sequences-per-batch", 0], "--sequences-per-batch"),
        (["--batch-size", 80], "expected it or --batch-size, got both"),
        (["--d-in", 9], f"d_in: expected {D}, the width of the activations"),
        (["--adam", "lazy"], "adam: expected 'dense' with route 'autograd'"),
        (["--arch", "relu", "--fix-shrinkage"], "fix_shrinkage: expected false end to end"),
        (["--micro-batch-size", 8], "micro_batch_size: expected none end to end"),
        (["--resample-every", 8], "resample_every: expected none end to end"),
        (["--sparsity", "l0", "--sparsity-coefficient", 1], "sparsity: expected one of"),
        (["--config", "nowhere.toml"], "nowhere.toml: expected a TOML file, it is not there"),
    ],
)
def test_what_does_not_fit(run, model, text, tmp_path, changes, expected):
    k = [] if "--arch" in changes else ["--k", 3]
    flags = [*QUICK, *k, "--steps", 2, "--json", "--layer", LAYER, *changes]
    assert expected in run("train-e2e", model, text, "--out", tmp_path / "run", *flags).refusal()
    assert not (tmp_path / "run").exists()


def test_input_that_is_not_there(run, model, text, tmp_path):
    options = ["--layer", LAYER, "--out", tmp_path / "run", *TOPK, "--json"]
    assert "nothing is there" in run("train-e2e", tmp_path / "model", text, *options).refusal()
    missing = run("train-e2e", model, tmp_path / "novel.txt", *options)
    assert "does not exist" in missing.refusal()
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    message = run("train-e2e", model, empty, *options).refusal()
    assert "expected text with at least one token to replace, got none" in message
    headless = tmp_path / "headless"
    bert = transformers.BertConfig(
        vocab_size=15, hidden_size=8, num_hidden_layers=1, num_attention_heads=2
    )
    transformers.BertModel(bert).save_pretrained(headless)
    tokenizer().save_pretrained(headless)
    message = run("train-e2e", headless, text, *options).refusal()
    assert "expected a model with a language-model head" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["--layer", "h.1", "--out", "o"], "'model'"),
        (["model", "--layer", "h.1", "--out", "o"], "'text'"),
        (["model", "text", "--out", "o"], "--layer"),
        (["model", "text", "--layer", "h.1"], "--out"),
    ],
)
def test_what_is_missing_is_named(run, arguments, missing):
    message = run("train-e2e", *arguments).refusal()
    assert "Missing" in message
    assert missing in message


def test_what_is_there_is_kept(run, model, text, tmp_path, contents):
    command = ["train-e2e", model, text, "--layer", LAYER, "--out", tmp_path / "run"]
    command += [*TOPK, "--json"]
    assert run(*command).code == 0
    before = contents(tmp_path / "run")
    assert "--overwrite" in run(*command, "--seed", 1).refusal()
    assert "nearest" in run(*command, "--overwrite", "--layer", "h.9").refusal()
    assert contents(tmp_path / "run") == before
    assert run(*command, "--overwrite", "--seed", 1).code == 0
    assert contents(tmp_path / "run") != before
