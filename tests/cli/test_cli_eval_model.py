"""``eval`` and ``report`` in a language model, a tiny one made here."""

from __future__ import annotations

import base64
import json
import zlib

import pytest
import torch

from sae_kernels.config.row_filter import KEEP_ALL
from sae_kernels.data import ShardDataset
from sae_kernels.harvest import language_model_loss, load_causal_model, token_batches
from sae_kernels.harvest.splice import replaced_rows
from sae_kernels.nn import BatchTopKConfig, BatchTopKSAE, TopKConfig, TopKSAE
from sae_kernels.training import evaluate

transformers = pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

D_IN, LAYER = 8, "h.0"  # as wide as the data fixture
WORDS = ["the", "cat", "sat", "on", "a", "mat"]
OPTIONS = ["--context-length", 8, "--model-batch-size", 2]


def _save(folder, **changes):
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]"}
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=len(vocabulary),
        n_embd=D_IN,
        n_layer=2,
        n_head=2,
        n_positions=20,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    model = transformers.GPT2LMHeadModel(config)
    if changes.get("blind"):
        torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return _save(tmp_path_factory.mktemp("model"))


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    lines = ["the cat sat on a mat " * 5, "a mat sat on the cat the mat", "cat"]
    path.write_text("\n".join(json.dumps({"text": line}) for line in lines))
    return path


@pytest.fixture
def flags(model, text):
    return ["--model", model, "--layer", LAYER, "--text", text, *OPTIONS]


def _expected(model, text, sae, drop_first=0, **options):
    loaded, tokenizer = load_causal_model(model)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    batches = [
        batch.keeping_first(drop_first)
        for batch in token_batches(loaded, tokenizer, documents, batch_size=2, context_length=8)
    ]
    return language_model_loss(loaded, batches, LAYER, sae, **options).scalars()


def test_in_a_model_alone(run, model, text, saved, flags):
    ran = run("eval", saved, *flags, "--json")
    assert (ran.code, ran.err) == (0, "")
    (record,) = ran.records()
    want = _expected(model, text, TopKSAE.from_pretrained(saved))
    # 30 words in chunks of 8, 8 words in one; each chunk's first word is not predicted.
    assert want["n_predictions"] == 30 - 4 + 8 - 1
    # An SAE of unknown data replaces every activation.
    kept = {**KEEP_ALL.to_dict(), "drop_tokens": [], "max_norm": None}
    told = {"model": str(model), "layer": LAYER, "not_replaced": kept}
    told |= {"model_dtype": "float32", "device": "cpu"}
    assert record == {**want, **told}
    assert record["loss_recovered"] != 1
    want = _expected(model, text, TopKSAE.from_pretrained(saved), drop_first=1)
    told["not_replaced"] = {**kept, "drop_first": 1}
    assert run("eval", saved, *flags, "--drop-first", 1, "--json").records()[0] == {**want, **told}
    (record,) = run("eval", saved, *flags, "--max-tokens", 12, "--json").records()
    assert record["n_predictions"] == 12 - 2


def test_what_the_sae_was_not_trained_on_stays(run, model, text, saved, flags, tmp_path):
    """The recorded filter rules, flags say otherwise."""
    loaded, tokenizer = load_causal_model(model)
    documents = [json.loads(line)["text"] for line in text.read_text().splitlines()]
    batches = list(token_batches(loaded, tokenizer, documents, batch_size=2, context_length=8))
    norms = torch.cat(list(replaced_rows(loaded, batches, LAYER))).norm(dim=1)
    bound = float(norms.quantile(0.8))
    sae = TopKSAE.from_pretrained(saved)
    sae.metadata["activations"] = {"drop_first": 1, "max_norm_multiple": 5.0, "max_norm": [bound]}
    sae.save_pretrained(tmp_path / "sae")

    def record(*arguments):
        (found,) = run("eval", tmp_path / "sae", *flags, *arguments, "--json").records()
        return found

    def same(found, **options):
        want = _expected(model, text, sae, **options)
        assert {name: found[name] for name in want} == want

    found = record()
    same(found, drop_first=1, max_norm=bound)
    assert found["not_replaced"] == {
        "drop_special_tokens": False,
        "drop_first": 1,
        "drop_tokens": [],
        "max_norm_multiple": 5.0,
        "max_norm": bound,
    }
    assert found["spliced_loss"] != _expected(model, text, sae, drop_first=1)["spliced_loss"]
    same(record("--drop-first", 0), max_norm=bound)
    same(record("--max-norm-multiple", "none"), drop_first=1)
    multiple = 1.1
    counted = torch.cat(
        list(replaced_rows(loaded, [batch.keeping_first() for batch in batches], LAYER))
    ).norm(dim=1)
    own = multiple * float(counted.median())
    same(record("--max-norm-multiple", multiple), drop_first=1, max_norm=own)
    text_shown = run("eval", tmp_path / "sae", *flags).out
    assert "the first token of each sequence" in text_shown
    assert f"norms above {bound:.4g}" in text_shown


