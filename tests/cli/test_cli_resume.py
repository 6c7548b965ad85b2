"""``resume`` and ``--resume``: an interrupted run goes on to the bytes it would have had."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

import pytest
import torch

from sae_kernels.config.toml import read_tables
from sae_kernels.data import ShardDataset, ShardWriter
from sae_kernels.nn import TopKConfig
from sae_kernels.runs import checkpoint
from sae_kernels.runs.folder import RunFolder
from sae_kernels.runs.metrics import read_metrics
from sae_kernels.training import RunConfig, train
from tests.harvest.causal import documents, gpt2, tokenizer

if TYPE_CHECKING:
    from pathlib import Path

QUICK: list[Any] = ["--steps", 12, "--batch-size", 64, "--n-latents", 32, "--k", 4]
QUICK += ["--log-every", 1, "--checkpoint-every", 5]
SAE_FILES = ("sae/config.json", "sae/sae.safetensors")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Tiny steps are quickest on one."""


def signal_at(step: int, number: signal.Signals, patch: pytest.MonkeyPatch) -> None:
    """Has this process get the signal when so many steps are made."""
    due = RunFolder.due

    def due_and_signal(folder: RunFolder, made: int) -> bool:
        if made == step:
            os.kill(os.getpid(), number)
        return due(folder, made)

    patch.setattr(RunFolder, "due", due_and_signal)


def assert_same_sae(one: Path, other: Path) -> None:
    for file in SAE_FILES:
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def assert_same_run(one: Path, other: Path) -> None:
    assert_same_sae(one, other)
    lines = [read_metrics(run / "metrics.jsonl") for run in (one, other)]
    for line in (*lines[0], *lines[1]):
        del line["tokens_per_second"]
    assert lines[0] == lines[1]


@pytest.mark.parametrize(
    ("number", "code", "command"),
    [(signal.SIGINT, 130, "resume"), (signal.SIGTERM, 143, "train")],
)
def test_interrupted_and_resumed_is_the_same_run(
    run: Any, data: Path, tmp_path: Path, number: signal.Signals, code: int, command: str
) -> None:
    out = tmp_path / "run it"
    train_it = ["train", data, *QUICK]
    assert run(*train_it, "--out", tmp_path / "straight").code == 0
    with pytest.MonkeyPatch.context() as patch:
        signal_at(7, number, patch)
        ran = run(*train_it, "--out", out, "--json")
    assert ran.code == code
    assert ran.err == (
        "sae-kernels: stopped, checkpoint of step 7 saved; go on with: "
        f"sae-kernels resume '{out}'\n"
    )
    assert [record["step"] for record in ran.records()] == list(range(1, 8))
    assert checkpoint.steps(out / "checkpoints") == [5, 7]
    assert not (out / "result.json").exists()
    again = ["resume", out] if command == "resume" else [*train_it, "--out", out, "--resume"]
    ran = run(*again, "--json")
    assert ran.code == 0
    assert [record["step"] for record in ran.records()[:-1]] == list(range(8, 13))
    assert_same_run(tmp_path / "straight", out)


