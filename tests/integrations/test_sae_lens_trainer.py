"""SAELens' own trainer with its inner step on FusedStep: the same run, the same files."""

from __future__ import annotations

import contextlib
import copy
import warnings
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import sae_kernels as sk
from sae_kernels.errors import AccelerationError
from tests.integrations.as_shipped import MARGIN, Order, Run, assert_same_run, batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

saes = pytest.importorskip("sae_lens.saes", reason="SAELens (pip install sae-lens) is missing")
from sae_lens.config import SAETrainerConfig  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402

B, D, F, K = 128, 32, 512, 8
WIDTHS = [64, 256, 512]
CLASSES = {
    "topk": "TopKTrainingSAE",
    "batchtopk": "BatchTopKTrainingSAE",
    "matryoshka": "MatryoshkaBatchTopKTrainingSAE",
}
WHAT = "SAETrainer._train_step"


def order(seed: int = 0, kind: str = "topk") -> Order:
    groups = [b - a for a, b in zip([0, *WIDTHS], WIDTHS, strict=False)]
    return Order(seed, B, D, tuple(groups) if kind == "matryoshka" else (F,))


def make(
    kind: str = "topk",
    data: list[Tensor] | None = None,
    where: Order | None = None,
    sae_options: dict[str, Any] | None = None,
    **options: Any,
) -> Any:
    """A trainer whose weights are drawn by a fixed seed, with rows of many norms."""
    where = order(kind=kind) if where is None else where
    torch.manual_seed(0)
    extra = {"matryoshka_widths": list(WIDTHS)} if kind == "matryoshka" else {}
    config = getattr(saes, CLASSES[kind] + "Config")
    sae = getattr(saes, CLASSES[kind])(config(d_in=D, d_sae=F, k=K, **extra, **(sae_options or {})))
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * torch.randn(F, generator=g))
        sae.b_dec.copy_(0.1 * torch.randn(D, generator=g))
        sae.W_dec.mul_(0.5 + torch.rand(F, 1, generator=g))
        for p in sae.parameters():
            p.copy_(where.applied(p))
    settings = {"lr": 1e-3, "lr_end": 1e-4, "lr_warm_up_steps": 4, "dead_feature_window": 1000}
    settings |= {"total_training_samples": 10**9, "train_batch_size_samples": B, "device": "cpu"}
    return SAETrainer(SAETrainerConfig(**(settings | options)), sae, iter(data or ()))


def steps(trainer: Any, data: list[Tensor], where: Order | None = None) -> list[Any]:
    """Steps as SAETrainer.fit makes them."""
    outputs = []
    for x in data:
        if where is not None:
            x = x[where.tokens][:, where.dims]
        outputs.append(trainer.step(x))
        trainer.n_training_steps += 1
    return outputs


def seen(trainer: Any, losses: list[float], where: Order) -> Run:
    """The run in the shipped order."""
    sae = trainer.sae
    tensors = {n: p.detach().clone() for n, p in sae.named_parameters()}
    for n, p in sae.named_parameters():
        state = trainer.optimizer.state[p]
        tensors |= {f"{key} of {n}": state[key].clone() for key in ("exp_avg", "exp_avg_sq")}
    if hasattr(sae, "topk_threshold"):
        tensors["threshold"] = sae.topk_threshold.clone()
    counts = {n: getattr(trainer, n) for n in ("act_freq_scores", "n_forward_passes_since_fired")}
    figures = [trainer.n_frac_active_samples, trainer.optimizer.param_groups[0]["lr"]]
    figures += [float(trainer.optimizer.state[p]["step"]) for p in sae.parameters()]
    return Run(
        torch.tensor(losses, dtype=torch.float64),
        {n: where.undone(t) for n, t in tensors.items()},
        {n: where.undone(t) for n, t in counts.items()} | {"figures": torch.tensor(figures)},
    )


def run(
    kind: str, n: int, seed: int = 0, fast: bool = False, few_dead: bool = False, **options: Any
) -> Run:
    where, data = order(seed, kind), batches(n, B, D)
    trainer = make(kind, where=where, **options)
    if few_dead:
        let_die(trainer, where)
    with sk.accelerate("sae_lens", level="trainer") if fast else contextlib.nullcontext() as handle:
        outputs = steps(trainer, data, where)
        if handle is not None:
            assert handle.report().taken == {WHAT: n}
            assert not handle.report().left
    return seen(trainer, [float(o.loss.detach()) for o in outputs], where)


