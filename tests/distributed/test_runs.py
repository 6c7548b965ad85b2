"""A run of several ranks: its files, its end, and how it goes on with other numbers of ranks."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.device_mesh import DeviceMesh

from sae_kernels.data import ShardWriter
from sae_kernels.distributed.checkpoint import load_sae
from sae_kernels.distributed.latents import LatentRanks
from sae_kernels.distributed.team import Team
from sae_kernels.nn import BatchTopKSAE, SparseAutoencoder
from sae_kernels.runs import checkpoint
from sae_kernels.runs.metrics import read_metrics
from tests.distributed import runs
from tests.distributed.problems import joined
from tests.distributed.world import TIMEOUT, on_ranks, torchrun


def saved(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "sae" / "sae.safetensors")


def without_time(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{n: v for n, v in line.items() if n != "tokens_per_second"} for line in lines]


@pytest.mark.parametrize("kind", ["topk", pytest.param("batchtopk", marks=pytest.mark.full)])
def test_a_run_leaves_what_one_process_leaves(tmp_path: Path, kind: str) -> None:
    one, many = tmp_path / "one", tmp_path / "many"
    alone = runs.run(None, str(one), kind=kind, n_latents=99)
    parts = on_ranks_run(3, many, kind=kind, n_latents=99)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in many.iterdir())
    for line, expected in zip(without_time(many), alone["lines"], strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)
    whole, expected = saved(many), saved(one)
    assert whole.keys() == expected.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-5)
    # The file holds exactly what the ranks have, in the scale of raw activations.
    folded = SparseAutoencoder.from_pretrained(many / "sae")
    assert torch.equal(
        folded.W_enc, joined([p["weights"] for p in parts], alone["weights"])["W_enc"]
    )


def on_ranks_run(size: int, folder: Path, **options: Any) -> list[dict[str, Any]]:
    return on_ranks(size, run_with, str(folder), options)


def run_with(group: Any, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    return runs.run(group, folder, **options)


LATENTS, TOKENS, BOTH = {"tokens_over": 1}, {"latents_over": 1}, {"latents": 2, "tokens": 2}
RESUMED = [
    (4, LATENTS, 2, TOKENS),
    *(
        pytest.param(*change, marks=pytest.mark.full)
        for change in ((2, TOKENS, 4, LATENTS), (4, BOTH, 1, LATENTS), (2, LATENTS, 4, BOTH))
    ),
]


@pytest.mark.parametrize(("first", "began", "then", "went_on"), RESUMED)
def test_a_run_goes_on_with_other_ranks_and_layouts_with_the_same_bits(
    tmp_path: Path, first: int, began: dict[str, int], then: int, went_on: dict[str, int]
) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "run"
    on_ranks_run(1, straight, blocks=8)
    on_ranks_run(first, folder, blocks=8, stop_after=6, layout=began)
    newest = checkpoint.path_of(folder / "checkpoints", 4)
    assert len(list(newest.glob("shard-*"))) == first
    checkpoint.verify(newest)
    on_ranks_run(then, folder, blocks=8, resume=True, layout=went_on)
    assert without_time(folder) == without_time(straight)
    for name, tensor in saved(folder).items():
        assert torch.equal(tensor, saved(straight)[name]), name


@pytest.mark.full
def test_a_run_of_experts_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    straight, folder, experts = tmp_path / "straight", tmp_path / "run", {"kind": "switch"}
    on_ranks_run(1, straight, blocks=8, **experts)
    on_ranks_run(4, folder, blocks=8, stop_after=6, **experts)
    on_ranks_run(2, folder, blocks=8, resume=True, **experts)
    assert "W_router" in saved(straight)
    for name, tensor in saved(folder).items():
        assert torch.equal(tensor, saved(straight)[name]), name


@pytest.mark.full
def test_ranks_go_on_with_the_run_of_one_process(tmp_path: Path) -> None:
    straight, folder = tmp_path / "straight", tmp_path / "run"
    runs.run(None, str(straight))
    runs.run(None, str(folder), stop_after=6)
    on_ranks_run(3, folder, resume=True)
    for name, tensor in saved(folder).items():
        torch.testing.assert_close(tensor, saved(straight)[name], rtol=0, atol=2e-5)


@pytest.mark.full
def test_one_process_says_how_to_go_on_with_a_run_of_ranks(tmp_path: Path) -> None:
    on_ranks_run(2, tmp_path, stop_after=6)
    with pytest.raises(ValueError, match="it is of several; resume it by torchrun"):
        runs.run(None, str(tmp_path), resume=True)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"differs": True}, "train: expected the same on all ranks"),
    ({"n_latents": 4, "k": 2}, "n_latents: expected latents for each of 3 ranks, got 4"),
    ({"layout": {"tokens_over": 2}}, "processes, 3, got 0 and 2; start with torchrun"),
    ({"layout": {"tokens": 1, "latents": 3, "others": 1}}, "two named 'latents' and 'tokens', got"),
    ({"blocks": 7}, "blocks: expected a divisor of n_latents = 96, got 7"),
    ({"micro_batch_size": 10}, "micro_batch_size: with latents over processes expected none"),
    ({"resample_every": 4}, "resample_every: with latents over processes expected none"),
    (
        {"source": [torch.zeros(51, 16)]},
        "activations: with latents over processes expected stored ones or LiveBatches, got other",
    ),
    ({"route": "autograd"}, "route: expected 'fused'"),
]


def refusals(group: Any, folder: str) -> list[str]:
    return [runs.refused(group, folder, **options) for options, _ in REFUSED]


def test_bad_input_is_an_error_on_all_ranks(tmp_path: Path) -> None:
    for messages in on_ranks(3, refusals, str(tmp_path / "run")):
        for message, (_, words) in zip(messages, REFUSED, strict=True):
            assert words in message
    assert not (tmp_path / "run").exists()


def part_of(group: Any, folder: str) -> dict[str, torch.Tensor]:
    team = Team(DeviceMesh.from_group(group, "cpu"), TIMEOUT)
    sae = load_sae(Path(folder), team, LatentRanks(group, 99).latents)
    return {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}


@pytest.mark.full
def test_ranks_read_their_rows_of_a_saved_sae(tmp_path: Path) -> None:
    sae = BatchTopKSAE(16, 99, k=6, seed=5)
    sae.save_pretrained(tmp_path)
    whole = joined(on_ranks(2, part_of, str(tmp_path)), sae.state_dict())
    for name, tensor in sae.state_dict().items():
        assert torch.equal(whole[name], tensor), name


@pytest.mark.full
def test_the_command_line_under_torchrun(tmp_path: Path) -> None:
    acts, out = str(tmp_path / "acts"), tmp_path / "run"
    with ShardWriter(acts, 16) as writer:
        writer.write(runs.activations())
    flags = ["--n-latents", "96", "--k", "6", "--steps", "9", "--batch-size", "64"]
    done = torchrun(2, "train", acts, "--out", str(out), "--latents-over", "2", *flags)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("fvu") == 1, "one process speaks"
    assert "latents_over = 2" in (out / "run.toml").read_text()
    again = torchrun(2, "train", acts, "--out", str(out), "--latents-over", "2", *flags)
    assert again.returncode != 0
    assert again.stderr.count("expected a new or an empty folder") == 1
    assert again.stderr.count("exitcode  : 2") == 2, again.stderr
    (out / "result.json").unlink()
    resumed = torchrun(1, "resume", str(out))
    assert resumed.returncode == 0, resumed.stderr  # with however many there are
    assert "latents_over = 1" in (out / "run.toml").read_text()
    other = torchrun(2, "train", acts, "--out", str(out), "--latents-over", "3", *flags)
    assert other.stderr.count("expected numbers whose product is that of the processes, 2") == 1


@pytest.mark.full
def test_the_command_line_goes_on_in_another_layout(tmp_path: Path) -> None:
    acts, out = str(tmp_path / "acts"), tmp_path / "run"
    with ShardWriter(acts, 16) as writer:
        writer.write(runs.activations())
    flags = [
        "--n-latents",
        "96",
        "--k",
        "6",
        "--steps",
        "9",
        "--batch-size",
        "128",
        "--blocks",
        "8",
    ]
    command = ["train", acts, "--out", str(out), "--checkpoint-every", "3", *flags]
    done = torchrun(2, *command)
    assert done.returncode == 0, done.stderr
    assert "tokens over 2: of reconstructions a process sends" in done.stdout
    assert "latents_over = 1\ntokens_over = 2\n" in (out / "run.toml").read_text()
    straight = saved(out)
    (out / "result.json").unlink()
    for step in (6, 9):
        shutil.rmtree(checkpoint.path_of(out / checkpoint.CHECKPOINTS, step))
    done = torchrun(2, *command, "--latents-over", "2", "--resume")
    assert done.returncode == 0, done.stderr
    assert "latents_over = 2\ntokens_over = 1\n" in (out / "run.toml").read_text()
    for name, tensor in saved(out).items():
        assert torch.equal(tensor, straight[name]), name
