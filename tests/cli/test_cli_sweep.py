"""``sweep``: several runs of one file, on data that are read once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config.toml import read_tables
from sae_kernels.data import ShardWriter
from sae_kernels.nn import SparseAutoencoder
from sae_kernels.runs.folder import RunFolder
from sae_kernels.runs.metrics import read_metrics
from tests.harvest.causal import documents, gpt2, tokenizer

if TYPE_CHECKING:
    from pathlib import Path

NAMES = ["k2", "k4", "gate"]


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiny steps are quickest on one."""


@pytest.fixture
def file(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs of a grid and one with a name, on data given from where the file lies."""
    path = tmp_path / "sweep.toml"
    path.write_text(
        f'[data]\nfolders = ["{data.name}"]\n[sae]\nn_latents = 32\n'
        "[train]\nsteps = 12\nbatch_size = 64\nlog_every = 1\n[output]\ncheckpoint_every = 5\n"
        '[sweep]\n"sae.k" = [2, 4]\n'
        '[[run]]\nname = "gate"\narch = "gated"\ntrain.steps = 8\ntrain.seed = 3\n'
    )
    monkeypatch.chdir(tmp_path)
    return path


def sae_files(run: Path) -> list[bytes]:
    return [(run / "sae" / name).read_bytes() for name in ("config.json", "sae.safetensors")]


def untimed(run: Path) -> list[dict[str, Any]]:
    lines = read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k != "tokens_per_second"} for line in lines]


def test_a_sweep(run: Any, data: Path, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    ran = run("sweep", file, "--out", out, "--json", "--verify")
    assert (ran.code, ran.err) == (0, "")
    records = ran.records()
    results = [record for record in records if record["event"] == "result"]
    assert [record["run"] for record in results] == NAMES
    assert all(record["error"] is None and record["fvu"] > 0 for record in results)
    for name in NAMES:
        lines = [r for r in records if r["event"] == "metrics" and r["run"] == name]
        drop = ("event", "run")
        written = read_metrics(out / name / "metrics.jsonl")
        assert written == [{k: v for k, v in line.items() if k not in drop} for line in lines]
        assert read_tables(out / name / "run.toml")["data"]["folders"] == [str(data)]
        # Each is what its own file makes of it alone.
        alone = tmp_path / "alone" / name
        assert run("train", "--config", out / name / "run.toml", "--out", alone).code == 0
        assert sae_files(alone) == sae_files(out / name)
        assert untimed(alone) == untimed(out / name)
    assert SparseAutoencoder.from_pretrained(out / "gate" / "sae").config.architecture == "gated"
    assert len(read_metrics(out / "gate" / "metrics.jsonl")) == 8


def test_in_words(run: Any, file: Path, tmp_path: Path) -> None:
    ran = run("sweep", file, "--out", tmp_path / "runs")
    assert ran.code == 0
    assert [line.split()[0] for line in ran.out.splitlines()] == ["run", *NAMES]
    assert ran.out.split("\n")[0].split() == ["run", "loss", "fvu", "l0", "dead", "seconds"]
    assert ran.err == "train 3\n"
    ran = run("sweep", file, "--out", tmp_path / "runs", "--resume")
    assert ran.code == 0
    assert f"all runs in {tmp_path / 'runs'} have made their steps" in ran.out


KILLED = """
import os, signal, sys
import torch
from sae_kernels.cli import main
from sae_kernels.runs.folder import RunFolder
torch.set_num_threads(1)
log, number = RunFolder.log, int(sys.argv[1])
def killed(folder, line):
    log(folder, line)
    if folder.path.name == "k4" and line["step"] == 7:
        folder._saver.wait()
        os.kill(os.getpid(), number)
RunFolder.log = killed
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_stopped_in_the_middle_and_resumed(
    run: Any, file: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    out, straight = tmp_path / "runs", tmp_path / "straight"
    assert run("sweep", file, "--out", straight).code == 0
    words = [sys.executable, "-c", KILLED, int(number), "sweep", file, "--out", out]
    ran = subprocess.run(
        [str(word) for word in words],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ran.returncode == code, ran.stderr
    assert "Traceback" not in ran.stderr
    if number != signal.SIGKILL:
        assert ran.stderr.splitlines()[-1] == (
            "sae-kernels: stopped, checkpoint of step 7 saved; go on with: "
            f"sae-kernels sweep {file} --out {out} --resume"
        )
    assert not list(out.glob("*/result.json"))
    # One of them goes on by itself first: the others wait where they stand.
    assert run("resume", out / "k2").code == 0
    ran = run("sweep", file, "--out", out, "--resume", "--json")
    assert ran.code == 0
    results = [r["run"] for r in ran.records() if r["event"] == "result"]
    assert results == ["k4", "gate"]
    for name in NAMES:
        assert sae_files(out / name) == sae_files(straight / name)
        assert untimed(out / name) == untimed(straight / name)


def test_one_that_diverges_is_named_and_the_others_are_there(
    run: Any, file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    with file.open("a") as more:
        more.write('[[run]]\nname = "wild"\nsae.k = 2\ntrain = {lr = 1e30, warmup_steps = 0}\n')
    ran = run("sweep", file, "--out", out, "--json")
    assert ran.code == 2
    assert ran.err.startswith("sae-kernels: wild: step ")
    assert ran.err.count("\n") == 1
    results = [record for record in ran.records() if record["event"] == "result"]
    assert [record["run"] for record in results] == [*NAMES, "wild"]
    assert [record["error"] is None for record in results] == [True, True, True, False]
    assert sorted(path.parent.name for path in out.glob("*/result.json")) == sorted(NAMES)


def test_what_is_there_is_kept(run: Any, file: Path, tmp_path: Path, contents: Any) -> None:
    out = tmp_path / "runs"
    assert run("sweep", file, "--out", out).code == 0
    before = contents(out)
    assert "--overwrite" in run("sweep", file, "--out", out, "--json").refusal()
    file.write_text(file.read_text().replace("seed = 3", "seed = 4"))
    assert run("sweep", file, "--out", out, "--resume", "--json").code == 0  # all are finished
    assert contents(out) == before
    assert run("sweep", file, "--out", out, "--overwrite").code == 0
    assert contents(out)["gate/sae/sae.safetensors"] != before["gate/sae/sae.safetensors"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"sae.k" = [2, 4]', '"sae.k" = []', "sae.k: expected a list of values, got []"),
        ('"sae.k" = [2, 4]', '"sae.k" = [2, 2]', "expected names that differ, got 'k2' twice"),
        ('"sae.k" = [2, 4]', '"sae.kk" = [2]', "[sweep]: [sae]: unknown key 'kk'"),
        ("[output]", "[parallel]\nlatents_over = 2\n[output]", "[parallel]: expected none, only"),
        ('"sae.k" = [2, 4]', '"sae.k" = [2, 99]', "k: expected at most n_latents = 32, got 99"),
        ('"sae.k" = [2, 4]', '"train.batch_size" = [2, 4]', "batch_size: expected the same in all"),
        ('"sae.k" = [2, 4]', '"train.data_seed" = [2, 4]', "data_seed: expected the same in all"),
        ('"sae.k" = [2, 4]', 'arch = ["topkk"]', "did you mean 'topk'?"),
        ('"sae.k" = [2, 4]', 'arch = ["transcoder"]', "--target: expected the activations that"),
        ('"gated"', '"crosscoder"', "expected a folder for each layer of the crosscoder"),
        ('name = "gate"', 'name = "../gate"', "expected names that a folder can have"),
        ('name = "gate"', "", "name: expected a name, got None"),
        ("[train]", "[trian]", "unknown table 'trian'; did you mean 'train'?"),
        ("[train]", "[train", "expected TOML"),
        ('folders = ["data"]', "", "expected a folder of activations, or --model with its text"),
        ('folders = ["data"]', 'folders = ["nowhere"]', "is not a data set"),
    ],
)
def test_a_file_that_does_not_fit(
    run: Any, file: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    assert message in run("sweep", file, "--out", tmp_path / "runs", "--json").refusal()
    assert not list((tmp_path / "runs").glob("*"))


def test_files_that_are_none(run: Any, file: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs"
    missing = run("sweep", tmp_path / "nowhere.toml", "--out", out).refusal()
    assert "nowhere.toml: expected a TOML file, it is not there" in missing
    assert "Missing" in run("sweep", file).refusal()
    assert "Missing" in run("sweep", "--out", out).refusal()
    taken = tmp_path / "taken"
    taken.write_text("mine")
    assert "got a file" in run("sweep", file, "--out", taken, "--overwrite").refusal()


def test_layers_of_a_crosscoder(run: Any, data: Path, file: Path, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "more", 8) as writer:
        writer.write(torch.randn(600, 8))
    file.write_text(
        '[data]\nfolders = ["data", "more"]\n[sae]\nn_latents = 32\n[train]\nsteps = 2\n'
        'batch_size = 64\n[sweep]\narch = ["crosscoder", "crosscoder_relu"]\n'
    )
    assert run("sweep", file, "--out", tmp_path / "runs").code == 0
    for name in ("crosscoder", "crosscoder_relu"):
        sae = SparseAutoencoder.from_pretrained(tmp_path / "runs" / name / "sae")
        assert sae.config.n_layers == 2


def test_an_sae_per_layer_of_stored_activations(
    run: Any, data: Path, file: Path, tmp_path: Path
) -> None:
    with ShardWriter(tmp_path / "more", 8) as writer:
        writer.write(torch.randn(600, 8))
    file.write_text(
        "[sae]\nn_latents = 32\n[train]\nsteps = 8\nbatch_size = 64\n[output]\n"
        'checkpoint_every = 3\n[sweep]\n"data.folders" = [["data"], ["more"]]\n'
        '[[run]]\nname = "map"\narch = "transcoder"\ndata.folders = ["data"]\n'
        'data.target = "more"\n[[run]]\nname = "both"\narch = "crosscoder"\n'
        'data.folders = ["more", "data"]\n'
    )
    out = tmp_path / "runs"
    assert run("sweep", file, "--out", out, "--verify").code == 0
    for name, folders in {
        "folders_data": ["data"],
        "folders_more": ["more"],
        "map": ["data"],
        "both": ["more", "data"],
    }.items():
        used = read_tables(out / name / "run.toml")
        assert used["data"]["folders"] == [str(tmp_path / each) for each in folders]
        alone = tmp_path / "alone" / name
        assert run("train", "--config", out / name / "run.toml", "--out", alone).code == 0
        assert sae_files(alone) == sae_files(out / name)
        assert untimed(alone) == untimed(out / name)


def test_an_sae_per_layer_of_a_model(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
    gpt2().save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    lines = [json.dumps({"text": line}) for line in documents(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(lines))
    (tmp_path / "sweep.toml").write_text(
        '[data]\nmodel = "model"\ntext = "text.jsonl"\ncontext_length = 10\n'
        "[sae]\nn_latents = 32\nk = 3\n[train]\nsteps = 9\nbatch_size = 24\nlog_every = 1\n"
        '[output]\ncheckpoint_every = 4\n[sweep]\n"data.layer" = ["h.0", "h.1"]\n'
    )
    monkeypatch.chdir(tmp_path)
    command = ["sweep", "sweep.toml", "--out"]
    assert run(*command, "straight").code == 0
    with monkeypatch.context() as patch:
        log = RunFolder.log

        def signalled(folder: RunFolder, line: dict[str, Any]) -> None:
            log(folder, line)
            if folder.path.name == "layer_h.1" and line["step"] == 6:
                os.kill(os.getpid(), signal.SIGINT)

        patch.setattr(RunFolder, "log", signalled)
        assert run(*command, "stopped").code == 130
    for layer in ("h.0", "h.1"):
        used = read_tables(tmp_path / "straight" / f"layer_{layer}" / "run.toml")
        assert used["data"]["layer"] == [layer]
        sae = SparseAutoencoder.from_pretrained(tmp_path / "straight" / f"layer_{layer}" / "sae")
        hook = f"blocks.{layer[-1]}.hook_resid_post"
        assert sae.metadata["activations"]["layer"] == layer
        assert sae.metadata["activations"]["hook_name"] == hook
    # One goes on by itself, the sweep with the other.
    assert run("resume", "stopped/layer_h.1").code == 0
    ran = run(*command, "stopped", "--resume", "--json")
    results = [record for record in ran.records() if record["event"] == "result"]
    assert [record["run"] for record in results] == ["layer_h.0"]
    for name in ("layer_h.0", "layer_h.1"):
        assert sae_files(tmp_path / "stopped" / name) == sae_files(tmp_path / "straight" / name)
        assert untimed(tmp_path / "stopped" / name) == untimed(tmp_path / "straight" / name)


def test_names_for_other_tools(run: Any, file: Path, tmp_path: Path) -> None:
    text = file.read_text().replace("[output]\n", '[output]\nhook_name = "blocks.1.hook_mlp_out"\n')
    file.write_text(text)
    assert run("sweep", file, "--out", tmp_path / "runs").code == 0
    for name in NAMES:
        sae = SparseAutoencoder.from_pretrained(tmp_path / "runs" / name / "sae")
        assert sae.metadata["activations"] == {"hook_name": "blocks.1.hook_mlp_out"}
    seen = run("inspect", tmp_path / "runs", "--json").records()[0]
    assert [each["path"] for each in seen["contents"]] == [f"{name}/sae" for name in sorted(NAMES)]