def let_die(trainer: Any, where: Order) -> None:
    """Five latents that never fire and have not for long; fewer than AuxK keeps per token."""
    dead = torch.isin(where.latents, torch.arange(0, F, 100)[:5])
    with torch.no_grad():
        trainer.sae.b_enc[dead] = -5.0
    trainer.n_forward_passes_since_fired[dead] = 2000


def check(kind: str, n: int, **options: Any) -> None:
    ours, shipped = run(kind, n, fast=True, **options), run(kind, n, **options)
    assert_same_run(ours, shipped, [run(kind, n, seed=i, **options) for i in (1, 2, 3)])


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


def level(name: str | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if name is None else sk.accelerate("sae_lens", level=name)


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
            logger=_silent(),
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


def _silent() -> Any:
    from sae_lens.config import LoggingConfig

    return LoggingConfig(log_to_wandb=False)


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


@pytest.fixture
def originals() -> Iterator[None]:
    before = SAETrainer._train_step
    yield
    assert SAETrainer._train_step is before


def fail(trainer: Any, x: Tensor) -> None:
    """A step whose scheduler fails, after the update, with acceleration or without."""
    trainer.lr_scheduler.step = lambda: 1 / 0
    try:
        trainer.step(x)
    finally:
        del trainer.lr_scheduler.step


def broken_off(trainer: Any, data: list[Tensor], where: Order) -> None:
    steps(trainer, data[:2], where)
    fail(trainer, data[2][where.tokens][:, where.dims])


def test_an_exception_leaves_everything_unpatched_and_intact(originals: None) -> None:
    data = batches(6, B, D)

    def failing(seed: int, fast: bool) -> Run:
        where = order(seed, "batchtopk")
        trainer = make("batchtopk", where=where)
        with pytest.raises(ZeroDivisionError), level("trainer" if fast else None):
            broken_off(trainer, data[:3], where)
        for p in trainer.sae.parameters():
            state = trainer.optimizer.state[p]
            assert p.is_contiguous()
            assert state["exp_avg"].is_contiguous()
            assert float(state["step"]) == 3
        outputs = steps(trainer, data[3:], where)
        return seen(trainer, [float(o.loss.detach()) for o in outputs], where)

    assert_same_run(failing(0, True), failing(0, False), [failing(i, False) for i in (1, 2, 3)])


def test_an_exception_before_the_update_changes_no_weight(originals: None) -> None:
    trainer = make("batchtopk")
    with sk.accelerate("sae_lens"):
        steps(trainer, batches(2, B, D))
        held = {n: t.clone() for n, t in trainer.sae.state_dict().items()}
        with pytest.raises(ValueError, match=r"x: expected shape \[B, 32\]"):
            trainer.step(torch.zeros(B, D + 1))
        for n, t in trainer.sae.state_dict().items():
            assert torch.equal(t, held[n])


def test_activations_that_are_nan_are_skipped_with_one_warning() -> None:
    trainer, bad = make(), batches(1, B, D)[0]
    bad[3, 5] = torch.nan
    with sk.accelerate("sae_lens"):
        steps(trainer, batches(2, B, D))
        held = {n: t.clone() for n, t in trainer.sae.state_dict().items()}
        with pytest.warns(RuntimeWarning, match="SAETrainer: expected finite activations"):
            out = trainer.step(bad)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer.step(bad)
        assert out.loss.isnan()
        for n, t in trainer.sae.state_dict().items():
            assert torch.equal(t, held[n])
        assert float(trainer.optimizer.state[trainer.sae.b_dec]["step"]) == 2
        assert trainer.step(batches(3, B, D)[2]).loss.isfinite()


def _swap(optimizer: Callable[[Any], Any]) -> Callable[[Any], None]:
    def change(trainer: Any) -> None:
        trainer.optimizer = optimizer(trainer.sae.parameters())

    return change


def _set_grad(trainer: Any) -> None:
    trainer.sae.b_dec.grad = torch.zeros(D)


class Odd(saes.TopKTrainingSAE):
    pass


CHANGES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "hook": (
        lambda t: t.sae.add_hook("hook_sae_acts_post", lambda acts, hook: acts),
        "hooks on the SAE",
    ),
    "AdamW": (_swap(torch.optim.AdamW), "an optimizer of type AdamW"),
    "weight decay": (
        _swap(lambda p: torch.optim.Adam(p, weight_decay=0.1)),
        "Adam with weight_decay",
    ),
    "frozen": (lambda t: t.sae.b_dec.requires_grad_(False), "frozen parameters"),
    "gradient": (_set_grad, "gradients from before the step"),
    "subclass": (lambda t: setattr(t.sae, "__class__", Odd), "an SAE of class Odd"),
    "loss": (
        lambda t: setattr(t.sae, "mse_loss_fn", lambda a, b: (a - b).abs()),
        "another mse_loss_fn",
    ),
    "forward": (
        lambda t: setattr(t.sae, "training_forward_pass", t.sae.training_forward_pass),
        "another training_forward_pass",
    ),
    "step hook": (
        lambda t: t.optimizer.register_step_pre_hook(lambda *_: None),
        "hooks on the optimizer's step",
    ),
    "fp16": (
        lambda t: setattr(t, "autocast_if_enabled", torch.autocast("cpu", torch.float16)),
        "autocast to torch.float16",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_is_not_the_same_is_left_to_the_library(name: str) -> None:
    change, why = CHANGES[name]
    (x,) = batches(1, B, D)
    plain, trainer, strict = make(), make(), make()
    start = {n: t.clone() for n, t in plain.sae.state_dict().items()}
    for each in (plain, trainer, strict):
        change(each)
    plain.step(x)
    with sk.accelerate("sae_lens") as handle:
        trainer.step(x)
    assert (WHAT, why) in {(left.what, left.why) for left in handle.report().left}
    assert WHAT not in handle.report().taken
    # The library's own step at module level; in fp16 rounding turns the signs of small gradients.
    for n, t in plain.sae.state_dict().items():
        off, moved = (trainer.sae.state_dict()[n] - t).norm(), (start[n] - t).norm()
        assert off <= 0.05 * moved, n
    with sk.accelerate("sae_lens", strict=True), pytest.raises(AccelerationError, match=why):
        strict.step(x)


def test_bf16_autocast_trains_on_bf16_operands() -> None:
    """Not the same run: theirs rounds pre-activations to bf16, which moves ranks and values."""
    data, losses = batches(20, B, D), []
    for fast, autocast in ((False, False), (False, True), (True, True)):
        trainer = make(autocast=autocast)
        with level("trainer" if fast else None) as handle:
            losses.append([float(o.loss.detach()) for o in steps(trainer, data)])
            if fast:
                assert handle.report().taken == {WHAT: 20}
    exact, theirs, ours = torch.tensor(losses, dtype=torch.float64)
    assert not torch.equal(ours, exact)
    # Both are off by the rounding of operands, to the same degree.
    off, scale = ((each / exact - 1).abs().max() for each in (ours, theirs))
    assert off <= MARGIN * scale


def test_a_copied_trainer_is_its_own() -> None:
    data = batches(4, B, D)
    with sk.accelerate("sae_lens"):
        trainer = make()
        trainer.data_provider = None
        steps(trainer, data[:2])
        twin = copy.deepcopy(trainer)
        one = [float(o.loss) for o in steps(trainer, data[2:])]
        two = [float(o.loss) for o in steps(twin, data[2:])]
    assert one == two
    assert twin.sae.W_dec.data_ptr() != trainer.sae.W_dec.data_ptr()


def test_several_trainers_in_lockstep() -> None:
    from sae_lens.training.multi_sae_trainer import MultiSAETrainer

    data, ends = batches(6, B, D), []
    for fast in (False, True):
        torch.manual_seed(0)
        made = {name: make(kind).sae for name, kind in (("a", "topk"), ("b", "batchtopk"))}
        settings = SAETrainerConfig(
            total_training_samples=6 * B,
            train_batch_size_samples=B,
            device="cpu",
            lr=1e-3,
            lr_end=1e-4,
            logger=_silent(),
        )
        options = {"cfg": settings, "saes": made, "hook_names": {"a": "x", "b": "x"}}
        trainer = MultiSAETrainer(**options, data_provider=iter([{"x": x} for x in data]))
        with sk.accelerate(trainer) if fast else contextlib.nullcontext() as handle:
            ends.append(trainer.fit())
        if handle is not None:
            assert handle.report().taken == {WHAT: 12}
    for name, theirs in ends[0].items():
        for key, tensor in theirs.state_dict().items():
            torch.testing.assert_close(
                ends[1][name].state_dict()[key], tensor, rtol=1e-4, atol=1e-5
            )


def test_one_trainer_alone() -> None:
    data = batches(2, B, D)
    mine, other = make(), make()
    with sk.accelerate(mine) as handle:
        steps(mine, data)
        steps(other, data)
    assert handle.report().taken == {WHAT: 2}
