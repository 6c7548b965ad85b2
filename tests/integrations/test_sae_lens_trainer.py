"""SAELens' own trainer with its inner step on FusedStep: the same run, the same files."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING

import pytest
import torch

import sae_kernels as sk
from tests.integrations.as_shipped import Run, assert_same_run, batches
from tests.integrations.sae_lens_runs import (
    CLASSES,
    B,
    D,
    check,
    level,
    make,
    order,
    seen,
    silent,
    steps,
)

if TYPE_CHECKING:
    from pathlib import Path

PLAIN = {"rescale_acts_by_decoder_norm": False, "apply_b_dec_to_input": False}


@pytest.mark.parametrize("kind", CLASSES)
@pytest.mark.parametrize("window", [1000, 3], ids=["all-alive", "many-dead"])
def test_twenty_steps_are_the_library_s_own(kind: str, window: int) -> None:
    check(kind, 20, dead_feature_window=window)


@pytest.mark.parametrize("kind", CLASSES)
def test_twenty_steps_with_few_dead_latents_and_negative_pre_activations(kind: str) -> None:
    check(kind, 20, few_dead=True)


@pytest.mark.parametrize("kind", ["topk", "batchtopk"])
def test_twenty_steps_without_norms_and_without_b_dec_in_the_input(kind: str) -> None:
    check(kind, 20, dead_feature_window=3, sae_options=PLAIN)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CLASSES)
def test_two_hundred_steps_are_the_library_s_own(kind: str) -> None:
    check(kind, 200, dead_feature_window=20)


@pytest.mark.parametrize("kind", CLASSES)
def test_logs_and_outputs_are_the_library_s_own(kind: str) -> None:
    data = batches(3, B, D)
    logs, outputs = [], []
    for fast in (False, True):
        trainer = make(kind, dead_feature_window=1)
        with sk.accelerate("sae_lens") if fast else contextlib.nullcontext():
            out = steps(trainer, data)[-1]
            logs.append(trainer.build_train_step_log_dict(out, trainer.n_training_samples))
            outputs.append(out)
    theirs, ours = outputs
    assert logs[0].keys() == logs[1].keys()
    assert logs[1] == pytest.approx(logs[0], rel=1e-4, abs=1e-6)
    assert logs[0]["sparsity/dead_features"] == logs[1]["sparsity/dead_features"] > 0
    assert ours.feature_acts.shape == theirs.feature_acts.shape
    torch.testing.assert_close(
        ours.feature_acts.to_dense(), theirs.feature_acts.detach(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(ours.sae_out, theirs.sae_out.detach(), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match="read before the optimizer's step"):
        ours.hidden_pre.sum()


LEVELS = (None, "module", "trainer")
MIXES = [(a, b) for a in LEVELS for b in LEVELS if a != b]


@pytest.mark.parametrize(("first", "second"), MIXES)
def test_a_run_saved_at_one_level_goes_on_at_another(
    first: str | None, second: str | None, tmp_path: Path
) -> None:
    """Each mix ends where the library's own run ends, through its own checkpoint files."""
    data = batches(12, B, D)

    def halves(one: str | None, two: str | None, seed: int, folder: Path) -> Run:
        where = order(seed)
        with level(one):
            trainer = make(where=where, dead_feature_window=3)
            losses = steps(trainer, data[:6], where)
            trainer.save_checkpoint("half", base_path=folder)
        torch.manual_seed(5)  # what it starts from must not matter
        with level(two):
            fresh = make(where=order(7), dead_feature_window=3)
            fresh.sae.load_weights_from_checkpoint(folder / "half")
            fresh.load_trainer_state(folder / "half")
            losses += steps(fresh, data[6:], where)
        return seen(fresh, [float(o.loss.detach()) for o in losses], where)

    ours = halves(first, second, 0, tmp_path / "ours")
    shipped = halves(None, None, 0, tmp_path / "theirs")
    others = [halves(None, None, i, tmp_path / str(i)) for i in (1, 2, 3)]
    assert_same_run(ours, shipped, others)


def test_what_is_saved_has_the_library_s_own_layout(tmp_path: Path) -> None:
    states = []
    for name in (None, "trainer"):
        with level(name):
            trainer = make()
            steps(trainer, batches(2, B, D))
            trainer.save_checkpoint("end", base_path=tmp_path / str(name))
        path = tmp_path / str(name) / "end" / "trainer_state.pt"
        states.append(torch.load(path, weights_only=True)["optimizer"])
    theirs, ours = states
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for place, state in theirs["state"].items():
        assert state.keys() == ours["state"][place].keys()
        for key, tensor in state.items():
            mine = ours["state"][place][key]
            layout = (mine.dtype, mine.shape, mine.stride(), mine.device)
            assert layout == (tensor.dtype, tensor.shape, tensor.stride(), tensor.device), key


def test_a_whole_fit_with_scaled_activations_and_checkpoints(tmp_path: Path) -> None:
    data, ends = batches(30, B, D), []
    for fast in (False, True):
        trainer = make(
            "batchtopk",
            data=[*data, *data],
            sae_options={"normalize_activations": "expected_average_only_in"},
            total_training_samples=20 * B,
            n_batches_for_norm_estimate=10,
            n_checkpoints=2,
            checkpoint_path=str(tmp_path / str(fast)),
            save_final_checkpoint=True,
            logger=silent(),
        )
        with sk.accelerate("sae_lens") if fast else contextlib.nullcontext():
            ends.append(trainer.fit())
    theirs, ours = ends
    assert sorted(p.name for p in (tmp_path / "True").iterdir()) == sorted(
        p.name for p in (tmp_path / "False").iterdir()
    )
    for name, tensor in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert ours.cfg.metadata.num_dead_features == theirs.cfg.metadata.num_dead_features
    assert ours.cfg.metadata.l0 == theirs.cfg.metadata.l0


def test_undone_in_the_middle_of_a_run() -> None:
    data = batches(10, B, D)

    def halves(seed: int, fast: bool) -> Run:
        where = order(seed)
        trainer = make(where=where)
        with level("trainer" if fast else None):
            outputs = steps(trainer, data[:5], where)
        outputs += steps(trainer, data[5:], where)
        return seen(trainer, [float(o.loss.detach()) for o in outputs], where)

    assert_same_run(halves(0, True), halves(0, False), [halves(i, False) for i in (1, 2, 3)])


def test_what_others_do_between_steps_counts() -> None:
    data = batches(8, B, D)

    def edited(seed: int, fast: bool) -> Run:
        where = order(seed)
        trainer = make(where=where)
        with level("trainer" if fast else None):
            outputs = steps(trainer, data[:3], where)
            sae = trainer.sae
            with torch.no_grad():
                sae.W_dec *= 1.5
            sae.W_enc.data = sae.W_enc.data.clone(memory_format=torch.contiguous_format) * 1.25
            sae.activation_fn.k = 4
            trainer.optimizer.load_state_dict(copy.deepcopy(trainer.optimizer.state_dict()))
            outputs += steps(trainer, data[3:5], where)
            trainer.optimizer = torch.optim.Adam(sae.parameters(), lr=5e-4, betas=(0.8, 0.99))
            outputs += steps(trainer, data[5:], where)
        return seen(trainer, [float(o.loss.detach()) for o in outputs], where)

    assert_same_run(edited(0, True), edited(0, False), [edited(i, False) for i in (1, 2, 3)])
