"""Rows that are left out: flags of harvest, train, train-e2e and eval; what inspect shows."""

from __future__ import annotations

import pytest
import torch

from sae_kernels.config.row_filter import RowFilter
from sae_kernels.config.toml import read_tables
from sae_kernels.data import ShardDataset, ShardWriter
from sae_kernels.nn import SparseAutoencoder
from tests.harvest.causal import D, documents, sinking, tokenizer

transformers = pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")

LAYER = "h.1"
WORDS = " ".join(documents(40)).split()
TRAIN = ["--n-latents", 32, "--k", 3, "--steps", 3, "--log-every", 1]


@pytest.fixture(autouse=True)
def _one_thread(one_thread):
    """Tiny steps are quickest on one."""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    sinking().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def store(run, model, text, tmp_path):
    def store(name, *flags):
        out = ["--layer", LAYER, "--context-length", 10, "--out", tmp_path / name]
        ran = run("harvest", model, text, *out, *flags)
        assert ran.code == 0, ran.err
        return ran, ShardDataset(tmp_path / name)

    return store


def test_harvest_leaves_out_what_its_flags_say(store):
    sinks = WORDS.count("mat")
    ran, data = store("default")
    assert data.n_tokens == len(WORDS) - sinks
    assert f"{sinks} more ({100 * sinks / len(WORDS):.2f} %) left out" in ran.out
    assert f"above {data.metadata['max_norm']:.4g}, 10.0 times the median" in ran.out
    assert data.facts == {
        **RowFilter().to_dict(),
        "drop_tokens": [],
        "max_norm": [data.metadata["max_norm"]],
    }

    ran, data = store("all", "--max-norm-multiple", "none", "--no-drop-special-tokens", "--json")
    (record,) = ran.records()
    assert (record["n_tokens"], record["rows_above_max_norm"]) == (len(WORDS), 0)
    assert record["max_norm"] is None
    assert data.facts["drop_special_tokens"] is False

    _, data = store("some", "--drop-first", 1, "--drop-tokens", "4,5", "--max-norm-multiple", 1e4)
    tokens = data.rows(0, data.n_tokens).tokens.tolist()
    ids = tokenizer()(documents(40), add_special_tokens=False)["input_ids"]
    chunks = [line[i : i + 10] for line in ids for i in range(0, len(line), 10)]
    assert tokens == [token for chunk in chunks for token in chunk[1:] if token not in (4, 5)]
    assert data.metadata["drop_tokens"] == [4, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-norm-multiple", 0], "max_norm_multiple: expected a positive number, got 0"),
        (["--max-norm-multiple", "ten"], "expected a number or none, got 'ten'"),
        (["--drop-first", -1], "drop_first: expected an integer of at least 0, got -1"),
        (["--drop-tokens", "4;5"], "drop_tokens: expected a list of integers"),
    ],
)
def test_flags_out_of_range(run, model, text, tmp_path, flags, message):
    ran = run("harvest", model, text, "--layer", LAYER, "--out", tmp_path / "acts", *flags)
    assert ran.code == 2
    assert message in " ".join(ran.err.split())
    assert not (tmp_path / "acts").exists()


def test_training_on_a_model_takes_the_same_flags(run, model, text, tmp_path):
    def train(name, *flags):
        live = ["--model", model, "--layer", LAYER, "--text", text, "--context-length", 10]
        ran = run("train", *live, *TRAIN, "--batch-size", 64, "--out", tmp_path / name, *flags)
        assert ran.code == 0, ran.err
        sae = SparseAutoencoder.from_pretrained(tmp_path / name / "sae")
        return ran, read_tables(tmp_path / name / "run.toml")["data"], sae.metadata["activations"]

    ran, table, facts = train("default")
    assert table["max_norm_multiple"] == 10.0
    (bound,) = facts["max_norm"]
    assert bound > 0
    assert "rows left out, their norm above the bound" in ran.out
    flags = ["--max-norm-multiple", "none", "--drop-first", 1, "--drop-tokens", "4,7"]
    _, table, facts = train("all", *flags, "--no-drop-special-tokens")
    assert (table["max_norm_multiple"], table["drop_first"]) == ("none", 1)
    kept = RowFilter(False, 1, (4, 7), max_norm_multiple=None).to_dict()
    assert facts.items() >= {**kept, "drop_tokens": [4, 7], "max_norm": None}.items()
    # What the file says is what a run made from it does.
    config = tmp_path / "config.toml"
    config.write_text('[data]\nmax_norm_multiple = "none"\ndrop_tokens = [4, 7]\n')
    _, table, facts = train("file", "--config", config)
    assert (facts["max_norm_multiple"], facts["drop_tokens"]) == (None, [4, 7])


