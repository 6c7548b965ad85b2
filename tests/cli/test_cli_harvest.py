"""``harvest``, with a tiny model made here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from sae_kernels.data import ShardDataset

transformers = pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

WORDS = ["the", "cat", "sat", "on", "a", "mat"]
LAYER = ["--layer", "encoder.layer.0", "--context-length", 8]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    folder = tmp_path_factory.mktemp("model")
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    vocabulary = {w: i for i, w in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=20,
    )
    transformers.BertModel(config).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("the cat sat on a mat " * 5)
    return path


def test_harvest(run, model, text, tmp_path):
    ran = run("harvest", model, text, *LAYER, "--out", tmp_path / "acts", "--json")
    assert ran.code == 0
    (record,) = ran.records()
    assert record["n_tokens"] == 30
    assert record["layer"] == "encoder.layer.0"
    stored = ShardDataset(record["folder"])
    assert (stored.n_tokens, stored.d_in, stored.dtype) == (30, 16, torch.float32)

    options = ["--dtype", "float16", "--max-tokens", 12, "--no-drop-special-tokens"]
    ran = run("harvest", model, text, text, *LAYER, "--out", tmp_path / "more", *options)
    assert ran.code == 0
    assert "12 tokens of encoder.layer.0" in ran.out
    rows = ShardDataset(tmp_path / "more").rows(0, 12)
    assert rows.activations.dtype == torch.float16
    assert rows.tokens[0] == 2  # [CLS]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"--layer": "encoder.layer.7"}, "nearest: encoder.layer."),
        ({"--dtype": "int8"}, "--dtype: expected one of float32"),
        ({"--context-length": 99}, "expected context_length from 3 to 20"),
        ({"--max-tokens": 0}, "max_tokens of at least 1"),
    ],
)
def test_options_that_do_not_fit(run, model, text, tmp_path, changes, expected):
    options = {"--layer": "encoder.layer.0", "--context-length": 8, **changes}
    flags = [part for option in options.items() for part in option]
    ran = run("harvest", model, text, *flags, "--out", tmp_path / "acts")
    # Loading the model is told on standard error before the error is.
    assert expected in ran._replace(err=ran.err.replace("load model\n", "")).refusal()
    assert not (tmp_path / "acts").exists()


def test_input_that_is_not_there(run, model, text, tmp_path):
    out = ["--out", tmp_path / "acts", *LAYER, "--json"]
    assert "nothing is there" in run("harvest", tmp_path / "model", text, *out).refusal()
    assert "does not exist" in run("harvest", model, tmp_path / "novel.txt", *out).refusal()
    (tmp_path / "lines.jsonl").write_text(json.dumps({"body": "the cat"}))
    assert 'under "text"' in run("harvest", model, tmp_path / "lines.jsonl", *out).refusal()


def test_what_is_there_is_kept(run, model, text, tmp_path, contents):
    command = ["harvest", model, text, *LAYER, "--out", tmp_path / "acts", "--json"]
    assert run(*command).code == 0
    before = contents(tmp_path / "acts")
    assert "--overwrite" in run(*command).refusal()
    failing = ["--overwrite", "--layer", "encoder.layer.9"]
    assert "encoder.layer.9" in run(*command, *failing).refusal()
    assert contents(tmp_path / "acts") == before
    assert run(*command, "--overwrite", "--max-tokens", 7).records()[0]["n_tokens"] == 7


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "dataset"
    folder.mkdir()
    for split, n in (("train", 5), ("test", 2)):
        lines = [json.dumps({"text": "the cat sat", "body": "a mat"}) for _ in range(n)]
        (folder / f"{split}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.full
def test_a_dataset_in_the_place_of_text(run, model, dataset, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="needs sae-kernels[datasets]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    command = ["harvest", model, *LAYER, "--dataset", dataset, "--json"]
    ran = run(*command, "--out", tmp_path / "acts")
    assert (ran.code, ran.records()[0]["n_tokens"]) == (0, 15)
    options = ["--split", "test", "--column", "body"]
    ran = run(*command, "--out", tmp_path / "body", *options)
    assert ran.records()[0]["n_tokens"] == 4
    stored = ShardDataset(tmp_path / "body")
    chosen = {"name": str(dataset), "split": "test", "column": "body"}
    assert stored.metadata["dataset"] == chosen
    assert stored.rows(0, 4).tokens.tolist() == [8, 9] * 2

    ran = run(*command, "--out", tmp_path / "none", "--column", "title")
    assert "there are text, body" in ran.refusal()
    assert "nope" in run(*command, "--out", tmp_path / "none", "--split", "nope").refusal()
    assert not (tmp_path / "none").exists()


def test_text_or_a_dataset_and_not_both(run, model, text, dataset, tmp_path):
    command = ["harvest", model, *LAYER, "--out", tmp_path / "acts"]
    both = run(*command[:2], text, *command[2:], "--dataset", dataset)
    assert "either TEXT or --dataset, got both" in both.refusal()
    assert "either TEXT or --dataset, got neither" in run(*command).refusal()
    ran = run(*command[:2], text, *command[2:], "--split", "test")
    assert "--split goes with --dataset" in ran.refusal()
    assert not (tmp_path / "acts").exists()


# Stopped and resumed, several layers, other places.

SIGNALLED = """
import os, signal, sys
import torch
from sae_kernels.cli import main
from sae_kernels.harvest.progress import HarvestProgress
torch.set_num_threads(1)
write, number = HarvestProgress.write, int(sys.argv[1])
def signalled(record, folder):
    write(record, folder)
    if record.stored == 60:
        os.kill(os.getpid(), number)