def test_on_data_and_in_a_model(run, data, model, text, saved, flags):
    (record,) = run("eval", saved, data, *flags, "--json").records()
    sae = TopKSAE.from_pretrained(saved)
    measured = evaluate(sae, ShardDataset(data)).scalars()
    assert record.items() >= {**measured, **_expected(model, text, sae)}.items()
    assert record["bits_per_token"] > 0
    ran = run("eval", saved, data, *flags)
    assert ran.code == 0
    lines = dict(line.split("  ", 1) for line in ran.out.splitlines())
    assert f"{record['loss_recovered']:.5f}" in lines["loss recovered (zero)"]
    assert f"{record['kl']:.5f} nats per token" in lines["KL(clean || spliced)"]
    assert "codes + " in lines["bits per token"]
    assert f"{record['fvu']:.5f}" in lines["FVU"]


def test_where_the_model_is_and_in_which_dtype(run, model, saved, flags):
    (plain,) = run("eval", saved, *flags, "--json").records()
    place = ["--device", "cpu", "--model-dtype", "bfloat16"]
    (record,) = run("eval", saved, *flags, *place, "--json").records()
    assert record["model_dtype"] == "bfloat16"
    assert record["clean_loss"] != plain["clean_loss"]
    assert record["clean_loss"] == pytest.approx(plain["clean_loss"], rel=0.05)
    refused = run("eval", saved, *flags, "--json", "--device", "gpu").refusal()
    assert "expected auto, cpu or cuda:0" in refused


def test_an_sae_of_another_architecture(run, flags, data, tmp_path):
    BatchTopKSAE(BatchTopKConfig(D_IN, 32, k=3)).save_pretrained(tmp_path / "sae")
    (record,) = run("eval", tmp_path / "sae", data, *flags, "--json").records()
    assert record["spliced_loss"] > 0
    assert record["fvu"] > 0


def test_a_model_that_does_not_look_at_the_layer(run, saved, text, tmp_path):
    blind = _save(tmp_path / "blind", blind=True)
    flags = ["--model", blind, "--layer", LAYER, "--text", text, *OPTIONS]
    (record,) = run("eval", saved, *flags, "--json").records()
    assert record["zero_loss"] == record["clean_loss"] == pytest.approx(torch.tensor(8.0).log())
    assert record["loss_recovered"] is None
    assert "undefined: without the layer's output" in run("eval", saved, *flags).out


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            [],
            "expected DATA, or --model with --layer and --text, got neither; see sae-kernels eval",
        ),
        (["--model", "m"], "--model: expected --layer and --text too"),
        (["--layer", "h.0"], "--layer: expected --model and --text too"),
        (["--text", "t"], "--text: expected --model and --layer too"),
        (["--model", "m", "--layer", "h.0"], "--model and --layer: expected --text too"),
        (["--model", "m", "--text", "t", "data"], "--model and --text: expected --layer too"),
        (["--verify", "--model", "m", "--text", "t", "--layer", "l"], "--verify: expected DATA"),
    ],
)
def test_what_does_not_go_together(run, saved, arguments, expected):
    assert expected in run("eval", saved, *arguments).refusal()


def test_what_does_not_fit(run, model, text, saved, flags, tmp_path):
    def refusal(*arguments):
        return run("eval", *arguments, "--json").refusal()

    assert "nearest: h." in refusal(saved, *flags, "--layer", "h.5")
    assert "does not exist" in refusal(saved, *flags, "--text", tmp_path / "novel.txt")
    assert "nothing is there" in refusal(saved, *flags, "--model", tmp_path / "none")
    assert "from 1 to 20" in refusal(saved, *flags, "--context-length", 21)
    assert "max_tokens of at least 1" in refusal(saved, *flags, "--max-tokens", 0)
    TopKSAE(TopKConfig(D_IN + 1, 32, 4)).save_pretrained(tmp_path / "wide")
    assert "h.0: expected a layer as wide as what the SAE reads, 9, got 8" in refusal(
        tmp_path / "wide", *flags
    )
    bert = transformers.BertConfig(
        vocab_size=8,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
    )
    headless = tmp_path / "headless"
    transformers.BertModel(bert).save_pretrained(headless)
    transformers.AutoTokenizer.from_pretrained(model).save_pretrained(headless)
    message = refusal(saved, *flags, "--model", headless)
    assert "expected a model with a language-model head" in message


def test_the_report_names_the_tokens_that_latents_promote(run, model, text, tmp_path):
    pytest.importorskip("matplotlib", reason="needs sae-kernels[report]")
    acts, folder = tmp_path / "acts", tmp_path / "run"
    harvested = run("harvest", model, text, "--layer", LAYER, "--out", acts, *OPTIONS[:2])
    assert harvested.code == 0
    options = ["--n-latents", 32, "--k", 4, "--steps", 4, "--batch-size", 16]
    assert run("train", acts, "--out", folder, *options).code == 0
    (record,) = run("report", folder, "--model", model, "--json").records()
    page = (folder / "latents.html").read_text()
    assert record["latents"] == str(folder / "latents.html")
    assert "latents.html" in (folder / "report.html").read_text()
    data = page.partition('id="data">')[2].partition("<")[0]
    header = json.loads(zlib.decompress(base64.b64decode(data)).partition(b"\n")[0])
    assert header["scales"].keys() == {"promoted", "suppressed"}
    assert {word.strip() for word in header["words"]} <= {"[PAD]", "[UNK]", *WORDS}
    shapes = {array["name"]: array["shape"] for array in header["arrays"]}
    assert shapes["promoted"] == [32, 5]