@pytest.mark.full
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_process_that_is_signalled_can_be_resumed(
    run: Any, data: Path, tmp_path: Path, number: signal.Signals, code: int
) -> None:
    """The same from outside, where the moment is not ours to choose."""
    out = tmp_path / "run"
    flags = [*QUICK, "--steps", 10**8, "--lr", 1e-3, "--warmup-steps", 0, "--checkpoint-every", 0]
    command = [sys.executable, "-m", "sae_kernels", "train", data, "--out", out, *flags]
    process = subprocess.Popen(
        [str(word) for word in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics = out / "metrics.jsonl"
    until = time.monotonic() + 120
    while not (metrics.exists() and metrics.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code, stderr
    assert stdout == ""
    (step,) = checkpoint.steps(out / "checkpoints")
    assert stderr.splitlines()[-1] == (
        f"sae-kernels: stopped, checkpoint of step {step} saved; "
        f"go on with: sae-kernels resume {out}"
    )
    assert "Traceback" not in stderr
    # The checkpoint is that of the step reached: its weights are those of so many steps made here.
    sae = TopKConfig(8, 32, 4)
    config = RunConfig.read(out / "run.toml").train
    made = 0

    class Enough(Exception):
        pass

    def on_step(i: int, line: object) -> None:
        nonlocal made
        made = i + 1
        if made == step:
            raise Enough

    with pytest.raises(Enough):
        train(sae, ShardDataset(data), config, folder=tmp_path / "here", on_step=on_step)
    assert made == step
    assert_same_sae(tmp_path / "here", out)


def test_killed_with_9_loses_the_steps_since_the_last_checkpoint(
    run: Any, data: Path, tmp_path: Path
) -> None:
    assert run("train", data, *QUICK, "--out", tmp_path / "straight").code == 0
    out = tmp_path / "run"
    code = (
        "import os, sys\n"
        "from sae_kernels.cli import main\n"
        "from sae_kernels.runs.folder import RunFolder\n"
        "import torch; torch.set_num_threads(1)\n"
        "log = RunFolder.log\n"
        "def kill(folder, line):\n"
        "    log(folder, line)\n"
        "    if line['step'] == 8:\n"
        "        folder._saver.wait()\n"
        "        os.kill(os.getpid(), 9)\n"
        "RunFolder.log = kill\n"
        "main(sys.argv[1:])\n"
    )
    words = [sys.executable, "-c", code, "train", data, *QUICK, "--out", out]
    killed = subprocess.run([str(word) for word in words], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert checkpoint.steps(out / "checkpoints") == [5]
    assert len(read_metrics(out / "metrics.jsonl")) == 8
    ran = run("resume", out, "--json")
    assert [record["step"] for record in ran.records()[:-1]] == list(range(6, 13))
    assert_same_run(tmp_path / "straight", out)


@pytest.fixture
def stopped(run: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that has made 7 of its 12 steps."""
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(7, signal.SIGINT, patch)
        assert run("train", data, *QUICK, "--out", out).code == 130
    return out


def test_a_damaged_checkpoint_is_passed_over(run: Any, data: Path, stopped: Path) -> None:
    newest = stopped / "checkpoints" / "step_00000007" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    with pytest.warns(RuntimeWarning, match="step_00000005 before it is used"):
        ran = run("resume", stopped)
    assert ran.code == 0
    straight = stopped.parent / "straight"
    run("train", data, *QUICK, "--out", straight)
    assert_same_run(straight, stopped)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", 0.5], "train.lr was None, is 0.5"),
        (["--k", 5], "sae.k was 4, is 5"),
        (["--steps", 13], "train.steps was 12, is 13"),
        (["--arch", "batchtopk"], "architecture was 'topk', is 'batchtopk'"),
    ],
)
def test_a_setting_that_changes_what_is_learnt_is_refused(
    run: Any, data: Path, stopped: Path, contents: Any, flags: list[Any], message: str
) -> None:
    before = contents(stopped)
    ran = run("train", data, *QUICK, *flags, "--out", stopped, "--resume", "--json")
    assert message in ran.refusal()
    assert contents(stopped) == before


def test_what_does_not_change_it_may_be_new(run: Any, data: Path, stopped: Path) -> None:
    flags = [*QUICK, "--log-every", 2, "--checkpoint-every", 3, "--keep-checkpoints", 1]
    moved = data.rename(data.parent / "elsewhere")
    ran = run("train", moved, *flags, "--out", stopped, "--resume", "--json")
    assert ran.code == 0
    assert [record["step"] for record in ran.records()[:-1]] == [8, 10, 12]
    assert checkpoint.steps(stopped / "checkpoints") == [12]
    moved.rename(data)
    run("train", data, *QUICK, "--out", stopped.parent / "straight")
    assert_same_sae(stopped.parent / "straight", stopped)


def test_other_data_are_refused(run: Any, data: Path, stopped: Path) -> None:
    with ShardWriter(data, 8, overwrite=True) as writer:
        writer.write(torch.randn(601, 8))
    assert "n_tokens was 600 is 601" in run("resume", stopped, "--json").refusal()
    shutil.rmtree(data)
    assert "is not a data set" in run("resume", stopped).refusal()


def test_what_cannot_go_on_is_refused(run: Any, data: Path, tmp_path: Path, contents: Any) -> None:
    out = tmp_path / "run"
    assert "expected the folder of a run, it has no run.toml" in run("resume", out).refusal()
    assert not out.exists()
    assert "expected the folder of a run" in run("resume", data).refusal()
    assert run("train", data, *QUICK, "--out", out).code == 0
    before = contents(out)
    for command in (["resume", out], ["train", data, *QUICK, "--out", out, "--resume"]):
        assert "it has made all its steps" in run(*command, "--json").refusal()
    assert contents(out) == before
    for text, message in (
        ("[train\n", "expected TOML"),
        ("[train]\nstpes = 3\n", "did you mean 'steps'"),
        ("[sae]\nd_in = 8\n", "it was given them in Python"),
        ("[end_to_end]\nlayer = 'h.1'\n", "give its own command again, with --resume"),
        ("data = 3\n", "expected a table [data], got 3"),
    ):
        (out / "run.toml").write_text(text)
        assert message in run("resume", out).refusal(), text


def test_resume_in_a_new_folder_begins_a_run(run: Any, data: Path, tmp_path: Path) -> None:
    """So that a job that is started over and over needs one command."""
    for folder in ("straight", "new"):
        flags = ["--resume"] if folder == "new" else []
        assert run("train", data, *QUICK, "--out", tmp_path / folder, *flags).code == 0
    assert_same_run(tmp_path / "straight", tmp_path / "new")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="needs sae-kernels[harvest]")
    folder = tmp_path_factory.mktemp("model")
    gpt2().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"text": line}) for line in documents(60)))
    return path


def test_end_to_end_interrupted_and_resumed(
    run: Any, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--n-latents", 32, "--k", 3, "--steps", 9, "--context-length", 10, "--log-every", 1]
    flags += ["--sequences-per-batch", 8, "--checkpoint-every", 4, "--compute", "float32"]
    command = ["train-e2e", model, text, "--layer", "h.1", *flags, "--out"]
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert run(*command, straight).code == 0
    with monkeypatch.context() as patch:
        signal_at(6, signal.SIGTERM, patch)
        ran = run(*command, out, "--json")
    assert ran.code == 143
    message = "stopped, checkpoint of step 6 saved; go on with: the same command with --resume"
    assert message in ran.err
    assert "give its own command again, with --resume" in run("resume", out).refusal()
    other = run(*command, out, "--resume", "--kl-coefficient", 2, "--json")
    assert "end_to_end.kl_coefficient was 1.0, is 2.0" in other.refusal()
    monkeypatch.chdir(text.parent)  # the same text by another name
    command[2] = text.name
    assert run(*command, out, "--resume").code == 0
    assert_same_run(straight, out)


STREAM = ["--steps", 9, "--batch-size", 24, "--n-latents", 32, "--context-length", 10]
STREAM += ["--log-every", 1, "--checkpoint-every", 4]


@pytest.mark.sampled(1)
@pytest.mark.parametrize(
    ("arch", "layers"),
    [
        ("topk", ["--layer", "h.1"]),
        ("transcoder", ["--layer", "h.0", "--target-layer", "h.1"]),
    ],
)
def test_a_stream_from_a_model(
    run: Any, model: Path, text: Path, tmp_path: Path, arch: str, layers: list[str]
) -> None:
    command = ["train", "--arch", arch, "--model", model, *layers, "--text", text, "--k", 3]
    command += [*STREAM, "--out"]
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert run(*command, straight).code == 0
    used = read_tables(straight / "run.toml")
    assert used["data"] == {
        "drop_special_tokens": True,
        "drop_first": 0,
        "max_norm_multiple": 10.0,
        "model": str(model),
        "layer": layers[1:2],
        **({"target_layer": ["h.1"]} if arch == "transcoder" else {}),
        "text": [str(text)],
        "dataset_split": "train",
        "dataset_column": "text",
        "context_length": 10,
        "model_batch_size": 16,
    }
    with pytest.MonkeyPatch.context() as patch:
        signal_at(6, signal.SIGINT, patch)
        assert run(*command, out).code == 130
    ran = run("resume", out, "--json")
    assert [record["step"] for record in ran.records()[:-1]] == [7, 8, 9]
    assert_same_run(straight, out)
    if arch != "topk":
        return
    again = ["train", "--config", straight / "run.toml", "--out", tmp_path / "again"]
    assert run(*again).code == 0
    assert_same_run(straight, tmp_path / "again")


def test_the_dtype_of_the_model_is_one_of_the_run(
    run: Any, model: Path, text: Path, tmp_path: Path
) -> None:
    command = ["train", "--model", model, "--layer", "h.1", "--text", text, "--k", 3, *STREAM]
    straight, out = tmp_path / "straight", tmp_path / "run"
    assert run(*command, "--out", tmp_path / "float32").code == 0
    command += ["--model-dtype", "bfloat16", "--device", "cpu"]
    assert run(*command, "--out", straight).code == 0
    assert read_tables(straight / "run.toml")["data"]["model_dtype"] == "bfloat16"
    with pytest.MonkeyPatch.context() as patch:
        signal_at(6, signal.SIGINT, patch)
        assert run(*command, "--out", out).code == 130
    assert run("resume", out).code == 0
    assert_same_run(straight, out)
    files = [tmp_path / name / "sae" / "sae.safetensors" for name in ("float32", "straight")]
    assert files[0].read_bytes() != files[1].read_bytes()


@pytest.mark.full
def test_a_stream_from_a_dataset(
    run: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="needs sae-kernels[datasets]")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    for part, n in (("train", 60), ("test", 3)):
        lines = [json.dumps({"body": line}) for line in documents(n)]
        (folder / f"{part}.jsonl").write_text("\n".join(lines))
    flags = ["--dataset", folder, "--dataset-column", "body", "--dataset-subset", "default"]
    command = ["train", "--model", model, "--layer", "h.1", *flags, "--k", 3, *STREAM, "--out"]
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        signal_at(6, signal.SIGINT, patch)
        assert run(*command, out).code == 130
    used = read_tables(out / "run.toml")["data"]
    assert used["dataset"] == str(folder)
    assert (used["dataset_subset"], used["dataset_column"]) == ("default", "body")
    assert run("resume", out).code == 0
    text = tmp_path / "text.jsonl"  # the same text as a file is the same run
    text.write_text("\n".join(json.dumps({"text": line}) for line in documents(60)))
    command = ["train", "--model", model, "--layer", "h.1", "--text", text, "--k", 3, *STREAM]
    assert run(*command, "--out", tmp_path / "straight").code == 0
    assert_same_run(tmp_path / "straight", out)
    wrong = [*command[:5], "--dataset", folder, "--k", 3, "--out", tmp_path / "other"]
    for flags, message in (
        (["--dataset-subset", "en"], "BuilderConfig 'en' not found"),
        (["--dataset-split", "nope"], "nope"),
        ([], "expected a column 'text' with text, there are body"),
    ):
        assert message in run(*wrong, *flags).refusal()
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--layer", "h.1", "--text", "a"], "layer: expected a model with it"),
        (["--model-dtype", "float16"], "model_dtype: expected a model with it"),
        (["--model", "m", "--text", "a"], "layer: expected the dotted path"),
        (["--model", "m", "--layer", "h.1"], "text or a dataset for the model, got neither"),
        (["--model", "m", "--layer", "h.1", "--text", "nowhere.txt"], "does not exist"),
        ([], "expected a folder of activations, or --model with its text"),
    ],
)
def test_a_stream_that_is_not_all_there(
    run: Any, tmp_path: Path, flags: list[str], message: str
) -> None:
    assert message in run("train", "--out", tmp_path / "run", "--k", 3, *flags).refusal()
    assert not (tmp_path / "run").exists()