HarvestProgress.write = signalled
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture
def long_text(tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": "the cat sat on a mat"}) for _ in range(30)))
    return path


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signalled_and_resumed(run, model, long_text, tmp_path, contents, number, code):
    command = ["harvest", model, long_text, *LAYER, "--rows-per-shard", 20]
    assert run(*command, "--out", tmp_path / "straight").code == 0
    out = ["--out", tmp_path / "acts"]
    words = [sys.executable, "-c", SIGNALLED, int(number), *command, *out, "--json"]
    ended = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (code, "")
    assert ended.stderr == (
        "sae-kernels: stopped, 60 tokens stored; go on with: the same command with --resume\n"
    )
    assert "one of 60 rows so far; go on with it, resume=True (--resume)" in (
        run(*command, *out).refusal()
    )
    ran = run(*command, *out, "--resume")
    assert "180 tokens of encoder.layer.0 in" in ran.out
    assert contents(tmp_path / "acts") == contents(tmp_path / "straight")
    ran = run(*command, *out, "--resume")
    assert ran.out.endswith("finished before\n")
    assert "batch_size was 16 and is 3" in (
        run(*command, *out, "--resume", "--batch-size", 3, "--json").refusal()
    )
    assert run(*command, *out, "--overwrite", "--max-tokens", 7, "--json").code == 0


def test_rows_that_are_not_finite(run, model, text, tmp_path):
    folder = tmp_path / "nan"
    shutil.copytree(model, folder)
    broken = transformers.BertModel.from_pretrained(folder)
    broken.embeddings.word_embeddings.weight.data[5] = torch.nan  # "cat"
    broken.save_pretrained(folder)
    command = ["harvest", folder, text, "--layer", "embeddings", "--context-length", 8]
    command += ["--out", tmp_path / "acts", "--json"]
    refused = run(*command).refusal()
    assert "embeddings, document 0: expected activations that are finite" in refused
    assert "--on-nonfinite skip" in refused
    ran = run(*command, "--resume", "--on-nonfinite", "skip")
    assert (ran.records()[0]["n_tokens"], ran.records()[0]["nonfinite_rows"]) == (25, 5)
    assert "expected stop or skip, got 'drop'" in (
        run(*command[:-1], "--overwrite", "--on-nonfinite", "drop", "--json").refusal()
    )


def test_several_layers(run, model, text, tmp_path, contents):
    layers = ["--layer", "encoder.layer.0", "--layer", "encoder.layer.1", "--context-length", 8]
    ran = run("harvest", model, text, *layers, "--out", tmp_path / "acts", "--json")
    assert ran.records()[0]["layer"] == ["encoder.layer.0", "encoder.layer.1"]
    assert run("harvest", model, text, *LAYER, "--out", tmp_path / "one").code == 0
    assert contents(tmp_path / "acts" / "encoder.layer.0") == contents(tmp_path / "one")
    assert ShardDataset(tmp_path / "acts" / "encoder.layer.1").n_tokens == 30


def test_where_the_model_is_and_in_which_dtype(run, model, text, tmp_path):
    command = ["harvest", model, text, *LAYER, "--json"]
    place = ["--device", "cpu", "--model-dtype", "bfloat16"]
    assert run(*command, "--out", tmp_path / "acts", *place).code == 0
    assert ShardDataset(tmp_path / "acts").metadata["model_dtype"] == "bfloat16"
    out = ["--out", tmp_path / "none"]
    assert "expected auto, cpu or cuda:0" in run(*command, *out, "--device", "gpu").refusal()
    assert "model dtype: expected one of" in run(*command, *out, "--model-dtype", "int8").refusal()
    both = run(*command, *out, "--device", "cpu", "--device-map", "auto")
    assert "a device or a device_map, got both" in both.refusal()
    assert not (tmp_path / "none").exists()
