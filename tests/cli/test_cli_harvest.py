"""``harvest``, with a tiny model made here."""

from __future__ import annotations

import json

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