def test_stored_activations_are_filtered_already(run, store, tmp_path):
    _, data = store("acts", "--drop-first", 1)
    command = ["train", data.folder, *TRAIN, "--batch-size", 64, "--out", tmp_path / "run"]
    message = run(*command, "--drop-first", 2).refusal()
    assert "drop_first: expected a model with it, got none: stored activations were" in message
    assert run(*command).code == 0
    sae = SparseAutoencoder.from_pretrained(tmp_path / "run" / "sae")
    assert sae.metadata["activations"].items() >= data.facts.items()


def test_end_to_end_and_eval_replace_what_the_sae_is_for(run, model, text, tmp_path):
    command = ["train-e2e", model, text, "--layer", LAYER, "--context-length", 10, *TRAIN]
    command += ["--sequences-per-batch", 8, "--drop-first", 1, "--out", tmp_path / "run"]
    assert run(*command).code == 0
    sae = SparseAutoencoder.from_pretrained(tmp_path / "run" / "sae")
    facts = sae.metadata["activations"]
    assert (facts["drop_first"], facts["max_norm_multiple"]) == (1, 10.0)
    (bound,) = facts["max_norm"]
    used = read_tables(tmp_path / "run" / "run.toml")["end_to_end"]
    assert (used["drop_first"], used["max_norm_multiple"]) == (1, 10.0)
    where = ["--model", model, "--layer", LAYER, "--text", text, "--context-length", 10]
    (record,) = run("eval", tmp_path / "run" / "sae", *where, "--json").records()
    wanted = RowFilter(drop_first=1).to_dict()
    assert record["not_replaced"] == {**wanted, "drop_tokens": [], "max_norm": bound}
    resumed = run(*command, "--resume", "--drop-first", 2)
    assert resumed.code == 2
    assert "end_to_end.drop_first was 1, is 2" in resumed.err


def test_inspect_shows_norms_and_filter(run, store, tmp_path):
    _, data = store("acts", "--max-norm-multiple", "none")
    (seen,) = run("inspect", data.folder, "--json").records()
    norms = seen["norms"]
    x = data.rows(0, data.n_tokens).activations
    assert (norms["rows"], norms["zero"], norms["nonfinite"]) == (len(x), 0, 0)
    assert norms["max"] == pytest.approx(float(x.norm(dim=1).max()))
    assert norms["median"] == pytest.approx(float(x.norm(dim=1).quantile(0.5)))
    assert sum(part["rows"] for part in norms["histogram"]) == len(x)
    assert norms["rows_of_half_the_variance"] < WORDS.count("mat")
    assert seen["metadata"]["max_norm_multiple"] is None
    shown = run("inspect", data.folder).out
    lines = dict(line.split("  ", 1) for line in shown.splitlines() if "  " in line)
    assert float(lines["norms.median"]) == pytest.approx(norms["median"])
    assert lines["metadata.drop_special_tokens"].strip() == "True"
    assert shown.count("#" * 40) == 1
    assert "histogram" not in shown


def test_inspect_looks_into_every_shard(run, tmp_path):
    with ShardWriter(tmp_path, D, rows_per_shard=5000) as writer:
        for norm in (1.0, 10.0, 100.0):
            for _ in range(4):
                writer.write(torch.full((5000, D), norm / D**0.5))
    (seen,) = run("inspect", tmp_path, "--json").records()
    counts = [part["rows"] for part in seen["norms"]["histogram"]]
    assert sum(counts) == 16384
    assert [n for n in counts if n] == pytest.approx([16384 / 3] * 3, abs=17)
